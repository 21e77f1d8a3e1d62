"""HTTP bodies of infer requests, written by hand."""

from __future__ import annotations

import json
from typing import Any

INFER = "/v2/models/echo/infer"
HEADER = "Inference-Header-Content-Length"


def head(*inputs: dict[str, Any], **rest: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **rest}).encode()


def tensor(data: Any, datatype: str = "INT32", shape: list[Any] | None = None, name: str = "x") -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [len(data)] if shape is None else shape, "data": data}


def binary(size: int, datatype: str = "FP32", shape: list[Any] | None = None, name: str = "x") -> dict[str, Any]:
    parameters = {"binary_data_size": size}
    return {"name": name, "datatype": datatype, "shape": shape or [1], "parameters": parameters}


def with_buffer(item: dict[str, Any], buffer: bytes) -> tuple[bytes, int]:
    json_part = head(item)
    return json_part + buffer, len(json_part)
