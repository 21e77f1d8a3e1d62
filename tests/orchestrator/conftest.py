from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cascadeserve.cluster import Cluster, CpuDevice, Endpoint
from orchestrator.app import Orchestrator
from tests.fakes.fake_backend import FakeTriton
from tests.fakes.tiny import plan, plan_document

if TYPE_CHECKING:
    from pathlib import Path


def cluster(names: tuple[str, ...]) -> Cluster:
    """A cluster whose addresses nobody listens on."""
    endpoints = tuple(
        Endpoint(
            name=name,
            grpc=f"127.0.0.1:{3 * index + 1}",
            http=f"127.0.0.1:{3 * index + 2}",
            metrics=f"127.0.0.1:{3 * index + 3}",
            device=CpuDevice(cores=(0,)),
        )
        for index, name in enumerate(names)
    )
    return Cluster(schema_version=1, endpoints=endpoints)


@dataclass
class Rig:
    """An orchestrator over fakes, without sockets and without its loops running."""

    orchestrator: Orchestrator
    fakes: dict[str, FakeTriton]
    # what the plan file holds: changed by tests of a plan change
    document: dict[str, Any]

    @property
    def family(self) -> Any:
        return self.orchestrator.dispatcher.families["family"]

    def gear(self, name: str) -> None:
        gear = next(gear for gear in self.family.plan.gears if gear.name == name)
        self.orchestrator.dispatcher.set_gear(self.family, gear)

    async def probe(self) -> None:
        for monitor in self.orchestrator.monitors.values():
            await monitor.probe()


async def make_rig(
    document: dict[str, Any] | None = None,
    *,
    names: tuple[str, ...] = ("a",),
    repository: Path | None = None,
    max_work: float = 1_000_000.0,
    **fake: Any,
) -> Rig:
    """All endpoints up, and clients that are trusted."""
    fakes = {name: FakeTriton(**fake) for name in names}
    document = document or plan_document(names)
    orchestrator = Orchestrator(
        lambda: plan(document), cluster(names), repository=repository, backends=dict(fakes), max_work=max_work
    )
    rig = Rig(orchestrator, fakes, document)
    await rig.probe()
    return rig
