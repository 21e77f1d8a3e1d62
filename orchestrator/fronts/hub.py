"""The dispatcher's side of its front processes: starts them, answers them, starts them again.

Each has a socket pair to this process. So there is no path that another process could connect to, and whichever end
dies, the kernel tells the other.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from typing import TYPE_CHECKING

from cascadeserve.errors import RequestError, ServerStartFailed
from cascadeserve.process import spawn, stop
from orchestrator.front_door import cannot_listen
from orchestrator.fronts.frames import (
    Answer,
    Cancel,
    Counted,
    Failed,
    FromFront,
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
from orchestrator.supervise import forever
from orchestrator.wire.status import INTERNAL_ERROR, STATUS
from orchestrator.wire.tls import Tls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from orchestrator import metrics as counted
    from orchestrator.entry import Ahead
    from orchestrator.front_door import ClosableDataPlane, ServeSettings

_log = logging.getLogger(__name__)

# How often it is looked whether fronts have to be told anything new.
TELL_PERIOD_S = 0.1
# A front that ended is started again after this long, doubled each time that it does not live for long.
RESTART_AFTER_S = 0.5
MAX_RESTART_AFTER_S = 30.0
STEADY_S = 10.0
# what a front may take to end beyond its own `linger_s` and `drain_s`
STOP_GRACE_S = 3.0


class Hub:
    """All front processes of a dispatcher."""

    def __init__(
        self,
        data_plane: ClosableDataPlane,
        settings: ServeSettings,
        *,
        models: Callable[[], Iterable[str]],
        others: Callable[[], list[str]],
        metrics: counted.Metrics,
        on_refusal: Callable[[str, str, float], None],
    ) -> None:
        """`models` names what the data plane serves, `others` what fronts refuse to pass on.

        `metrics` is what is shown to those who ask a front. `on_refusal` is told of each request that a front refused:
        the family, the outcome as in the metrics, and how many rows it had or may have had, 0 if it was wrong.
        """
        self._data_plane = data_plane
        self._settings = settings
        self._models = models
        self._others = others
        self._told: Service | None = None
        self._fronts = [
            Front(number, data_plane, settings, metrics, service=self._service, on_refusal=on_refusal)
            for number in range(1, settings.fronts + 1)
        ]

    async def open(self) -> None:
        """Start the fronts and wait until all listen.

        Raises:
            InvalidArtefact: the files for TLS cannot be used.
            ServerStartFailed: a port is taken, or a front ended.

        """
        settings = self._settings
        if settings.tls is not None:
            Tls(settings.tls)  # what is wrong with them is said once, not by every front
        await _check_free(settings.host, settings.http_port, "--http-port")
        await _check_free(settings.host, settings.grpc_port, "--grpc-port")
        try:
            await asyncio.gather(*(front.start() for front in self._fronts))
            await asyncio.gather(*(front.wait_listening() for front in self._fronts))
        except BaseException:
            await self.close()
            raise

    async def run(self) -> None:
        """Keep them running and informed, forever."""
        async with asyncio.TaskGroup() as group:
            for front in self._fronts:
                group.create_task(front.keep_up(), name=f"front-{front.number}")
            group.create_task(forever("tell-fronts", self._tell_forever), name="tell-fronts")

    async def close(self) -> None:
        """Have every front stop accepting, answer what is open and end; the dispatcher serves them until then."""
        self._data_plane.draining = True
        self._tell()
        await asyncio.gather(*(front.stop() for front in self._fronts))

    def show(self, queues: Mapping[str, Ahead], lag_s: float) -> None:
        """Tell the fronts what is ahead of requests, who will also wait `lag_s` to be read here."""
        waiting = Waiting({name: ahead._replace(wait_s=ahead.wait_s + lag_s) for name, ahead in queues.items()})
        for front in self._fronts:
            front.tell(waiting)

    async def _tell_forever(self) -> None:
        while True:
            self._tell()
            await asyncio.sleep(TELL_PERIOD_S)

    def _tell(self) -> None:
        service = self._service()
        if service != self._told:
            self._told = service
            for front in self._fronts:
                front.tell(service)

    def _service(self) -> Service:
        plane = self._data_plane
        models = {name: plane.model_metadata(name, "") for name in self._models()}
        ready = [name for name in models if plane.model_ready(name, "")]
        configs = {name: plane.model_config(name, "") for name in models}
        return Service(plane.ready(), plane.server_metadata(), models, configs, ready, self._others())


class Front:
    """One front process and what it has asked."""

    def __init__(
        self,
        number: int,
        data_plane: ClosableDataPlane,
        settings: ServeSettings,
        metrics: counted.Metrics,
        *,
        service: Callable[[], Service],
        on_refusal: Callable[[str, str, float], None],
    ) -> None:
        """Not started yet; `number` is its name in logs, `service` what it is told first."""
        self.number = number
        self._data_plane = data_plane
        self._settings = settings
        self._metrics = metrics
        self._service = service
        self._on_refusal = on_refusal
        self._loop = asyncio.get_running_loop()
        self._link: Link | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._open: dict[int, asyncio.Task[None]] = {}
        self._listening = asyncio.Event()
        self._lost = asyncio.Event()
        self._dropped = 0
        self._stopping = False

    async def start(self) -> None:
        """Start the process; raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            link = await self.join(ours)
            level = str(logging.getLogger().getEffectiveLevel())
            command = [sys.executable, "-m", "orchestrator.fronts.front", str(self.number), level]
            try:
                self._process = await spawn(command, stdin=theirs.fileno())
            except BaseException:
                link.close()
                raise

    async def join(self, sock: socket.socket) -> Link:
        """Answer what comes over `sock`, the other end of which is a front's."""
        self._listening.clear()
        self._lost.clear()
        link = Link(FromFront, self._take, self._lose)
        await self._loop.create_unix_connection(lambda: link, sock=sock)
        self._link = link
        link.send(Welcome(self._settings))
        link.send(self._service())
        return link

    async def wait_listening(self) -> None:
        """Wait until it listens; raises ServerStartFailed if it ends instead."""
        events = [asyncio.create_task(event.wait()) for event in (self._listening, self._lost)]
        await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
        for event in events:
            event.cancel()
        if not self._listening.is_set():
            raise ServerStartFailed(f"front {self.number} ended before it listened; it has said why")

    def tell(self, news: Service | Waiting) -> None:
        """Send what has changed."""
        if self._link is not None:
            self._link.send(news)

    async def keep_up(self) -> None:
        """Start the process again whenever it ends by itself."""
        delay_s = RESTART_AFTER_S
        while (process := self._process) is not None:
            began_s = self._loop.time()
            status = await process.wait()
            await self._lost.wait()
            if self._stopping:
                return
            steady = self._loop.time() > began_s + STEADY_S
            delay_s = RESTART_AFTER_S if steady else min(2 * delay_s, MAX_RESTART_AFTER_S)
            _log.error(
                "front %d ended with status %d, %d open requests dropped; starting it again in %g s",
                self.number, status, self._dropped, delay_s,
            )  # fmt: skip
            await asyncio.sleep(delay_s)
            if self._stopping:
                return
            try:
                await self.start()
            except OSError as error:
                _log.error("front %d cannot be started: %s", self.number, error)

    async def stop(self) -> None:
        """Have it stop accepting, answer what is open, and end."""
        self._stopping = True
        if self._process is not None and self._process.returncode is None:
            limit_s = self._settings.linger_s + self._settings.drain_s + STOP_GRACE_S
            await stop(self._process, kill_after_s=limit_s)

    # -- the socket ---------------------------------------------------------------------------------------------

    def _take(self, message: Cancel | Infer | Listening | Refused | ShowMetrics | ShowStatistics) -> None:
        match message:
            case Infer() | ShowStatistics():
                self._open[message.number] = self._loop.create_task(self._answer(message))
            case Cancel():
                if (task := self._open.pop(message.number, None)) is not None:
                    task.cancel()
            case Refused():
                for _ in range(message.requests):
                    self._on_refusal(message.model, message.outcome, message.rows / message.requests)
            case ShowMetrics():
                self._send(Metrics(message.number, *self._metrics.render()))
            case Listening():
                self._listening.set()

    async def _answer(self, asked: Infer | ShowStatistics) -> None:
        number = asked.number
        try:
            if isinstance(asked, Infer):
                self._send(Answer(number, await self._data_plane.infer(asked.request)))
            else:
                self._send(Counted(number, await self._data_plane.statistics(asked.name, asked.version)))
        except RequestError as error:
            self._send(Failed(number, _kind(error), str(error), vars(error)))
        except Exception:  # noqa: BLE001 - logged
            _log.exception("request failed")
            self._send(Failed(number, "InternalError", INTERNAL_ERROR, {}))
        finally:
            self._open.pop(number, None)

    def _send(self, message: Answer | Counted | Failed | Metrics) -> None:
        if self._link is not None:
            self._link.send(message)

    def _lose(self) -> None:
        """Drop what it has open: the clients went with it."""
        self._dropped = len(self._open)
        for task in self._open.values():
            task.cancel()
        self._open.clear()
        self._link = None
        self._lost.set()


def _kind(error: RequestError) -> str:
    """Name of the error's class, or of the nearest above it that a front knows."""
    return next((kind.__name__ for kind in type(error).__mro__ if kind in STATUS), "InternalError")


async def _check_free(host: str, port: int, option: str) -> None:
    """Refuse a port that somebody listens on: fronts share theirs, and would share it with a stranger too."""
    try:
        server = await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port, start_serving=False)
    except OSError as error:
        raise cannot_listen(host, port, option, error) from error
    server.close()
    await server.wait_closed()
