"""TLS on both transports: who is let in, and files that are replaced while the server runs."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
import subprocess
from typing import TYPE_CHECKING, Any, NamedTuple

import aiohttp
import grpc.aio
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from click.testing import CliRunner
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cascadeserve.errors import InvalidArtefact, UsageError
from orchestrator.cli import serve
from orchestrator.wire.rest import RestServer
from orchestrator.wire.rpc import build_rpc_server
from orchestrator.wire.tls import Tls, TlsFiles
from tests.orchestrator.wire.conftest import MAX_BYTES
from tests.orchestrator.wire.test_plain_http import LIVE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.orchestrator.wire.echo_plane import EchoPlane

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")

KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
NAMES = "subjectAltName=DNS:localhost,IP:127.0.0.1"


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two authorities, each with a server and a client: `server-1.pem`, `server-1.key`, ..."""
    folder = tmp_path_factory.mktemp("certificates")
    for number in "12":
        authority = f"ca-{number}"
        openssl(folder, "req", "-x509", *KEY, "-keyout", f"{authority}.key", "-out", f"{authority}.pem", "-subj",
                f"/CN={authority}", "-days", "2")  # fmt: skip
        for who in ("server", "client"):
            name = f"{who}-{number}"
            openssl(folder, "req", *KEY, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}",
                    "-addext", NAMES)  # fmt: skip
            openssl(folder, "x509", "-req", "-in", f"{name}.csr", "-CA", f"{authority}.pem", "-CAkey",
                    f"{authority}.key", "-CAcreateserial", "-days", "2", "-copy_extensions", "copy", "-out",
                    f"{name}.pem")  # fmt: skip
    return folder


class Served(NamedTuple):
    """Both transports with TLS, and the files that they follow."""

    http: str
    grpc: str
    tls: Tls
    files: TlsFiles
    made: Path

    def replace(self, **names: str) -> None:
        """Put others in the place of files, as one moves them in."""
        for field, name in names.items():
            target: Path = getattr(self.files, field)
            shutil.copy(self.made / name, target.with_suffix(".new"))
            target.with_suffix(".new").replace(target)

    async def over_http(self, authority: str, client: str = "") -> str:
        """Ask whether it lives; returns the name of the server that answered."""
        context = ssl.create_default_context(cafile=str(self.made / f"{authority}.pem"))
        if client:
            context.load_cert_chain(self.made / f"{client}.pem", self.made / f"{client}.key")
        host, _, port = self.http.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
        try:
            writer.write(LIVE)
            assert (await reader.readuntil(b"\r\n\r\n")).split()[1] == b"200"
            certificate = writer.get_extra_info("peercert")
            return str(dict(pair[0] for pair in certificate["subject"])["commonName"])
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def over_grpc(self, authority: str, client: str = "") -> int:
        """Ask whether it is ready."""

        def read(name: str) -> bytes | None:
            return (self.made / name).read_bytes() if client else None

        root = (self.made / f"{authority}.pem").read_bytes()
        credentials = grpc.ssl_channel_credentials(root, read(f"{client}.key"), read(f"{client}.pem"))
        async with grpc.aio.secure_channel(self.grpc, credentials) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            return int((await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)).status)


@pytest.fixture(params=["anyone", "mutual"])
async def served(request: pytest.FixtureRequest, made: Path, tmp_path: Path, plane: EchoPlane) -> AsyncIterator[Served]:
    mutual = request.param == "mutual"
    files = TlsFiles(tmp_path / "cert", tmp_path / "key", tmp_path / "ca" if mutual else None)
    for path, name in zip(files.paths, ("server-1.pem", "server-1.key", "ca-1.pem"), strict=False):
        shutil.copy(made / name, path)
    tls = Tls(files)
    rest = RestServer(plane, max_body_bytes=MAX_BYTES)
    await rest.start("127.0.0.1", 0, tls=tls.http_context())
    rpc = build_rpc_server(plane, max_message_bytes=MAX_BYTES)
    port = rpc.add_secure_port("127.0.0.1:0", tls.grpc_credentials())
    await rpc.start()
    yield Served(rest.address, f"127.0.0.1:{port}", tls, files, made)
    await rpc.stop(None)
    await rest.close()


def is_mutual(served: Served) -> bool:
    return served.files.client_ca is not None


async def test_stock_clients(served: Served) -> None:
    array = np.zeros((1, 2), np.float32)
    made = served.made
    context = ssl.create_default_context(cafile=str(made / "ca-1.pem"))
    context.load_cert_chain(made / "client-1.pem", made / "client-1.key")
    options: dict[str, Any] = {
        "root_certificates": str(made / "ca-1.pem"),
        "private_key": str(made / "client-1.key"),
        "certificate_chain": str(made / "client-1.pem"),
    }
    over_http = tritonclient.http.aio.InferenceServerClient(served.http, ssl=True, ssl_context=context)
    over_grpc = tritonclient.grpc.aio.InferenceServerClient(served.grpc, ssl=True, **options)
    for client, module in ((over_http, tritonclient.http), (over_grpc, tritonclient.grpc)):
        tensor = module.InferInput("x", [1, 2], "FP32")
        tensor.set_data_from_numpy(array)
        async with client:
            result = await client.infer("echo", [tensor])
        np.testing.assert_array_equal(result.as_numpy("x"), array)


