"""`cascadeserve triton`."""

from __future__ import annotations

import asyncio
import signal
from contextlib import suppress
from pathlib import Path

import click

from cascadeserve.cluster import CpuDevice, read_cluster
from cascadeserve.endpoint_config import endpoint_config_path
from cascadeserve.errors import ServerStartFailed, UsageError
from cascadeserve.local_triton.server import LocalTriton
from cascadeserve.local_triton.working_copy import model_names, prepare_working_copy
from cascadeserve.triton_config import has_tensorrt_accelerator, read_config


@click.command()
@click.option("--cluster", "cluster_path", type=click.Path(path_type=Path), required=True, help="Cluster file.")
@click.option("--endpoint", "endpoint_name", default=None, help="Endpoint to run; may be left out if there is one.")
@click.option("--repository", type=click.Path(path_type=Path), default="model_repository", show_default=True)
@click.option("--state", type=click.Path(path_type=Path), default=".cascadeserve", show_default=True)
@click.option("--model", "models", multiple=True, help="Model to load at start, repeatable [default: all].")
@click.option("--config-name", default=None, help="Serve the repository's configs/<NAME>.pbtxt, not the endpoint's.")
def triton(
    cluster_path: Path,
    endpoint_name: str | None,
    repository: Path,
    state: Path,
    models: tuple[str, ...],
    config_name: str | None,
) -> None:
    """Run the tritonserver of one endpoint in the foreground until it is interrupted.

    It serves a working copy of the repository under the state directory, on loopback, pinned to the endpoint's cores.
    With --config-name it serves models as somebody else configured them (a baseline to compare with); a model without
    a config of that name is served by its config.pbtxt. Models made for TensorRT are left out on a CPU.
    """
    cluster = read_cluster(cluster_path)
    names = [endpoint.name for endpoint in cluster.endpoints]
    if endpoint_name is None and len(names) > 1:
        raise UsageError(f"--endpoint: the cluster has several endpoints, name one of {', '.join(names)}")
    if endpoint_name is not None and endpoint_name not in names:
        raise UsageError(f"--endpoint: {endpoint_name!r} is not in {cluster_path}; endpoints are {', '.join(names)}")
    known = model_names(repository)
    if unknown := sorted(set(models) - set(known)):
        raise UsageError(f"--model: {unknown[0]!r} is not in {repository}; models are {', '.join(known)}")
    if config_name is not None and not any(
        endpoint_config_path(repository, model, config_name).exists() for model in models or known
    ):
        raise UsageError(f"--config-name: no model to load has a configs/{config_name}.pbtxt in {repository}")
    endpoint = cluster.endpoint(endpoint_name or names[0])
    served = list(models) or known
    if isinstance(endpoint.device, CpuDevice):
        served = _without_tensorrt(repository, served, endpoint.name, named=bool(models))
    state = state.resolve()
    server = LocalTriton(
        endpoint,
        repository=prepare_working_copy(repository, cluster, state),
        models=served,
        state=state,
        config_name=config_name,
    )
    asyncio.run(_run(server))


@click.command()
@click.option("--cluster", "cluster_path", type=click.Path(path_type=Path), required=True, help="Cluster file.")
@click.option("--repository", type=click.Path(path_type=Path), default="model_repository", show_default=True)
@click.option("--state", type=click.Path(path_type=Path), default=".cascadeserve", show_default=True)
def prepare(cluster_path: Path, repository: Path, state: Path) -> None:
    """Write the working copy of a repository for servers that are started elsewhere (containers).

    It is `<state>/model_repository`, with `configs/<endpoint>.pbtxt` for every endpoint of the cluster; start each
    server on it with `--model-config-name=<endpoint>`. Safe to run again while servers run.
    """
    click.echo(prepare_working_copy(repository, read_cluster(cluster_path), state.resolve()))


def _without_tensorrt(repository: Path, models: list[str], endpoint: str, *, named: bool) -> list[str]:
    """Models that a CPU can serve as they were recorded; there ONNX Runtime would run the others without TensorRT."""
    on_gpu = [model for model in models if has_tensorrt_accelerator(read_config(repository / model / "config.pbtxt"))]
    if on_gpu and (named or len(on_gpu) == len(models)):
        raise UsageError(
            f"model {on_gpu[0]!r} is made for TensorRT, which needs a GPU, and endpoint {endpoint!r} is a CPU; choose "
            "others with --model, or another --endpoint"
        )
    if on_gpu:
        click.echo(f"not served on endpoint {endpoint!r}, a CPU: {', '.join(on_gpu)} (made for TensorRT)", err=True)
    return [model for model in models if model not in on_gpu]


async def _run(server: LocalTriton) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    stopping = asyncio.create_task(stop.wait(), name="stop-signal")
    try:
        starting = asyncio.create_task(server.start(), name="start-triton")
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            starting.cancel()
            with suppress(asyncio.CancelledError):
                await starting
            return
        await starting
        click.echo(f"ready: {server.endpoint.name} http {server.endpoint.http} grpc {server.endpoint.grpc}", err=True)
        ended = asyncio.create_task(server.wait(), name="watch-triton")
        await asyncio.wait({ended, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not stop.is_set():
            raise ServerStartFailed(f"tritonserver ended by itself with status {ended.result()}")
    finally:
        stopping.cancel()
        await server.stop()
