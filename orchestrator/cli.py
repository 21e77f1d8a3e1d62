"""`cascadeserve serve`."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cascadeserve.cluster import read_cluster
from cascadeserve.errors import InvalidArtefact, UsageError
from cascadeserve.gear_plan import read_gear_plan
from cascadeserve.plan_fits import check_plan_fits_repository
from orchestrator.app import serve as run_serve
from orchestrator.front_door import ServeSettings
from orchestrator.lease import lease
from orchestrator.request_options import MAX_WORK
from orchestrator.wire.limits import MAX_ROWS, Limits
from orchestrator.wire.tls import TlsFiles

if TYPE_CHECKING:
    from cascadeserve.gear_plan import GearPlan

_LIMITS = Limits()


@click.command()
@click.option("--plan", "plan_path", type=click.Path(path_type=Path), required=True, help="Gear plan.")
@click.option("--cluster", "cluster_path", type=click.Path(path_type=Path), required=True, help="Cluster file.")
@click.option(
    "--repository", type=click.Path(path_type=Path), default=None,
    help="Repository that the endpoints serve; without it instance counts are never changed.",
)  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--http-port", type=click.IntRange(1, 65535), default=8080, show_default=True)
@click.option("--grpc-port", type=click.IntRange(1, 65535), default=8081, show_default=True)
@click.option(
    "--fronts", type=click.IntRange(0, 64), default=0, show_default=True,
    help="Processes that listen, parse and render in front of the dispatcher; 0: the dispatcher does so itself.",
)  # fmt: skip
@click.option("--max-request-bytes", type=click.IntRange(min=1), default=64 << 20, show_default=True)
@click.option("--max-rows", type=click.IntRange(min=1), default=MAX_ROWS, show_default=True, help="Of one request.")
@click.option(
    "--max-work", type=click.FloatRange(min=1.0), default=MAX_WORK, show_default=True,
    help="What a row may claim with the parameter `work`, in rows of the profile; for clients that are trusted.",
)  # fmt: skip
@click.option(
    "--max-listed-elements", type=click.IntRange(min=1), default=_LIMITS.max_listed_elements, show_default=True,
    help="Elements of one request in JSON, in typed gRPC contents or of text.",
)  # fmt: skip
@click.option(
    "--max-connections", type=click.IntRange(min=1), default=_LIMITS.max_connections, show_default=True,
    help="Open at a time, by each transport and each front; as many gRPC calls.",
)  # fmt: skip
@click.option(
    "--max-received-bytes", type=click.IntRange(min=1), default=_LIMITS.max_received_bytes, show_default=True,
    help="Of all HTTP requests that are not complete yet, in each front.",
)  # fmt: skip
@click.option(
    "--client-timeout", "client_timeout_s", type=click.FloatRange(min=0.1), default=_LIMITS.client_timeout_s,
    show_default=True, help="Seconds for each 64 KiB that a client sends of a request, or reads of an answer; HTTP.",
)  # fmt: skip
@click.option(
    "--tls-cert", type=click.Path(path_type=Path), default=None,
    help="Speak TLS with this certificate (PEM, with its chain); the files are read again when they change.",
)  # fmt: skip
@click.option("--tls-key", type=click.Path(path_type=Path), default=None, help="Its key (PEM, without a password).")
@click.option(
    "--tls-client-ca", type=click.Path(path_type=Path), default=None,
    help="Let in only clients with a certificate that one of these has signed (PEM).",
)  # fmt: skip
@click.option(
    "--linger", "linger_s", type=click.FloatRange(min=0.0), default=1.0, show_default=True,
    help="Seconds after a stop signal in which open connections are still answered.",
)  # fmt: skip
@click.option(
    "--drain", "drain_s", type=click.FloatRange(min=0.0), default=10.0, show_default=True,
    help="Seconds that requests in flight may take after that.",
)  # fmt: skip
def serve(
    plan_path: Path,
    cluster_path: Path,
    repository: Path | None,
    host: str,
    http_port: int,
    grpc_port: int,
    fronts: int,
    max_request_bytes: int,
    max_rows: int,
    max_work: float,
    max_listed_elements: int,
    max_connections: int,
    max_received_bytes: int,
    client_timeout_s: float,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    linger_s: float,
    drain_s: float,
) -> None:
    """Serve the cascades of a gear plan as one KServe v2 server, over HTTP and gRPC.

    At SIGHUP the plan is read again: what it needs is loaded beside what serves, and it comes into force without a
    pause. A plan that is wrong or cannot be loaded is refused in the log, and the one in force stays. With --repository
    no other orchestrator may steer the same endpoints.
    """
    tls = _tls_files(tls_cert, tls_key, tls_client_ca)
    cluster = read_cluster(cluster_path)
    if repository is not None and not repository.is_dir():
        raise InvalidArtefact("is no folder; give the repository that the endpoints serve", path=repository)

    def read_plan() -> GearPlan:
        plan = read_gear_plan(plan_path, cluster)
        if repository is not None:
            check_plan_fits_repository(plan, repository, path=plan_path)
        return plan

    limits = Limits(max_listed_elements, max_connections, max_received_bytes, client_timeout_s)
    settings = ServeSettings(
        host, http_port, grpc_port, max_request_bytes, linger_s, drain_s, fronts, max_rows, max_work, limits, tls
    )
    names = [endpoint.name for endpoint in cluster.endpoints]
    with nullcontext() if repository is None else lease(repository, names):
        asyncio.run(run_serve(read_plan, cluster, settings, repository=repository))


def _tls_files(certificate: Path | None, key: Path | None, client_ca: Path | None) -> TlsFiles | None:
    if certificate is not None and key is not None:
        return TlsFiles(certificate, key, client_ca)
    if certificate is None and key is None and client_ca is None:
        return None
    raise UsageError("--tls-cert and --tls-key belong together, and --tls-client-ca needs both; give what is missing")