async def test_who_is_let_in(served: Served) -> None:
    assert await served.over_http("ca-1", "client-1") == "server-1"
    assert await served.over_grpc("ca-1", "client-1") == health_pb2.HealthCheckResponse.SERVING
    for client in ("", "client-2"):
        if is_mutual(served):
            with pytest.raises((asyncio.IncompleteReadError, OSError)):
                await served.over_http("ca-1", client)
            with pytest.raises(grpc.aio.AioRpcError):
                await served.over_grpc("ca-1", client)
        else:
            assert await served.over_http("ca-1", client) == "server-1"
            assert await served.over_grpc("ca-1", client) == health_pb2.HealthCheckResponse.SERVING


async def test_without_tls_there_is_no_answer(served: Served) -> None:
    async with aiohttp.ClientSession() as session:
        with pytest.raises((aiohttp.ClientError, OSError)):
            await session.get(f"http://{served.http}/v2/health/live")
    assert await served.over_http("ca-1", "client-1") == "server-1"


async def test_new_files_hold_for_new_connections(served: Served) -> None:
    assert not served.tls.refresh()
    context = ssl.create_default_context(cafile=str(served.made / "ca-1.pem"))
    context.load_cert_chain(served.made / "client-1.pem", served.made / "client-1.key")
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as before:
        url = f"https://{served.http}/v2/health/live"
        assert (await before.get(url)).status == 200
        served.replace(certificate="server-2.pem", key="server-2.key")
        if is_mutual(served):
            served.replace(client_ca="ca-2.pem")
        assert served.tls.refresh()
        assert await served.over_http("ca-2", "client-2") == "server-2"
        assert await served.over_grpc("ca-2", "client-2") == health_pb2.HealthCheckResponse.SERVING
        if is_mutual(served):
            with pytest.raises((asyncio.IncompleteReadError, OSError)):
                await served.over_http("ca-2", "client-1")
            with pytest.raises(grpc.aio.AioRpcError):
                await served.over_grpc("ca-2", "client-1")
        # what is open goes on
        assert (await before.get(url)).status == 200


@pytest.mark.parametrize("transport", ["http", "grpc"])
async def test_a_session_of_before_lets_nobody_in(served: Served, transport: str) -> None:
    host, _, port = getattr(served, transport).partition(":")
    context = ssl.create_default_context(cafile=str(served.made / "ca-1.pem"))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"] if transport == "http" else ["h2"])
    context.load_cert_chain(served.made / "client-1.pem", served.made / "client-1.key")

    def connect(session: ssl.SSLSession | None) -> ssl.SSLSocket:
        plain = socket.create_connection((host, int(port)), timeout=5)
        # left open: a session whose connection breaks off is forgotten
        connection = stack.enter_context(context.wrap_socket(plain, server_hostname=host, session=session))
        if transport == "http":
            connection.sendall(LIVE)
            assert connection.recv(100).split()[1] == b"200"
        return connection

    with contextlib.ExitStack() as stack:
        first = await asyncio.to_thread(connect, None)
        if transport == "http":  # else the rest would show nothing
            assert (await asyncio.to_thread(connect, first.session)).session_reused
        if is_mutual(served):
            served.replace(client_ca="ca-2.pem")
            assert served.tls.refresh()
            with pytest.raises(OSError):  # noqa: PT011 - reset, or a TLS alert
                await asyncio.to_thread(connect, first.session)
            context.load_cert_chain(served.made / "client-2.pem", served.made / "client-2.key")
        else:
            served.replace(certificate="server-2.pem", key="server-2.key")
            assert served.tls.refresh()
            context.load_verify_locations(served.made / "ca-2.pem")
        assert not (await asyncio.to_thread(connect, first.session)).session_reused


async def test_files_that_do_not_fit_together_are_left_alone(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    served.replace(certificate="server-2.pem")
    assert not served.tls.refresh()
    assert not served.tls.refresh()
    assert len([record for record in caplog.records if "TLS stays as it is" in record.message]) == 1
    assert await served.over_http("ca-1", "client-1") == "server-1"
    served.files.key.unlink()
    assert not served.tls.refresh()
    assert await served.over_grpc("ca-1", "client-1") == health_pb2.HealthCheckResponse.SERVING
    served.replace(key="server-2.key")
    assert served.tls.refresh()
    assert await served.over_http("ca-2", "client-1") == "server-2"


@pytest.mark.parametrize("given", [["--tls-cert=c"], ["--tls-key=k"], ["--tls-client-ca=a"]])
def test_options_that_belong_together(given: list[str]) -> None:
    done = CliRunner().invoke(serve, ["--plan=p", "--cluster=c", *given])
    assert isinstance(done.exception, UsageError)
    assert "give what is missing" in str(done.exception)


@pytest.mark.parametrize(
    ("certificate", "key", "client_ca", "sentence"),
    [
        ("nothing.pem", "server-1.key", None, "nothing.pem: cannot be read"),
        ("server-1.pem", "nothing.key", None, "nothing.key: cannot be read"),
        ("server-1.pem", "server-2.key", None, "server-1.pem: is no PEM certificate of the key"),
        ("server-1.key", "server-1.key", None, "server-1.key: is no PEM certificate of the key"),
        ("server-1.pem", "server-1.key", "client-1.key", "client-1.key: holds no PEM certificate"),
        ("server-1.pem", "locked.key", None, "locked.key: the key asks for a password"),
    ],
)
def test_what_is_wrong_at_the_start_is_said(
    made: Path, certificate: str, key: str, client_ca: str | None, sentence: str
) -> None:
    if key == "locked.key":
        openssl(made, "ec", "-in", "server-1.key", "-aes128", "-passout", "pass:word", "-out", key)
    with pytest.raises(InvalidArtefact, match=sentence):
        Tls(TlsFiles(made / certificate, made / key, None if client_ca is None else made / client_ca))
