"""FakeTriton: a Backend that answers like the tiny family on Triton does, with time and failures under control.

It passes the same contract suite as `orchestrator.triton.TritonBackend` (tests/contract).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cascadeserve.endpoint_config import endpoint_config_path
from cascadeserve.http_connection import HttpAnswer
from cascadeserve.triton_config import instance_count, model_versions, read_config, served_versions
from orchestrator.backend import (
    BatchAnswer,
    CallRejected,
    ConnectionLost,
    EndpointDown,
    ModelVersion,
    NoConnection,
    NotServed,
    StubDead,
)
from tests.fakes.tiny import ERRS, EXITS, KILLS, LABEL_OFFSET, VERSION_OFFSET

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from cascadeserve.gear_plan import TensorSpec


@dataclass
class Call:
    """One batch as the fake received it."""

    at_s: float
    model: str
    rows: int


@dataclass
class FakeTriton:
    """`instances` and `versions` (default: 1 alone) are what is loaded.

    A load finds `counts_on_load` in the config file; or what is written there, where `repository` is a working copy
    with the configs of an endpoint named `a`.
    """

    instances: dict[str, int] = field(default_factory=lambda: {"small": 1, "large": 1})
    versions: dict[str, set[int]] = field(default_factory=dict)
    counts_on_load: dict[str, int] = field(default_factory=dict)
    repository: Path | None = None
    busy_s: dict[str, float] = field(default_factory=dict)
    load_s: float = 0.0
    down: bool = False
    # as after SIGSTOP: what is under way never ends, and nothing is answered
    hang: bool = False
    reject: str = ""
    fail_loads: str = ""
    # models whose process has ended
    dead: set[str] = field(default_factory=set)
    # labels of the rows of every batch that ended a process or the server
    crashes: list[list[int]] = field(default_factory=list)
    # one batch after the other, as one core does it
    serial: bool = False
    # calls under way end as if the connection had broken
    fail_running: bool = False
    calls: list[Call] = field(default_factory=list)
    in_flight: int = 0
    max_in_flight: int = 0
    max_in_flight_by_model: dict[str, int] = field(default_factory=dict)
    loads: list[str] = field(default_factory=list)
    unloads: list[str] = field(default_factory=list)
    _core: asyncio.Lock = field(default_factory=asyncio.Lock)
    _running: set[asyncio.Future[None]] = field(default_factory=set)

    async def infer(
        self,
        model: ModelVersion,
        specs: Sequence[TensorSpec],
        inputs: Sequence[NDArray[Any]],
        *,
        want_scores: bool,
        timeout_s: float,
    ) -> BatchAnswer:
        """Answer after `busy_s`."""
        if self.down:
            raise NoConnection("connection refused")
        if model not in self._loaded():
            raise NotServed(f"Request for unknown model: '{model.name}' version {model.version} is not found")
        if [spec.name for spec in specs] != ["x"] or inputs[0].shape[1:] != (3,):
            raise CallRejected("unexpected input")
        x = inputs[0]
        self.calls.append(Call(asyncio.get_running_loop().time(), model.name, len(x)))
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        of_model = self.max_in_flight_by_model
        of_model[model.name] = of_model.get(model.name, 0) + 1
        try:
            async with asyncio.timeout(timeout_s), self._core if self.serial else contextlib.nullcontext():
                await self._be_busy(self.busy_s.get(model.name, 0.0))
        except TimeoutError as error:
            raise EndpointDown("DEADLINE_EXCEEDED") from error
        finally:
            self.in_flight -= 1
        if self.down or self.fail_running:
            raise ConnectionLost("connection reset")
        self._obey_marks(model, x)
        if self.reject:
            raise CallRejected(self.reject)
        label = x[:, 0].astype("int64") + LABEL_OFFSET[model.name] + VERSION_OFFSET * (model.version - 1)
        return BatchAnswer(label, x[:, 1].copy(), x.copy() if want_scores else None)

    async def is_live(self, *, timeout_s: float) -> bool:  # noqa: ARG002
        """Live unless `down` or `hang`."""
        return not (self.down or self.hang)

    async def instance_counts(self, *, timeout_s: float) -> dict[ModelVersion, int]:  # noqa: ARG002
        """What is loaded."""
        self._check_up()
        return self._loaded()

    async def load(self, model: str, *, timeout_s: float) -> None:  # noqa: ARG002
        """Take the count and the versions that the config file names."""
        self._check_up()
        await asyncio.sleep(self.load_s)
        if self.fail_loads:
            raise CallRejected(self.fail_loads)
        if model not in LABEL_OFFSET:
            raise CallRejected(f"failed to load '{model}'")
        self.loads.append(model)
        if self.repository is None:
            self.instances[model] = self.counts_on_load.get(model, 1)
            return
        config = read_config(endpoint_config_path(self.repository, model, "a"))
        self.instances[model] = instance_count(config)
        self.versions[model] = served_versions(config, model_versions(self.repository / model))

    async def unload(self, model: str, *, timeout_s: float, to_its_end: bool = False) -> None:  # noqa: ARG002
        """Forget the model."""
        self._check_up()
        self.unloads.append(model)
        self.dead.discard(model)
        self.instances.pop(model, None)

    async def pass_http(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> HttpAnswer:
        """Answer with what was sent, after the busy time of the model in the path."""
        await self._pass(path.split("/")[3])
        said = {b"content-type": b"text/plain", b"x-secret": b"1"} | {
            name.lower().encode(): value.encode() for name, value in headers.items()
        }
        return HttpAnswer(200, said, f"{method} {path} ".encode() + body, keep_alive=True)

    async def pass_rpc(self, name: str, request: Any) -> Any:
        """The same."""
        await self._pass(getattr(request, "model_name", ""))
        return name, request

    async def _pass(self, model: str) -> None:
        if self.down:
            raise NoConnection("connection refused")
        self.calls.append(Call(asyncio.get_running_loop().time(), model, 0))
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            await self._be_busy(self.busy_s.get(model, 0.0))
        finally:
            self.in_flight -= 1

    async def close(self) -> None:
        """Nothing to close."""

    def _loaded(self) -> dict[ModelVersion, int]:
        return {
            ModelVersion(model, version): count
            for model, count in self.instances.items()
            for version in self.versions.get(model, {1})
        }

    def kill(self) -> None:
        """End as with SIGKILL."""
        self.down = True
        for ended in self._running:
            if not ended.done():
                ended.set_exception(ConnectionLost("closed, no answer"))

    async def _be_busy(self, busy_s: float) -> None:
        """Wait, or break off when the server is killed."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def end() -> None:
            if not ended.done():
                ended.set_result(None)

        timer = loop.call_later(math.inf if self.hang else busy_s, end)
        self._running.add(ended)
        try:
            await ended
        finally:
            timer.cancel()
            self._running.discard(ended)

    def _obey_marks(self, model: ModelVersion, x: NDArray[Any]) -> None:
        marks = set(x[:, 2].tolist())
        if ERRS in marks:
            raise CallRejected("a row is marked")
        crashes = KILLS in marks or (EXITS in marks and model.name not in self.dead)
        if crashes:
            self.crashes.append(x[:, 0].astype(int).tolist())
        if KILLS in marks:
            self.kill()
            raise ConnectionLost("closed, no answer")
        if crashes:
            self.dead.add(model.name)
        if model.name in self.dead:
            raise StubDead(f"Stub process '{model.name}_0_0' is not healthy.", model=model.name)

    def _check_up(self) -> None:
        if self.down:
            raise EndpointDown("connection refused")
