"""The four clients of tritonclient behind one face, and a plain HTTP client for what they cannot send."""

from __future__ import annotations

import asyncio
import inspect
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp
import msgspec
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from orchestrator.wire.rest import RestServer
    from orchestrator.wire.tensors import Array


CLIENTS = ("http", "http.aio", "grpc", "grpc.aio")


class StockClient:
    """One call, one client: the synchronous HTTP client may only be used in the thread that made it."""

    def __init__(self, kind: str, address: str) -> None:
        self.is_http = kind.startswith("http")
        self.kind = kind
        self.address = address
        self.module = tritonclient.http if self.is_http else tritonclient.grpc

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if self.kind.endswith("aio"):
            module = tritonclient.http.aio if self.is_http else tritonclient.grpc.aio
            client = module.InferenceServerClient(self.address)
            try:
                return await getattr(client, method)(*args, **kwargs)
            finally:
                await client.close()
        return await asyncio.to_thread(self._call_in_thread, method, args, kwargs)

    def _call_in_thread(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        client = self.module.InferenceServerClient(self.address)
        try:
            answer = getattr(client, method)(*args, **kwargs)
            assert not inspect.isawaitable(answer)
            return answer
        finally:
            client.close()

    def input(self, name: str, datatype: str, array: Array, *, binary: bool = True) -> Any:
        tensor = self.module.InferInput(name, list(array.shape), datatype)
        if self.is_http:
            tensor.set_data_from_numpy(array, binary_data=binary)
        else:
            tensor.set_data_from_numpy(array)
        return tensor

    def output(self, name: str, *, binary: bool = True, **kwargs: Any) -> Any:
        if self.is_http:
            return self.module.InferRequestedOutput(name, binary_data=binary, **kwargs)
        return self.module.InferRequestedOutput(name, **kwargs)

    def answer(self, result: Any) -> dict[str, Any]:
        """Return the id, version, output names and parameters of a result, whatever the transport."""
        response = result.get_response()
        if self.is_http:
            outputs = [output["name"] for output in response["outputs"]]
            parameters = response.get("parameters", {})
            return {
                "id": response.get("id", ""),
                "version": response["model_version"],
                "outputs": outputs,
                "parameters": parameters,
            }
        parameters = {
            key: getattr(value, value.WhichOneof("parameter_choice")) for key, value in response.parameters.items()
        }
        return {
            "id": response.id,
            "version": response.model_version,
            "outputs": [output.name for output in response.outputs],
            "parameters": parameters,
        }


@asynccontextmanager
async def serve_http(server: RestServer) -> AsyncIterator[str]:
    """Serve on a free loopback port, in this event loop."""
    await server.start("127.0.0.1", 0)
    try:
        yield server.address
    finally:
        await server.close()


class Reply:
    """What came back over plain HTTP."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def error(self) -> str:
        """The sentence of an error body, checked to be the whole body."""
        assert self.headers["Content-Type"].startswith("application/json")
        body = msgspec.json.decode(self.body, type=dict[str, str])
        assert list(body) == ["error"]
        sentence = body["error"]
        assert sentence
        assert "\n" not in sentence
        return sentence


async def send(
    address: str,
    path: str,
    body: bytes | None = None,
    *,
    method: str = "POST",
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """Send one request as given."""
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, f"http://{address}{path}", data=body, headers=headers) as response,
    ):
        return Reply(response.status, response.headers, await response.read())
