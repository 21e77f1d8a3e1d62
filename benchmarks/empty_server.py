"""What a server costs that does nothing: `python -m benchmarks.empty_server http|grpc`.

It runs on the event loop that the orchestrator runs on, reads a request as a whole and gives one prepared answer: for
HTTP an aiohttp handler, for gRPC a grpc.aio one for the same service.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import click
import grpc.aio
from aiohttp import web
from tritonclient.grpc import service_pb2, service_pb2_grpc


async def _serve_http(port: int, answer: bytes, headers: dict[str, str]) -> None:
    async def handle(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=answer, headers=headers)

    app = web.Application(client_max_size=1 << 26)
    app.router.add_post("/v2/models/{model}/infer", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


async def _serve_grpc(port: int, answer: bytes) -> None:
    message = service_pb2.ModelInferResponse.FromString(answer)

    class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
        async def ModelInfer(self, _request: Any, _context: Any) -> Any:  # noqa: ANN401, N802 - named by the protocol
            return message

    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


@click.command()
@click.argument("kind", type=click.Choice(["http", "grpc"]))
@click.option("--port", type=int, required=True)
@click.option("--answer", type=click.Path(exists=True, path_type=Path), required=True, help="The body, as a file.")
@click.option("--headers", default="{}", help="JSON; of an HTTP answer.")
def main(kind: str, port: int, answer: Path, headers: str) -> None:
    """Serve until killed."""
    body = answer.read_bytes()
    asyncio.run(_serve_http(port, body, json.loads(headers)) if kind == "http" else _serve_grpc(port, body))


if __name__ == "__main__":
    main()
