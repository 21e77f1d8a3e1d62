"""A front process: it listens, parses, validates and renders; what a request is answered, the dispatcher says.

It is started by the dispatcher, with the socket between them as its standard input, and ends with it. Several of them
listen on the same ports, and the kernel shares the connections out among them.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from cascadeserve.collector import spare_what_lives
from cascadeserve.errors import CascadeServeError, InternalError, InvalidRequest, NotSupported, Overloaded, Unavailable
from orchestrator.entry import Entry
from orchestrator.front_door import FrontDoor, ServeSettings
from orchestrator.fronts.frames import (
    Answer,
    Cancel,
    Counted,
    Failed,
    FromDispatcher,
    Infer,
    Link,
    Listening,
    Metrics,
    Refused,
    Service,
    ShowMetrics,
    ShowStatistics,
    Waiting,
    Welcome,
)
from orchestrator.request_options import read_options
from orchestrator.supervise import forever
from orchestrator.wire.descriptions import IndexEntry
from orchestrator.wire.request_checks import checked_inputs, checked_outputs, unknown_model
from orchestrator.wire.status import SHUTTING_DOWN, STATUS

if TYPE_CHECKING:
    from orchestrator.wire.descriptions import ModelConfig, ModelStatistics
    from orchestrator.wire.exchange import Call
    from orchestrator.wire.tensors import InferRequest, InferResponse, ModelMetadata, ServerMetadata

_log = logging.getLogger("orchestrator.fronts.front")  # not __main__

# Requests that one front may have open at the dispatcher. What is right to refuse, admission decides there; this bounds
# the memory of a front whose dispatcher does not keep up.
MAX_OPEN = 4096
_ERRORS = {kind.__name__: kind for kind in STATUS}
_DISPATCHER_GONE = "the dispatcher behind this server has ended; try another server"


class FrontPlane:
    """The dispatcher's data plane, as a front process has it."""

    def __init__(self) -> None:
        """Not connected; every request is refused until `connect` has returned."""
        self.draining = False
        self.refusing = False
        self.lost = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._link = Link(FromDispatcher, self._take, self._lose)
        self._numbers = itertools.count()
        self._open: dict[int, asyncio.Future[Any]] = {}
        self._settings: asyncio.Future[ServeSettings] = self._loop.create_future()
        self._served: asyncio.Future[None] = self._loop.create_future()
        self._service: Service
        self._max_rows: int
        self._max_work: float
        # requests refused here and their rows, by model and outcome, until the dispatcher is told
        self._refused: dict[tuple[str, str], tuple[int, float]] = {}
        self._entry = Entry(on_refusal=self._overloaded, on_lag=lambda _: None)

    async def connect(self, sock: socket.socket) -> ServeSettings:
        """Join the dispatcher over `sock`; returns where it wants this process to listen, and what to allow.

        Raises:
            Unavailable: the dispatcher has ended.

        """
        await self._loop.create_unix_connection(lambda: self._link, sock=sock)
        settings = await self._settings
        self._max_rows = settings.max_rows
        self._max_work = settings.max_work
        await self._served
        return settings

    def say_listening(self) -> None:
        """Tell the dispatcher that requests may come."""
        self._link.send(Listening())

    # -- DataPlane ----------------------------------------------------------------------------------------------

    def ready(self) -> bool:
        """See `DataPlane.ready`."""
        return self._service.ready and not self.draining

    def server_metadata(self) -> ServerMetadata:
        """See `DataPlane.server_metadata`."""
        return self._service.server

    def model_ready(self, name: str, version: str) -> bool:
        """See `DataPlane.model_ready`."""
        self.model_metadata(name, version)
        return name in self._service.models_ready and not self.draining

    def model_metadata(self, name: str, version: str) -> ModelMetadata:
        """See `DataPlane.model_metadata`."""
        model = self._service.models.get(name)
        if model is None:
            raise unknown_model(name)
        if version and version not in model.versions:
            raise unknown_model(name, version)
        return model

    def model_config(self, name: str, version: str) -> ModelConfig:
        """See `DataPlane.model_config`."""
        return self._service.configs[self.model_metadata(name, version).name]

    def repository_index(self) -> list[IndexEntry]:
        """See `DataPlane.repository_index`."""
        models = self._service.models
        return [IndexEntry(name, models[name].versions[-1], self.model_ready(name, "")) for name in sorted(models)]

    async def statistics(self, name: str, version: str) -> list[ModelStatistics]:
        """See `DataPlane.statistics`: the dispatcher counts for all fronts."""
        self._check_open()
        self.tell_refused()
        counted: list[ModelStatistics] = await self._answer_to(ShowStatistics(next(self._numbers), name, version))
        return counted

    def admit(self, name: str, version: str, beginning: bytes = b"") -> bool:
        """See `DataPlane.admit`."""
        return not self._knows(name, version) or self._entry.admit(name, beginning)

    def default_deadline_s(self, name: str, version: str) -> float | None:
        """See `DataPlane.default_deadline_s`."""
        return self._entry.default_deadline_s(name) if self._knows(name, version) else None

    def unread(self, name: str, version: str) -> None:
        """See `DataPlane.unread`."""
        if self._knows(name, version):
            self._entry.unread(name)

    def _knows(self, name: str, version: str) -> bool:
        model = self._service.models.get(name)
        return model is not None and (not version or version in model.versions)

    async def infer(self, request: InferRequest) -> InferResponse:
        """Check the request and have the dispatcher answer it; see `DataPlane.infer`."""
        model = self.model_metadata(request.model_name, request.model_version)
        request.waited_s += self._entry.lag_s()
        work = 0.0
        try:
            rows = checked_inputs(model, request, self._max_rows)[0].shape[0]
            checked_outputs(model, request)
            options = read_options(request.parameters, rows, max_work=self._max_work)
            work = rows * options.work_per_row
            self._check_open()
            if not request.admitted and not options.important:
                raise self._entry.refusal(model.name)
        except (InvalidRequest, Unavailable) as error:
            self._note_refusal(model.name, type(error).__name__, work)
            raise
        self._entry.took(model.name, work)
        response: InferResponse = await self._answer_to(Infer(next(self._numbers), request))
        return response

    async def metrics(self) -> tuple[bytes, str]:
        """Return the dispatcher's metrics and their content type: it counts for all fronts."""
        self._check_open()
        self.tell_refused()
        answer: tuple[bytes, str] = await self._answer_to(ShowMetrics(next(self._numbers)))
        return answer

    # -- Others -------------------------------------------------------------------------------------------------

    def has(self, model: str) -> bool:
        """See `Others.has`."""
        return model in self._service.others

    async def http(self, call: Call, verb: str) -> NoReturn:  # noqa: ARG002
        """See `Others.http`: they are not passed on from here."""
        raise _not_passed_on(call.model)

    async def rpc(self, name: str, request: Any, model: str, version: str, timeout_s: float | None) -> NoReturn:  # noqa: ANN401, ARG002
        """See `Others.rpc`: they are not passed on from here."""
        raise _not_passed_on(model)

    # -- OpenRequests -------------------------------------------------------------------------------------------

    @property
    def open_tickets(self) -> int:
        """Requests that have no answer yet."""
        return len(self._open)

    async def drain(self, timeout_s: float) -> bool:
        """Wait until every request is answered; returns whether that came in time."""
        give_up_s = self._loop.time() + timeout_s
        while self._open and self._loop.time() < give_up_s:  # noqa: ASYNC110 - rare, at shutdown only
            await asyncio.sleep(0.01)
        return not self._open

    async def close(self) -> None:
        """Refuse what is still open."""
        self._refuse_open("the server is shutting down")

    async def watch(self) -> None:
        """Look forever how late this process is; what waits, the dispatcher tells."""
        await self._entry.run(self.tell_refused)

    # -- the socket ---------------------------------------------------------------------------------------------

    def tell_refused(self) -> None:
        """Tell the dispatcher how many requests were refused here: it counts for all fronts, and the gears follow it.

        Now and then for many at once, or an overload would be passed on to it.
        """
        refused, self._refused = self._refused, {}
        for (model, outcome), (requests, rows) in refused.items():
            self._link.send(Refused(model, outcome, requests, rows))

    def _overloaded(self, model: str, rows: float) -> None:
        self._note_refusal(model, Overloaded.__name__, rows)

    def _note_refusal(self, model: str, outcome: str, rows: float) -> None:
        requests, all_rows = self._refused.get((model, outcome), (0, 0.0))
        self._refused[model, outcome] = requests + 1, all_rows + rows

    def _check_open(self) -> None:
        if self.lost.is_set():
            raise Unavailable(_DISPATCHER_GONE)
        if self.refusing:
            raise Unavailable(SHUTTING_DOWN)
        if len(self._open) >= MAX_OPEN:
            raise Unavailable(f"{MAX_OPEN} requests are open here already; try again shortly")

    async def _answer_to(self, question: Infer | ShowMetrics | ShowStatistics) -> Any:  # noqa: ANN401 - what the question asks for
        number = question.number
        future: asyncio.Future[Any] = self._loop.create_future()
        self._open[number] = future
        try:
            began_s = self._loop.time()
            await self._link.writable()
            if isinstance(question, Infer):
                _count_waited(question.request, self._loop.time() - began_s)
            self._link.send(question)
            return await future
        except asyncio.CancelledError:
            self._link.send(Cancel(number))
            raise
        finally:
            del self._open[number]

    def _take(self, message: Answer | Counted | Failed | Metrics | Service | Waiting | Welcome) -> None:
        match message:
            case Answer():
                self._settle(message.number, message.response)
            case Failed():
                kind = _ERRORS.get(message.kind, InternalError)
                error = kind.__new__(kind, message.sentence)
                vars(error).update(message.attributes)
                self._settle(message.number, error)
            case Metrics():
                self._settle(message.number, (message.body, message.content_type))
            case Counted():
                self._settle(message.number, message.models)
            case Service():
                self._service = message
                if not self._served.done():
                    self._served.set_result(None)
            case Waiting():
                self._entry.show(message.queues)
            case Welcome():
                self._settings.set_result(message.settings)

    def _settle(self, number: int, answer: object) -> None:
        future = self._open.get(number)
        if future is None or future.done():
            return  # cancelled while the answer was on its way
        if isinstance(answer, CascadeServeError):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    def _lose(self) -> None:
        _log.error("the dispatcher has ended: what is open and still comes is refused, then this front ends")
        self.draining = True
        self.lost.set()
        for future in (self._settings, self._served):
            if not future.done():
                future.set_exception(Unavailable(_DISPATCHER_GONE))
        self._refuse_open(_DISPATCHER_GONE)

    def _refuse_open(self, sentence: str) -> None:
        for number in tuple(self._open):
            self._settle(number, Unavailable(sentence))


