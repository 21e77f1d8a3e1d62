"""Start, watch and stop one local tritonserver process."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib.util
import os
import re
import shutil
import socket
import sys
import sysconfig
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING

import aiohttp

from cascadeserve.cluster import CpuDevice, GpuDevice
from cascadeserve.errors import ServerStartFailed, UsageError
from cascadeserve.process import spawn, stop

if TYPE_CHECKING:
    from cascadeserve.cluster import Endpoint

# Triton waits this long for requests in flight when it is told to stop
EXIT_TIMEOUT_S = 5
# then it gets this much longer to unload before it is killed
KILL_AFTER_S = EXIT_TIMEOUT_S + 10
_READY_POLL_S = 0.05
# shared memory of the Python-based backend; a younger file may belong to a server that is just starting
_REGION = "/dev/shm/triton_onnxruntime_backend_shm_region_"  # noqa: S108 - where Triton puts it
_STALE_AFTER_S = 60.0
_SAFE_PATH = re.compile(r"[A-Za-z0-9_./+@=,:-]+")


class LocalTriton:
    """One tritonserver on loopback, serving a working copy to the endpoint's device.

    It dies with the process that started it, also when that is killed with SIGKILL. `start` must be called from the
    main thread: the kernel ties the child to the thread that made it.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        repository: Path,
        models: list[str],
        state: Path,
        log: IO[bytes] | None = None,
        config_name: str | None = None,
    ) -> None:
        """`repository` is the working copy; `log` None leaves the server's output on this process's stderr.

        Of every model the config `configs/<config_name>.pbtxt` is served, the endpoint's own unless another is named,
        and its `config.pbtxt` where it has none of that name.
        """
        self.endpoint = endpoint
        self._config_name = config_name or endpoint.name
        self._repository = repository
        self._models = models
        self._state = state
        self._log = log
        # what stands in the log already is of earlier runs
        self._log_start_bytes = 0
        self._process: asyncio.subprocess.Process | None = None
        self._id = f"cascadeserve-{uuid.uuid4()}"
        if not _SAFE_PATH.fullmatch(str(state)):
            raise UsageError(
                f"the state directory {state} has characters that Triton's python backend hands to a shell; choose a "
                "--state of letters, digits and _./+@=,:-"
            )
        if isinstance(endpoint.device, CpuDevice) and (absent := set(endpoint.device.cores) - os.sched_getaffinity(0)):
            raise UsageError(f"endpoint {endpoint.name!r}: this process may not run on core {min(absent)}; name others")
        for field in ("grpc", "http", "metrics"):
            host = getattr(endpoint, field).rpartition(":")[0]
            if host not in ("127.0.0.1", "localhost"):
                raise UsageError(
                    f"endpoint {endpoint.name!r}: {field} is at {host}, but the local tritonserver is served on "
                    "127.0.0.1 only (its version has known security holes); use a container for other addresses"
                )

    @property
    def started(self) -> bool:
        """Whether there is a process, running or ended, that was not stopped by us."""
        return self._process is not None

    @property
    def pid(self) -> int:
        """Process id of the server."""
        if self._process is None:
            raise RuntimeError("not started")
        return self._process.pid

    def command(self) -> list[str]:
        """The server's command line."""
        program = _wheel_folder() / "bin" / "tritonserver"
        http, grpc, metrics = (getattr(self.endpoint, kind).rpartition(":")[2] for kind in ("http", "grpc", "metrics"))
        arguments = [
            str(program),
            f"--model-repository={self._repository}",
            # told apart by it from another server that has the port already
            f"--id={self._id}",
            "--model-control-mode=explicit",
            # one model that loads or fails must not make the others look unready
            "--strict-readiness=false",
            *(f"--load-model={model}" for model in self._models),
            f"--model-config-name={self._config_name}",
            "--disable-auto-complete-config",
            f"--backend-directory={prepare_backends(self._state)}",
            f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
            "--http-address=127.0.0.1",
            f"--http-port={http}",
            "--grpc-address=127.0.0.1",
            f"--grpc-port={grpc}",
            "--metrics-address=127.0.0.1",
            f"--metrics-port={metrics}",
        ]
        if isinstance(self.endpoint.device, CpuDevice):
            arguments.append("--allow-gpu-metrics=false")
        return arguments

    async def start(self, *, ready_timeout_s: float = 120.0) -> None:
        """Start the server and wait until it is ready.

        Raises:
            ServerStartFailed: one of its ports is taken, there is no GPU for it, it ended or was not ready in time; it
                is gone then.

        """
        self._check_machine()
        if self._log is not None:
            self._log_start_bytes = os.fstat(self._log.fileno()).st_size
        _remove_stale_regions()
        cores = self.endpoint.device.cores if isinstance(self.endpoint.device, CpuDevice) else ()
        self._process = await spawn(self.command(), cores=cores, environment=self._environment(), log=self._log)
        try:
            await self._wait_ready(ready_timeout_s)
        except BaseException:
            await self.stop()
            raise

    async def wait(self) -> int:
        """Wait until the server has ended; returns its exit status."""
        if self._process is None:
            raise RuntimeError("not started")
        return await self._process.wait()

    async def stop(self) -> None:
        """End the server: ask, wait, kill what is left of its process group, and reap it."""
        if self._process is None:
            return
        regions = _mapped_regions(self._process.pid)
        await stop(self._process, kill_after_s=KILL_AFTER_S)
        self._process = None
        # A server that was killed leaves the memory it shared with its stubs behind.
        for region in regions:
            region.unlink(missing_ok=True)

    def _check_machine(self) -> None:
        """Refuse what Triton itself would end with, but say only in the midst of its log."""
        where = f"endpoint {self.endpoint.name!r}"
        for field in ("http", "grpc", "metrics"):
            address = getattr(self.endpoint, field)
            try:
                # like a server: a port whose last connections are just closing is free
                socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))).close()
            except OSError as error:
                raise ServerStartFailed(
                    f"{where}: its {field} address {address} cannot be listened on ({os.strerror(error.errno or 0)}); "
                    "end what uses it, or give another port in the cluster file"
                ) from error
        if isinstance(self.endpoint.device, GpuDevice):
            try:
                ctypes.CDLL("libcuda.so.1")
            except OSError as error:
                raise ServerStartFailed(
                    f"{where}: its device is a GPU, but no NVIDIA driver is found here (libcuda.so.1); give it one of "
                    'kind "cpu" in the cluster file, or run it on a machine that has one'
                ) from error

    async def _wait_ready(self, timeout_s: float) -> None:
        url = f"http://{self.endpoint.http}/v2"
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + timeout_s
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2.0)) as session:
            while loop.time() < give_up_s:
                if self._process is not None and self._process.returncode is not None:
                    raise ServerStartFailed(
                        f"tritonserver of endpoint {self.endpoint.name!r} ended with status "
                        f"{self._process.returncode} while starting{self._reason()}"
                    )
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    async with session.get(f"{url}/health/ready") as ready, session.get(url) as about:
                        if ready.status == 200 and (await about.json())["name"] == self._id:  # noqa: PLR2004
                            return
                await asyncio.sleep(_READY_POLL_S)
        raise ServerStartFailed(
            f"tritonserver of endpoint {self.endpoint.name!r} was not ready within {timeout_s:g} s{self._reason()}"
        )

    def _reason(self) -> str:
        if self._log is None:
            return "; what it printed above says why"
        return f": {_last_words(Path(self._log.name).read_bytes()[self._log_start_bytes :])}"

    def _environment(self) -> dict[str, str]:
        """Environment in which the Python stub runs this interpreter's standard library and packages."""
        environment = dict(os.environ)
        # the stub, copied out of the wheel, needs the libraries that travel with it, and this interpreter's libpython
        wheel_libraries = str(_wheel_folder().parent.parent / "nvidia_pytriton.libs")
        library_folders = [wheel_libraries, sysconfig.get_config_var("LIBDIR"), environment.get("LD_LIBRARY_PATH")]
        environment |= {
            "LD_LIBRARY_PATH": ":".join(filter(None, library_folders)),
            # The stub embeds an interpreter that ignores PYTHONPATH and PYTHONHOME; it finds its packages as a virtual
            # environment does, through the first `python3` on the path.
            "PATH": f"{Path(sys.executable).parent}:{environment.get('PATH', os.defpath)}",
            "PYTHONNOUSERSITE": "1",
            "ORT_DISABLE_TELEMETRY": "1",
        }
        if isinstance(self.endpoint.device, GpuDevice):
            environment["CUDA_VISIBLE_DEVICES"] = str(self.endpoint.device.index)
        return environment


