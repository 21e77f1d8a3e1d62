"""Cases that the four clients of tritonclient can run: name -> what to do with a client."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import tritonclient.grpc
import tritonclient.grpc.aio
from tritonclient.utils import InferenceServerException

from tests.conformance.outcomes import Outcome, of_error, of_result, plain
from tests.conformance.pair import MAX_BATCH, MIXED, WORDS
from tests.fakes.tiny import rows

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.orchestrator.wire.stock_clients import StockClient

    Case = Callable[[StockClient], Awaitable[Outcome]]

CASES: dict[str, Case] = {}
# one certain row, one that goes on to the large model
X = rows([7, 3], [0.9, 0.1])
ALL = ("label", "certainty", "scores", "stage")


def _case(name: str, only: str = "") -> Callable[[Case], Case]:
    """Register a case; `only`: of clients whose kind begins so."""

    def register(case: Case) -> Case:
        CASES[name if not only else f"{only}:{name}"] = case
        return case

    return register


async def run(case: Case, client: StockClient) -> Outcome:
    """The outcome, refusals included."""
    try:
        return await case(client)
    except InferenceServerException as error:
        return of_error(error)


def _told(method: str, *args: Any) -> Case:
    """A case that asks something, whose answer is a document or a truth."""

    async def case(client: StockClient) -> Outcome:
        options = {"as_json": True} if method.startswith("get_") and not client.is_http else {}
        answer = await client.call(method, *args, **options)
        if not isinstance(answer, (dict, list)):
            return {"status": "ok", "answer": answer}
        document = plain(answer)
        for wrapper in ("config", "models", "settings"):
            if not client.is_http and isinstance(document, dict) and list(document) == [wrapper]:
                document = document[wrapper]
        return {"status": "ok", **(document if isinstance(document, dict) else {"answer": document})}

    return case


def _infer(
    x: Any = X, *, name: str = "x", datatype: str = "FP32", model: str = "family", outputs: Any = ALL,
    binary: bool = True, output: dict[str, Any] | None = None, **options: Any,
) -> Case:  # fmt: skip
    """A case of one inference."""

    async def case(client: StockClient) -> Outcome:
        wanted = [client.output(each, binary=binary, **(output or {})) for each in outputs] or None
        given = [client.input(name, datatype, x, binary=binary)]
        chosen = {key: value for key, value in options.items() if client.is_http or not key.startswith("re")}
        if "request_id" in options:
            chosen["request_id"] = options["request_id"]
        return of_result(client, await client.call("infer", model, given, outputs=wanted, **chosen))

    return case


CASES |= {
    "live": _told("is_server_live"),
    "ready": _told("is_server_ready"),
    "server-metadata": _told("get_server_metadata"),
    "model-ready": _told("is_model_ready", "family"),
    "model-ready-of-a-version": _told("is_model_ready", "family", "1"),
    "model-ready-unknown": _told("is_model_ready", "nope"),
    "model-ready-unknown-version": _told("is_model_ready", "family", "9"),
    "metadata": _told("get_model_metadata", "family"),
    "metadata-of-a-version": _told("get_model_metadata", "family", "1"),
    "metadata-of-all-datatypes": _told("get_model_metadata", "mixed"),
    "metadata-unknown": _told("get_model_metadata", "nope"),
    "metadata-unknown-version": _told("get_model_metadata", "family", "9"),
    "config": _told("get_model_config", "family"),
    "config-of-a-version": _told("get_model_config", "family", "1"),
    "config-of-all-datatypes": _told("get_model_config", "mixed"),
    "config-unknown": _told("get_model_config", "nope"),
    "config-unknown-version": _told("get_model_config", "family", "9"),
    "statistics-unknown": _told("get_inference_statistics", "nope"),
    "statistics-unknown-version": _told("get_inference_statistics", "family", "9"),
    "load": _told("load_model", "nope"),
    "unload": _told("unload_model", "nope"),
    "trace-settings": _told("get_trace_settings"),
    "log-settings": _told("get_log_settings"),
    "system-memory": _told("get_system_shared_memory_status"),
    "cuda-memory": _told("get_cuda_shared_memory_status"),
    "register-memory": _told("register_system_shared_memory", "region", "/nowhere", 8),
    "infer": _infer(),
    "infer-one-row": _infer(X[:1]),
    "infer-escalated-row": _infer(X[1:]),
    "infer-all-it-takes": _infer(rows([5] * MAX_BATCH, [0.9, 0.1] * (MAX_BATCH // 2))),
    "infer-one-output": _infer(outputs=("scores",)),
    "infer-version": _infer(model_version="1"),
    "infer-id": _infer(request_id="a-1"),
    "infer-odd-id": _infer(request_id='é"\\ 0'),
    "infer-json": _infer(binary=False),
    "infer-parameters": _infer(parameters={"text": "b", "whole": 1, "truth": True, "number": 1.5}),
    "infer-priority": _infer(priority=1),
    "infer-long-timeout": _infer(timeout=10_000_000),
    "infer-short-timeout": _infer(timeout=1),
    "infer-in-a-sequence": _infer(sequence_id=5, sequence_start=True, sequence_end=True),
    "infer-not-finite": _infer(rows([1, 1], [float("inf"), float("nan")]), outputs=("certainty", "scores", "stage")),
    "infer-not-finite-json": _infer(
        rows([1, 1], [float("inf"), float("nan")]), outputs=("certainty", "scores", "stage"), binary=False
    ),
    "infer-default-outputs": _infer(outputs=()),
    "infer-output-twice": _infer(outputs=("label", "label")),
    "infer-unknown-output": _infer(outputs=("label", "nope")),
    "infer-unknown-model": _infer(model="nope"),
    "infer-unknown-version": _infer(model_version="9"),
    "infer-wrong-input": _infer(name="y"),
    "infer-wrong-datatype": _infer(X.astype(np.float64), datatype="FP64"),
    "infer-wrong-shape": _infer(X[:, :2].copy()),
    "infer-no-batch-axis": _infer(X[0]),
    "infer-no-rows": _infer(X[:0]),
    "infer-too-many-rows": _infer(rows([5] * (MAX_BATCH + 1), [0.9] * (MAX_BATCH + 1)), outputs=("label",)),
    "infer-reserved-parameter": _infer(parameters={"triton_x": 1}),
    "infer-classes": _infer(outputs=("scores",), output={"class_count": 2}),
    "infer-classes-of-labels": _infer(outputs=("label", "stage"), output={"class_count": 3}),
    "infer-more-classes-than-there-are": _infer(outputs=("scores",), output={"class_count": 9}),
    "infer-classes-json": _infer(outputs=("scores",), output={"class_count": 1}, binary=False),
    "infer-compressed": _infer(
        rows([1] * MAX_BATCH, [0.9] * MAX_BATCH),
        binary=False,
        request_compression_algorithm="gzip",
        response_compression_algorithm="deflate",
    ),
    "infer-compressed-the-other-way": _infer(
        rows([1] * MAX_BATCH, [0.9] * MAX_BATCH),
        request_compression_algorithm="deflate",
        response_compression_algorithm="gzip",
    ),
}


# Triton counts a request a moment after it has answered it.
_COUNTED_AFTER_S = 0.1


@_case("statistics")
async def _statistics(client: StockClient) -> Outcome:
    """Three certain rows in one request, and a request that is refused: what is counted of them."""
    await asyncio.sleep(_COUNTED_AFTER_S)
    before = await _counted(client)
    await _infer(rows([1, 2, 3], [0.9] * 3))(client)
    for _ in range(20):
        await asyncio.sleep(_COUNTED_AFTER_S)
        after = await _counted(client)
        if after["success"] > before["success"]:
            break
    grown = {key: after[key] - before[key] for key in after if not key.endswith("_ns")}
    times = {key: after[key] > before[key] for key in ("success_ns", "queue_ns", "compute_infer_ns")}
    return {"status": "ok", "grown": grown, "times-grow": times}


async def _counted(client: StockClient) -> dict[str, int]:
    options = {} if client.is_http else {"as_json": True}
    (stats,) = (await client.call("get_inference_statistics", "family", "1", **options))["model_stats"]
    counted = {key: int(stats.get(key, 0)) for key in ("inference_count", "execution_count")}
    for key in ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output"):
        duration = stats["inference_stats"].get(key, {})
        counted |= {key: int(duration.get("count", 0)), f"{key}_ns": int(duration.get("ns", 0))}
    sizes = {int(entry["batch_size"]): int(entry["compute_infer"]["count"]) for entry in stats.get("batch_stats", [])}
    return counted | {"batches_of_3": sizes.get(3, 0)}


@_case("statistics-of-all")
async def _statistics_of_all(client: StockClient) -> Outcome:
    options = {} if client.is_http else {"as_json": True}
    stats = (await client.call("get_inference_statistics", **options))["model_stats"]
    return {"status": "ok", "models": [entry["name"] for entry in stats]}


@_case("index")
async def _index(client: StockClient) -> Outcome:
    answer = await client.call("get_model_repository_index", **({} if client.is_http else {"as_json": True}))
    entries = answer if client.is_http else answer["models"]
    families = {entry["name"]: entry for entry in entries if entry["name"] in ("family", "mixed")}
    return {"status": "ok", "models": sorted(entry["name"] for entry in entries), "families": families}


def _mixed(binary: bool, leave_out: str = "") -> Case:
    async def case(client: StockClient) -> Outcome:
        given = []
        for key, (datatype, kind, _, _) in MIXED.items():
            if datatype == "BYTES":
                array = np.array([[word.encode()] for word in WORDS], dtype=np.object_)
            else:
                array = np.array([[0], [1], [1], [0]]).astype(kind)
            # FP16 has no form in JSON
            if key != leave_out:
                given.append(client.input(key, datatype, array, binary=binary or datatype == "FP16"))
        wanted = [client.output(name, binary=binary) for name in ALL]
        return of_result(client, await client.call("infer", "mixed", given, outputs=wanted))

    return case


CASES["infer-all-datatypes"] = _mixed(binary=True)
CASES["infer-all-datatypes-json"] = _mixed(binary=False)
CASES["infer-without-an-input"] = _mixed(binary=True, leave_out="text")


@_case("infer-one-input-too-many")
async def _too_many(client: StockClient) -> Outcome:
    given = [client.input(name, "FP32", X) for name in ("x", "y")]
    return of_result(client, await client.call("infer", "family", given))


@_case("infer-from-memory")
async def _from_memory(client: StockClient) -> Outcome:
    tensor = client.module.InferInput("x", [2, 3], "FP32")
    tensor.set_shared_memory("region", 24)
    return of_result(client, await client.call("infer", "family", [tensor]))


@_case("infer-to-memory")
async def _to_memory(client: StockClient) -> Outcome:
    wanted = client.output("label")
    wanted.set_shared_memory("region", 16)
    return of_result(client, await client.call("infer", "family", [client.input("x", "FP32", X)], outputs=[wanted]))


@_case("deadline", only="grpc")
async def _deadline(client: StockClient) -> Outcome:
    outcome: Outcome = {}
    for _ in range(50):
        try:
            # now and then the answer is there before the client looks at its clock
            outcome = await _infer(client_timeout=1e-6)(client)
        except InferenceServerException as error:
            # whether the client or the server gives up first, and so whose sentence it is, is chance
            return {"status": of_error(error)["status"]}
    return outcome


@_case("compressed", only="grpc")
async def _compressed(client: StockClient) -> Outcome:
    return await _infer(compression_algorithm="gzip")(client)


def _stream(models: list[str], **options: Any) -> Case:
    """Requests with ids on one stream; the outcome is what came back for each, in order."""

    async def case(client: StockClient) -> Outcome:
        requests = [
            {
                "model_name": model,
                "inputs": [client.input("x", "FP32", X)],
                "outputs": [client.output("label")],
                "request_id": str(number),
                **options,
            }
            for number, model in enumerate(models)
        ]
        answers = await _streamed(client, requests)
        outcome: Outcome = {"status": "ok", "answers": [], "final": [], "message": ""}
        for result, error in answers:
            if error is not None:
                outcome["answers"].append("error")
                outcome["message"] += of_error(error)["message"]
            else:
                final = result.get_response().parameters["triton_final_response"]
                outcome["answers"].append((result.get_response().id, result.as_numpy("label").tolist()))
                outcome["final"].append(final.bool_param)
        return outcome

    return case


async def _streamed(client: StockClient, requests: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
    if client.kind.endswith("aio"):

        async def sent() -> Any:
            for request in requests:
                yield request

        async with tritonclient.grpc.aio.InferenceServerClient(client.address) as stub:
            return [answer async for answer in stub.stream_infer(sent())]

    def in_thread() -> list[tuple[Any, Any]]:
        answers: list[tuple[Any, Any]] = []
        with tritonclient.grpc.InferenceServerClient(client.address) as stub:
            stub.start_stream(lambda result, error: answers.append((result, error)))
            for request in requests:
                stub.async_stream_infer(**request)
            # ends when all are answered
            stub.stop_stream()
        return answers

    return await asyncio.to_thread(in_thread)


CASES |= {
    "grpc:stream": _stream(["family"] * 50),
    "grpc:stream-with-an-error": _stream(["family", "nope", "family"]),
    "grpc:stream-that-wants-empty-answers": _stream(["family"] * 2, enable_empty_final_response=True),
}


def runs(name: str, kind: str) -> bool:
    """Whether a client runs a case."""
    only, colon, _ = name.partition(":")
    return not colon or kind.startswith(only)
