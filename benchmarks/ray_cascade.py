"""The same cascade as a Ray Serve composition: a program of its own, run by an interpreter that has ray[serve].

`benchmarks.baselines` starts it. Every stage is a deployment with an ONNX Runtime session, batched by `serve.batch` as
the plan's gear batches, its process pinned to the core that Triton would have; an ingress carries each request from
stage to stage. It speaks enough of KServe v2 over HTTP for the load generator.
"""

import argparse
import asyncio
import json
import os
import signal
from pathlib import Path

import numpy as np
import onnxruntime as ort
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

_HEADER_LENGTH = "Inference-Header-Content-Length"
_OK, _BAD_REQUEST = 200, 400
# requests that a replica may have at a time; the load is open, so it must not be what ends first
_MOST_OPEN = 10_000
_QUIET = {"enable_access_log": False}
_DTYPES = {"label": ("INT64", np.int64), "certainty": ("FP32", np.float32), "stage": ("INT32", np.int32)}


@serve.deployment(max_ongoing_requests=_MOST_OPEN, ray_actor_options={"num_cpus": 0}, logging_config=_QUIET)
class Stage:
    """One model."""

    def __init__(self, model: str, core: int, max_batch: int, max_wait_s: float) -> None:
        """Open the session, on one thread as in Triton."""
        os.sched_setaffinity(0, {core})
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name
        self._answer.set_max_batch_size(max_batch)
        self._answer.set_batch_wait_timeout_s(max_wait_s)

    @serve.batch
    async def _answer(self, rows: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        label, certainty = self._session.run(["label", "certainty"], {self._input: np.concatenate(rows)})
        ends = np.cumsum([len(each) for each in rows])
        return [
            (label[end - len(each) : end], certainty[end - len(each) : end])
            for each, end in zip(rows, ends, strict=True)
        ]

    async def __call__(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Label and certainty of each row, both [n, 1]."""
        return await self._answer(rows)


@serve.deployment(max_ongoing_requests=_MOST_OPEN, ray_actor_options={"num_cpus": 0}, logging_config=_QUIET)
class Cascade:
    """The ingress."""

    def __init__(self, name: str, shape: list[int], thresholds: list[float | None], *stages: object) -> None:
        """`stages` are handles of deployments, `shape` that of one row."""
        self._name = name
        self._shape = shape
        self._stages = list(zip(thresholds, stages, strict=True))

    async def __call__(self, request: Request) -> Response:
        """Answer a request of KServe v2."""
        if request.method == "POST":
            return await self._infer(request)
        if request.url.path == f"/v2/models/{self._name}":
            outputs = [{"name": name, "datatype": of, "shape": [-1, 1]} for name, (of, _) in _DTYPES.items()]
            inputs = [{"name": "image", "datatype": "FP32", "shape": [-1, *self._shape]}]
            return JSONResponse({"name": self._name, "inputs": inputs, "outputs": outputs})
        return Response(status_code=_OK if request.url.path == "/v2/health/ready" else _BAD_REQUEST)

    async def _infer(self, request: Request) -> Response:
        body = await request.body()
        length = int(request.headers[_HEADER_LENGTH])
        head = json.loads(body[:length])
        rows = np.frombuffer(body, np.float32, offset=length).reshape(head["inputs"][0]["shape"])
        answer = {name: np.empty((len(rows), 1), dtype) for name, (_, dtype) in _DTYPES.items()}
        left = np.arange(len(rows))
        for number, (threshold, stage) in enumerate(self._stages):
            label, certainty = await stage.remote(rows[left])
            taken = np.full(len(left), True) if threshold is None else certainty.reshape(-1) >= threshold
            mine = left[taken]
            answer["label"][mine], answer["certainty"][mine] = label[taken], certainty[taken]
            answer["stage"][mine] = number
            left = left[~taken]
            if not len(left):
                break
        names = [output["name"] for output in head["outputs"]]
        tensors = [answer[name].tobytes() for name in names]
        outputs = [
            {
                "name": name,
                "datatype": _DTYPES[name][0],
                "shape": [len(rows), 1],
                "parameters": {"binary_data_size": len(tensor)},
            }
            for name, tensor in zip(names, tensors, strict=True)
        ]
        text = json.dumps({"model_name": self._name, "id": head["id"], "outputs": outputs}).encode()
        return Response(b"".join((text, *tensors)), headers={_HEADER_LENGTH: str(len(text))})


def _build(asked: dict) -> object:
    stages = [
        Stage.options(name=f"stage-{number}").bind(
            each["model"], asked["model_core"], each["max_batch"], each["max_wait_s"]
        )
        for number, each in enumerate(asked["stages"])
    ]
    thresholds = [each["threshold"] for each in asked["stages"]]
    return Cascade.bind(asked["name"], asked["row_shape"], thresholds, *stages)


async def _until_stopped() -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()


def main() -> None:
    """Serve what a JSON file describes until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("asked", type=Path)
    asked = json.loads(parser.parse_args().asked.read_text())
    ray.init(include_dashboard=False, log_to_driver=False, _temp_dir=asked["temporary"])
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": asked["port"]}, logging_config=_QUIET)
        serve.run(_build(asked))
        asyncio.run(_until_stopped())
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
