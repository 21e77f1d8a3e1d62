"""Builds TensorRT engines of the digits network on a GPU and verifies it: `python -m benchmarks.gpu.tensorrt`.

What a user would do: the variant `tensorrt` is exported, a tritonserver on the first GPU loads it, which builds the
engines at its warm-up, and `cascadeserve verify` holds its answers against PyTorch's. Needs onnxruntime-gpu and the
package tensorrt; where they are not, it says so, ends with status 1 and writes nothing.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # must be set before the import

import click
import onnxruntime as ort

from benchmarks.gpu.machine import query_gpu
from cascadeserve.artefacts import write_json
from cascadeserve.cluster import Cluster, Endpoint, GpuDevice
from cascadeserve.demo.offline import run_command
from cascadeserve.local_stack import free_ports
from cascadeserve.local_triton.server import LocalTriton
from cascadeserve.local_triton.working_copy import prepare_working_copy
from cascadeserve.triton_config import read_config
from examples.digits.family import family as digits

_NAME = "digits_resnet_tensorrt"
_REFERENCE = "benchmarks.gpu.tensorrt:family"
_BUILD_TIMEOUT_S = 400.0

family = replace(
    digits,
    models=tuple(
        replace(each, name=_NAME, variant="tensorrt") for each in digits.models if each.name == "digits_resnet"
    ),
)


def missing() -> str | None:
    """What this machine lacks; None if TensorRT can be tried."""
    if "TensorrtExecutionProvider" not in ort.get_available_providers():
        return "onnxruntime here has no TensorRT provider; install onnxruntime-gpu"
    try:
        importlib.metadata.version("tensorrt")
    except importlib.metadata.PackageNotFoundError:
        return "the package tensorrt is not installed"
    return None if shutil.which("nvidia-smi") else "there is no NVIDIA driver"


async def _measure(folder: Path) -> dict[str, object]:
    repository, state = folder / "repository", folder / "state"
    await run_command("export", _REFERENCE, f"--repository={repository}")
    config = read_config(repository / _NAME / "config.pbtxt")
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    cache = Path(accelerator.parameters["trt_engine_cache_path"])
    shutil.rmtree(cache, ignore_errors=True)  # engines of an earlier run say nothing
    http, grpc, metrics = (f"127.0.0.1:{port}" for port in free_ports(3))
    endpoint = Endpoint(name="gpu", http=http, grpc=grpc, metrics=metrics, device=GpuDevice())
    copy = prepare_working_copy(repository, Cluster(schema_version=1, endpoints=(endpoint,)), state)
    with (state / "triton.log").open("wb") as log:
        server = LocalTriton(endpoint, repository=copy, models=[_NAME], state=state, log=log)
        began_s = time.monotonic()
        try:
            await server.start(ready_timeout_s=_BUILD_TIMEOUT_S)
            ready_s = time.monotonic() - began_s
            await run_command("verify", _REFERENCE, f"--repository={repository}", f"--url={grpc}")
        finally:
            await server.stop()
    engine_bytes = [engine.stat().st_size for engine in cache.glob("*.engine")]  # noqa: ASYNC240 - nothing else runs
    gpu, driver, _ = query_gpu()
    return {
        "gpu": gpu,
        "driver": driver,
        "tensorrt": importlib.metadata.version("tensorrt"),
        "onnxruntime": ort.__version__,
        "ready_s": ready_s,
        "engines": len(engine_bytes),
        "engine_bytes": sum(engine_bytes),
        "verified": True,
    }


@click.command()
@click.option("--result", type=click.Path(path_type=Path), default="benchmarks/results/local/tensorrt.json")
def main(result: Path) -> None:
    """Build, verify, write what came of it."""
    if (lack := missing()) is not None:
        click.echo(f"TensorRT is not tried: {lack}", err=True)
        sys.exit(1)
    with tempfile.TemporaryDirectory(prefix="tensorrt-") as folder:
        found = asyncio.run(_measure(Path(folder)))
    write_json(result, found)
    click.echo(f"{found['engines']} engines after {found['ready_s']:.0f} s, verified on a {found['gpu']}")


if __name__ == "__main__":
    main()
