"""Front processes: started, killed, started again, stopped."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import pytest
import tritonclient.grpc.aio

from cascadeserve.errors import InvalidArtefact, ServerStartFailed
from orchestrator.fronts import hub as hub_module
from orchestrator.metrics import Metrics
from orchestrator.wire.limits import Limits
from orchestrator.wire.tls import TlsFiles
from tests.fakes.servers import Process, Stack, is_alive, wait_until_ready
from tests.fakes.tiny import plan_document
from tests.orchestrator.fronts.conftest import IMAGE, ClosableEcho, hub_over, settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from orchestrator.fronts.hub import Hub


@asynccontextmanager
async def kept(hub: Hub) -> AsyncIterator[None]:
    await hub.open()
    keeping = asyncio.create_task(hub.run())
    try:
        yield
    finally:
        await hub.close()
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)


def pids(hub: Hub) -> list[int]:
    return [front._process.pid for front in hub._fronts if front._process is not None]


async def post(port: int) -> int:
    """Status of one inference over a connection of its own; 0 if it was cut."""
    url = f"http://127.0.0.1:{port}/v2/models/echo/infer"
    head = b'{"inputs":[{"name":"image","shape":[2,1,32,32],"datatype":"FP32","parameters":{"binary_data_size":8192}}],'
    head += b'"outputs":[{"name":"image","parameters":{"binary_data":true}}]}'
    headers = {"Inference-Header-Content-Length": str(len(head))}
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.post(url, data=head + IMAGE.tobytes(), headers=headers) as response,
        ):
            body = await response.read()
            if response.status == 200:
                assert body.endswith(IMAGE.tobytes())
            return response.status
    except aiohttp.ClientConnectionError:
        return 0


@pytest.mark.timeout(120)
async def test_the_life_of_two_fronts(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "RESTART_AFTER_S", 0.05)
    caplog.set_level(logging.INFO)
    echo, wanted = ClosableEcho(), settings()
    hub = hub_over(echo, wanted, Metrics())
    async with kept(hub):
        assert await asyncio.gather(*(post(wanted.http_port) for _ in range(20))) == [200] * 20
        client = tritonclient.grpc.aio.InferenceServerClient(f"127.0.0.1:{wanted.grpc_port}")
        tensor = tritonclient.grpc.InferInput("image", list(IMAGE.shape), "FP32").set_data_from_numpy(IMAGE)
        output = tritonclient.grpc.InferRequestedOutput("image")
        assert ((await client.infer("echo", [tensor], outputs=[output])).as_numpy("image") == IMAGE).all()
        await client.close()

        # one of them dies with a request open: that one is cancelled, the other goes on, it is started again
        echo.started.clear()
        echo.delay_s = 60.0
        doomed = asyncio.create_task(post(wanted.http_port))
        await echo.started.wait()
        echo.delay_s = 0.0
        (victim,) = [front for front in hub._fronts if front._open]
        dead = victim._process
        assert dead is not None
        os.kill(dead.pid, signal.SIGKILL)
        assert await doomed == 0
        await dead.wait()  # from now on its socket takes no connections
        await echo.cancelled.wait()
        assert await asyncio.gather(*(post(wanted.http_port) for _ in range(20))) == [200] * 20
        await asyncio.sleep(0.1)
        async with asyncio.timeout(60):
            await victim._listening.wait()
        (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert line.startswith(f"front {victim.number} ended with status -9, 1 open requests dropped; starting")
        assert victim._process is not dead

        # told to stop, they answer what is open first
        echo.started.clear()
        echo.delay_s = 0.5
        last = asyncio.create_task(post(wanted.http_port))
        await echo.started.wait()
        ending = pids(hub)
        await hub.close()
        assert await last == 200
        assert not any(map(is_alive, ending))
        assert await post(wanted.http_port) == 0


@pytest.mark.parametrize("which", ["http", "grpc"])
async def test_a_port_that_somebody_listens_on_is_refused_even_if_it_is_shared(which: str) -> None:
    wanted = settings()
    port = wanted.http_port if which == "http" else wanted.grpc_port
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(ServerStartFailed, match=f"cannot listen on 127.0.0.1:{port} .*--{which}-port$"):
            await hub_over(ClosableEcho(), wanted, Metrics()).open()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
async def test_fronts_speak_tls_and_keep_to_the_limits(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
               "-keyout", key, "-out", certificate, "-subj", "/CN=front", "-addext", "subjectAltName=IP:127.0.0.1",
               "-days", "2"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)  # noqa: ASYNC221 - nothing else runs yet
    wanted = settings(fronts=1, tls=TlsFiles(certificate, key), limits=Limits(max_listed_elements=10))
    async with kept(hub_over(ClosableEcho(), wanted, Metrics())):
        context = ssl.create_default_context(cafile=str(certificate))
        body = {"inputs": [{"name": "image", "datatype": "FP32", "shape": [11], "data": [0.0] * 11}]}
        async with aiohttp.ClientSession(f"https://127.0.0.1:{wanted.http_port}") as session:
            async with session.post("/v2/models/echo/infer", json=body, ssl=context) as response:
                assert (response.status, "more than 10 values" in await response.text()) == (413, True)
            async with session.get("/v2/models/echo/stats", ssl=context) as response:
                assert (await response.json())["model_stats"][0]["name"] == "echo"
        client = tritonclient.grpc.aio.InferenceServerClient(
            f"127.0.0.1:{wanted.grpc_port}", ssl=True, root_certificates=str(certificate)
        )
        assert (await client.get_model_config("echo")).config.name == "echo"
        await client.close()


async def test_files_for_tls_that_cannot_be_used_are_refused_before_any_front_is_started(tmp_path: Path) -> None:
    hub = hub_over(ClosableEcho(), settings(tls=TlsFiles(tmp_path / "none", tmp_path / "none")), Metrics())
    with pytest.raises(InvalidArtefact, match="none: cannot be read"):
        await hub.open()
    assert not pids(hub)


def children_of(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(entry.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(entry.parent.name))
    return found


def test_fronts_refuse_and_end_when_their_dispatcher_is_killed(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(plan_document()))
    stack = Stack(tmp_path, tmp_path, plan, ("a",))  # its Triton is not started: there is nothing to answer with
    ports = [f"--http-port={stack.http_port}", f"--grpc-port={stack.grpc_port}"]
    command = ["serve", f"--plan={plan}", f"--cluster={stack.cluster}", "--fronts=2", "--linger=0.5", *ports]
    dispatcher = Process(command, tmp_path / "serve.log")
    dispatcher.start()
    wait_until_ready(f"{stack.url}/v2/health/live", dispatcher)
    fronts = children_of(dispatcher.pid)
    assert len(fronts) == 2
    client = http.client.HTTPConnection("127.0.0.1", stack.http_port, timeout=5)
    client.request("GET", "/v2/health/ready")
    response = client.getresponse()
    assert (response.status, response.read()) == (400, b"")
    os.kill(dispatcher.pid, signal.SIGKILL)
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [0, 0, 0]}]}
    client.request("POST", "/v2/models/family/infer", json.dumps(body))
    response = client.getresponse()
    assert response.status == 503
    assert response.headers["Connection"] == "close"
    assert b"the dispatcher behind this server has ended" in response.read()
    client.close()
    give_up_s = time.monotonic() + 10
    while any(map(is_alive, fronts)):
        assert time.monotonic() < give_up_s
        time.sleep(0.02)
    dispatcher.stop()