def _last_words(log: bytes) -> str:
    """Line of a server's log that says most: its last error, or else its last line."""
    lines = [line.strip() for line in log.decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"E\d{4} |error", line)]
    last = (errors or lines or ["its log is empty"])[-1]
    return re.sub(r"^E\d{4} .*?\] ", "", last).strip('"')


def prepare_backends(state: Path) -> Path:
    """Lay out `<state>/backends`: Triton's python backend with this Python's stub, and ours beside it."""
    wheel = _wheel_folder()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = wheel / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        raise UsageError(f"nvidia-pytriton carries no python backend stub for Python {version}; use 3.11 or 3.12")
    backends = state / "backends"
    wanted = {
        "python/libtriton_python.so": wheel / "backends" / "python" / "libtriton_python.so",
        "python/triton_python_backend_utils.py": wheel / "backends" / "python" / "triton_python_backend_utils.py",
        "python/triton_python_backend_stub": stub,
        "onnxruntime/model.py": Path(__file__).with_name("onnxruntime_backend") / "model.py",
    }
    for name, source in wanted.items():
        target = backends / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.stat().st_mtime_ns != source.stat().st_mtime_ns:
            # A copy, because the stub looks for its library beside the real file; renamed in, because a server may
            # be running the old one.
            staging = target.with_name(f".{target.name}.{os.getpid()}")
            shutil.copy2(source, staging)
            staging.replace(target)
    return backends


def _mapped_regions(group: int | None = None) -> set[Path]:
    """Files of Triton's python backend under /dev/shm that processes (of a process group) have mapped."""
    regions: set[Path] = set()
    for process in Path("/proc").glob("[0-9]*"):
        # any of these processes may end while we look, or belong to somebody else
        with contextlib.suppress(OSError):
            if group is None or os.getpgid(int(process.name)) == group:
                files = (line.rpartition(" ")[2] for line in (process / "maps").read_text().splitlines())
                regions |= {Path(file) for file in files if file.startswith(_REGION)}
    return regions


def _remove_stale_regions() -> None:
    """Remove shared memory that servers which crashed left behind: ours, old, and mapped by nobody."""
    mapped = _mapped_regions()
    for region in Path(_REGION).parent.glob(f"{Path(_REGION).name}*"):
        with contextlib.suppress(OSError):
            status = region.stat()
            is_old = datetime.now(UTC).timestamp() - status.st_mtime > _STALE_AFTER_S
            if region not in mapped and is_old and status.st_uid == os.getuid():
                region.unlink()


def _wheel_folder() -> Path:
    found = importlib.util.find_spec("pytriton")
    if found is None or not found.submodule_search_locations:
        raise UsageError("no local tritonserver is installed; install it with `pip install 'cascadeserve[local]'`")
    return Path(found.submodule_search_locations[0]) / "tritonserver"
