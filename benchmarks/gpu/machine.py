"""What the tools say of the machine: no host names, no paths."""

from __future__ import annotations

import datetime as dt
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Literal

from benchmarks.gpu.client import BenchmarkFailed
from benchmarks.gpu.result import Machine

_QUERY = ("nvidia-smi", "--id=0", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits")


def describe(device: Literal["gpu", "cpu"], tritonserver: str) -> Machine:
    """Describe this machine and, if `device` is one, its first GPU."""
    import torch  # noqa: PLC0415 - takes seconds; imported by then

    name, driver, memory = query_gpu() if device == "gpu" else (None, None, None)
    return Machine(
        device=device,
        gpu=name,
        gpu_memory_mib=None if memory is None else int(memory),
        driver=driver,
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        python=platform.python_version(),
        torch=str(torch.__version__),
        cuda=torch.version.cuda if device == "gpu" else None,
        tritonserver=tritonserver,
        date=dt.datetime.now(tz=dt.UTC).date().isoformat(),
    )


def query_gpu() -> tuple[str, str, str]:
    """Name, driver version and memory in MiB of the first GPU.

    Raises:
        BenchmarkFailed: there is none.

    """
    try:
        done = subprocess.run(_QUERY, check=True, capture_output=True, text=True, timeout=30)
        name, driver, memory = (part.strip() for part in done.stdout.strip().split(","))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise BenchmarkFailed("nvidia-smi shows no GPU; use --device cpu --quick to try the script without") from error
    return name, driver, memory


def slug(text: str) -> str:
    """Text as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()
