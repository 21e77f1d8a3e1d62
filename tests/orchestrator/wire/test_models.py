"""What is told of models: configuration, statistics, index; alike over both transports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from orchestrator.wire.descriptions import Duration, ModelStatistics
from tests.orchestrator.wire.stock_clients import send

if TYPE_CHECKING:
    from tests.orchestrator.wire.echo_plane import EchoPlane
    from tests.orchestrator.wire.stock_clients import StockClient


async def asked(client: StockClient, method: str, *args: Any) -> Any:
    """What a method returns, as JSON whatever the transport."""
    return await client.call(method, *args, **({} if client.is_http else {"as_json": True}))


async def test_config(client: StockClient) -> None:
    config = await asked(client, "get_model_config", "echo")
    config = config if client.is_http else config["config"]
    assert (config["name"], config["max_batch_size"]) == ("echo", 8)
    (image,) = config["input"]
    assert (image["name"], image["data_type"]) == ("image", "TYPE_FP32")
    # protobuf writes 64-bit integers as text
    assert [int(dim) for dim in image["dims"]] == [1, 32, 32]
    assert [entry["data_type"] for entry in config["output"]] == ["TYPE_FP32", "TYPE_INT64"]
    assert "dynamic_batching" in config


async def test_text_is_called_string_there(client: StockClient) -> None:
    config = await asked(client, "get_model_config", "text", "1")
    config = config if client.is_http else config["config"]
    assert config["input"][0]["data_type"] == "TYPE_STRING"


async def test_index(client: StockClient) -> None:
    index = await asked(client, "get_model_repository_index")
    entries = {entry["name"]: entry for entry in (index if client.is_http else index["models"])}
    assert entries["echo"] == {"name": "echo", "version": "1", "state": "READY"}
    assert entries["loading"]["state"] == "UNAVAILABLE"


async def test_index_of_what_is_ready(rest_address: str) -> None:
    reply = await send(rest_address, "/v2/repository/index", b'{"ready": true}')
    assert "loading" not in {entry["name"] for entry in msgspec.json.decode(reply.body)}
    assert (await send(rest_address, "/v2/repository/index", b"{")).status == 400


async def test_statistics(client: StockClient, plane: EchoPlane) -> None:
    counted = ModelStatistics(
        "echo", "1", 7, 5, 3,
        success=Duration(2, 900), queue=Duration(2, 100), compute=Duration(2, 700),
        batches={4: Duration(1, 300), 1: Duration(2, 400)},
    )  # fmt: skip
    plane.counted["echo"] = counted
    stats = (await asked(client, "get_inference_statistics", "echo"))["model_stats"]
    (echo,) = stats
    assert [int(echo[key]) for key in ("last_inference", "inference_count", "execution_count")] == [7, 5, 3]
    times = {key: {name: int(value) for name, value in entry.items()} for key, entry in echo["inference_stats"].items()}
    assert times["success"] == {"count": 2, "ns": 900}
    assert times["queue"] == {"count": 2, "ns": 100}
    assert times["compute_infer"] == {"count": 2, "ns": 700}
    assert times["compute_input"]["count"] == times["compute_output"]["count"] == 2
    assert [int(entry["batch_size"]) for entry in echo["batch_stats"]] == [1, 4]
    assert int(echo["batch_stats"][0]["compute_infer"]["count"]) == 2
    everything = (await asked(client, "get_inference_statistics"))["model_stats"]
    assert [entry["name"] for entry in everything] == ["echo", "loading", "pair", "ragged", "text", "variable"]


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
async def test_compression_both_ways(client: StockClient, algorithm: str) -> None:
    image = np.zeros((1, 1, 32, 32), np.float32)
    options = {"request_compression_algorithm": algorithm, "response_compression_algorithm": algorithm}
    if not client.is_http:
        options = {"compression_algorithm": algorithm}
    result = await client.call("infer", "echo", [client.input("image", "FP32", image)], **options)
    np.testing.assert_array_equal(result.as_numpy("image"), image)