def _count_waited(request: InferRequest, waited_s: float) -> None:
    """Take what a request waited here off the time that it has at the dispatcher."""
    request.waited_s += waited_s
    if request.client_timeout_s is not None:
        request.client_timeout_s -= waited_s


def _not_passed_on(model: str) -> NotSupported:
    return NotSupported(
        f"model '{model}' is no cascade, and a server with --fronts passes nothing on; ask its Triton, or serve "
        "without --fronts"
    )


async def serve_front(sock: socket.socket) -> int:
    """Serve until SIGTERM, or until the dispatcher ends; returns the exit status."""
    stop = asyncio.Event()
    # Again and again it changes nothing: a front that does not end in time is killed by the dispatcher.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    plane = FrontPlane()
    settings = await plane.connect(sock)
    door = FrontDoor(plane, plane, settings, others=plane, metrics=plane.metrics, shares_ports=True)
    await door.open()
    spare_what_lives()
    plane.say_listening()
    watch = asyncio.create_task(forever("entry", plane.watch), name="entry")
    ends = [asyncio.create_task(event.wait()) for event in (stop, plane.lost)]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    await door.close()
    plane.tell_refused()
    await asyncio.sleep(0)  # what is to be sent leaves in the next round of the loop
    for task in (watch, *ends):
        task.cancel()
    return 1 if plane.lost.is_set() else 0


def main() -> None:
    """`python -m orchestrator.fronts.front NUMBER LOG_LEVEL`, with the socket as standard input."""
    number, level = sys.argv[1:]
    logging.basicConfig(
        level=int(level),
        stream=sys.stderr,
        format=f"%(asctime)s %(levelname)s front {number} %(name)s: %(message)s",
    )
    try:
        status = asyncio.run(serve_front(socket.socket(fileno=sys.stdin.fileno())))
    except CascadeServeError as error:
        _log.error("%s", error)
        status = error.exit_code
    sys.exit(status)


if __name__ == "__main__":
    main()
