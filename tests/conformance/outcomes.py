"""What a client saw, in a form in which two servers can be compared: aspect -> value."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tritonclient.utils import InferenceServerException

    from tests.orchestrator.wire.stock_clients import StockClient

Outcome = dict[str, Any]

# Triton puts it before some of its sentences.
_REQUEST_ID = re.compile(r"^\[request id: [^\]]*\] ")
_NUMBER = re.compile(r"-?[0-9]+")


def plain(value: Any) -> Any:
    """JSON in which protobuf's JSON equals Triton's: 64-bit integers as numbers, no empty fields."""
    if isinstance(value, dict):
        return {key: inner for key, item in value.items() if (inner := plain(item)) not in (None, "", [], {}, False, 0)}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return int(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def of_error(error: InferenceServerException) -> Outcome:
    """A refusal: its status and its sentence."""
    status = str(error.status()).removeprefix("StatusCode.")
    return {"status": status, "message": sentence(str(error.message()))}


def sentence(text: str) -> str:
    """An error's sentence without the request's id."""
    return _REQUEST_ID.sub("", text)


def of_result(client: StockClient, result: Any) -> Outcome:
    """An answer."""
    answer = client.answer(result)
    response = result.get_response()
    outputs = response["outputs"] if client.is_http else response.outputs
    kinds = [
        (item["name"], item["datatype"], item["shape"])
        if client.is_http
        else (item.name, item.datatype, list(item.shape))
        for item in outputs
    ]
    return {
        "status": "ok",
        "model": (response["model_name"] if client.is_http else response.model_name, answer["version"]),
        "id": answer["id"],
        "parameters": answer["parameters"],
        "output-names": sorted(name for name, _, _ in kinds),
        "outputs": {name: [kind, shape, listed(result.as_numpy(name))] for name, kind, shape in kinds},
    }


def listed(array: Any) -> Any:
    """Values that compare equal if they are: no number is as good as another."""
    return [_value(value) for value in np.asarray(array).ravel().tolist()]


def _value(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return "NaN" if value != value else value  # noqa: PLR0124 - so NaN is told


def of_http(status: int, headers: Mapping[str, str], body: bytes) -> Outcome:
    """What came over plain HTTP, decompressed."""
    outcome: Outcome = {"status": status}
    if status != 200:
        try:
            outcome["message"] = sentence(json.loads(body)["error"])
        except (ValueError, TypeError, KeyError):
            outcome["message"] = f"no JSON error: {body!r}" if body else ""
        return outcome
    outcome["type"] = headers.get("Content-Type", "").partition(";")[0] if body else ""
    outcome["encoding"] = headers.get("Content-Encoding", "")
    length = headers.get("Inference-Header-Content-Length")
    text = body if length is None else body[: int(length)]
    document = json.loads(text) if text else {}
    if not isinstance(document, dict) or "outputs" not in document or "model_name" not in document:
        outcome["body"] = plain(document)
        return outcome
    outputs = sorted(document["outputs"], key=lambda output: str(output["name"]))
    outcome["parameters"] = document.get("parameters", {})
    outcome["id"] = document.get("id", "none")
    outcome["output-names"] = [output["name"] for output in outputs]
    outcome["binary"] = {output["name"]: "data" not in output for output in outputs}
    outcome["json"] = {
        output["name"]: [_value(value) for value in output["data"]] for output in outputs if "data" in output
    }
    return outcome


def different(one: Any, other: Any, aspect: str) -> bool:
    """Whether Triton's value and ours differ. A sentence may go on where the other ends."""
    if aspect == "message" and one and other:
        return not (one in other or other in one)
    return bool(one != other)
