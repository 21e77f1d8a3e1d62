"""One cascade served without the orchestrator, in forms that `cascadeserve.demo.measuring.System` takes for a stack."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec
import numpy as np

from cascadeserve.artefacts import write_atomically, write_json
from cascadeserve.demo.family import FAMILY, REPOSITORY
from cascadeserve.endpoint_config import endpoint_config_path
from cascadeserve.local_stack import TRITON_CORE, LocalStack, free_ports, run_replay, wait_ready
from cascadeserve.process import spawn, stop
from cascadeserve.triton_config import format_config, parse_config, with_instance_count

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from numpy.typing import NDArray

    from cascadeserve.gear_plan import Stage, Trigger
    from cascadeserve.report import ServingReport

BLS_MODEL = "cascade_bls"
_BLS_PROGRAM = Path(__file__).with_name("bls") / "model.py"
_BLS_CONFIG = f"""
name: "{BLS_MODEL}"
backend: "python"
default_model_filename: "model.py"
max_batch_size: 64
input {{ name: "image" data_type: TYPE_FP32 dims: [1, 32, 32] }}
output {{ name: "label" data_type: TYPE_INT64 dims: [1] }}
output {{ name: "certainty" data_type: TYPE_FP32 dims: [1] }}
output {{ name: "stage" data_type: TYPE_INT32 dims: [1] }}
dynamic_batching {{ }}
"""
_RAY_PROGRAM = Path(__file__).with_name("ray_cascade.py")
# it starts a head node, and then a process for every deployment
_RAY_START_S, _RAY_STOP_S = 180.0, 60.0
_RAY_ENVIRONMENT = {
    "ORT_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # what its documentation says for the highest throughput: gRPC between replicas, fewer threads, HAProxy as the proxy
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
}


def bls_stack(state: Path, stages: Sequence[Stage], instances: int) -> LocalStack:
    """Triton alone with a cascade in business logic scripting, `instances` times, and the models it asks.

    All of them are batched by Triton's dynamic batcher.
    """
    repository = state / "model_repository"
    shutil.rmtree(repository, ignore_errors=True)
    for stage in stages:
        source = REPOSITORY / stage.model
        config = parse_config((source / "config.pbtxt").read_text(), path=source / "config.pbtxt")
        config.dynamic_batching.SetInParent()
        shutil.copytree(source / "1", repository / stage.model / "1")
        write_atomically(repository / stage.model / "config.pbtxt", format_config(config).encode())
    config = parse_config(_BLS_CONFIG, path=_BLS_PROGRAM)
    told = msgspec.json.encode([(stage.model, stage.threshold) for stage in stages])
    config.parameters["stages"].string_value = told.decode()
    shutil.copytree(_BLS_PROGRAM.parent, repository / BLS_MODEL / "1", ignore=shutil.ignore_patterns("__pycache__"))
    write_atomically(repository / BLS_MODEL / "config.pbtxt", format_config(config).encode())
    # the config of an endpoint has one instance; one of another name is served as it is
    own = endpoint_config_path(repository, BLS_MODEL, "own")
    own.parent.mkdir()
    write_atomically(own, format_config(with_instance_count(config, instances, kind="cpu")).encode())
    models = [*dict.fromkeys(stage.model for stage in stages), BLS_MODEL]
    return LocalStack(state, repository=repository, models=models, config_name="own")


def ray_is_missing(python: str) -> str | None:
    """Say what keeps an interpreter from running the Ray Serve composition; None if nothing does."""
    try:
        run = subprocess.run(
            [python, "-c", "import onnxruntime, ray.serve"], capture_output=True, text=True, check=False
        )
    except OSError as error:
        return f"{python} cannot be run ({error.strerror})"
    return None if run.returncode == 0 else f"{python}: {run.stderr.strip().splitlines()[-1]}"


class RayStack:
    """A Ray Serve composition of the stages: sessions on Triton's core, the rest of Ray on the others."""

    def __init__(self, state: Path, python: str, stages: Sequence[Stage], triggers: Mapping[str, Trigger]) -> None:
        """`python` is an interpreter that has `ray[serve]`; stages are batched by `triggers`, by model."""
        self._state = state
        self._python = python
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        self._asked = {
            "name": FAMILY,
            "port": port,
            "model_core": TRITON_CORE,
            "row_shape": [1, 32, 32],
            "stages": [
                {
                    "model": str((REPOSITORY / stage.model / "1" / "model.onnx").resolve()),
                    "threshold": stage.threshold,
                    "max_batch": triggers[stage.model].max_batch,
                    "max_wait_s": triggers[stage.model].max_wait_s,
                }
                for stage in stages
            ],
        }
        self._other_cores = sorted(os.sched_getaffinity(0) - {TRITON_CORE}) or [TRITON_CORE]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """See `LocalStack.running`."""
        self._state.mkdir(parents=True, exist_ok=True)
        asked, path = self._state / "asked.json", self._state / "ray.log"
        # the names of its sockets must be short
        with (
            tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temporary,
            path.open("wb") as log,
        ):
            write_json(asked, self._asked | {"temporary": temporary})
            # a token of its own: else Ray makes one and leaves it in the home directory
            own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
            ray = await spawn(
                [self._python, str(_RAY_PROGRAM), str(asked)],
                cores=self._other_cores,
                environment=os.environ | _RAY_ENVIRONMENT | own,
                log=log,
            )
            try:
                await wait_ready(self.url, ray, timeout_s=_RAY_START_S, log=path)
                yield
            finally:
                await stop(ray, kill_after_s=_RAY_STOP_S)

    async def replay(
        self, output: Path, url: str, model: str, rows: Path, *options: str, log: IO[bytes] | None = None
    ) -> tuple[ServingReport, dict[str, NDArray[Any]]]:
        """See `LocalStack.replay`."""
        records = output.with_suffix(".npz")
        command = [f"--url={url}", f"--model={model}", f"--rows={rows}", f"--records={records}", *options]
        report = await run_replay(
            output.with_suffix(".json"), *command, cores=self._other_cores, log=log, before_others=True
        )
        with np.load(records) as arrays:
            return report, {name: arrays[name] for name in arrays.files}
