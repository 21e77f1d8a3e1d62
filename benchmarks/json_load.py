"""A load of requests in plain JSON: `python -m benchmarks.json_load`, run by `benchmarks.isolation`.

`cascadeserve replay` sends tensors as binary data, as a client should; a server has to bear those that do not. Bodies
are what tritonclient makes without binary data: every number written out as a double.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import click
import msgspec
import numpy as np

from cascadeserve.artefacts import write_json
from cascadeserve.replay.client import Target, describe_model
from cascadeserve.replay.http_sender import HttpSender
from cascadeserve.replay.payload import Question, choose_outputs, match_inputs
from cascadeserve.replay.rows import Rows, choose_rows, read_rows
from cascadeserve.replay.run import Load, OpenLoop
from cascadeserve.replay.settings import LoadSettings, parse_range
from cascadeserve.replay.summary import summarise


class JsonSender(HttpSender):
    """Sends the same requests, all of them in JSON; one input."""

    def __init__(self, address: str, question: Question, rows: Rows) -> None:
        """`rows` are what the question's input holds."""
        super().__init__(address, question)
        (self._input,) = question.inputs
        values = rows.inputs[self._input.name]
        self._written = [msgspec.json.encode(row.reshape(-1).tolist())[1:-1] for row in values]
        host, path = self._target
        self._form = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n".encode()

    def _encode(self, request_id: str, rows: list[int]) -> bytes:
        head = msgspec.json.encode(
            {
                "id": request_id,
                "parameters": {"timeout": self._question.timeout_us},
                "outputs": [{"name": name} for name in self._question.outputs],
            }
        )
        shape = msgspec.json.encode([len(rows), *self._input.row_shape])
        body = b'%b,"inputs":[{"name":%b,"datatype":%b,"shape":%b,"data":[%b]}]}' % (
            head[:-1],
            msgspec.json.encode(self._input.name),
            msgspec.json.encode(self._input.datatype),
            shape,
            b",".join([self._written[row] for row in rows]),
        )
        return b"%bContent-Length: %d\r\n\r\n%b" % (self._form, len(body), body)


async def _run(url: str, model: str, rows: Rows, load: Load) -> OpenLoop:
    signature = await describe_model(Target("http", url), model)
    question = Question(model, match_inputs(rows, signature), choose_outputs(signature), load.timeout_s)
    sender = JsonSender(url, question, rows)
    loop = OpenLoop(load, sender)
    try:
        await loop.run()
    finally:
        await sender.close()
    return loop


@click.command()
@click.option("--url", required=True)
@click.option("--model", required=True)
@click.option("--rows", "rows_path", type=click.Path(path_type=Path), required=True)
@click.option("--rate", type=float, required=True, help="Rows per second.")
@click.option("--duration", type=float, required=True, help="Seconds.")
@click.option("--rows-per-request", default="1")
@click.option("--slo", type=float, required=True, help="Seconds; a request's deadline is four of them.")
@click.option("--seed", type=int, default=0)
@click.option("--report", "report_path", type=click.Path(path_type=Path), required=True)
def main(
    *, url: str, model: str, rows_path: Path, rate: float, duration: float, rows_per_request: str, slo: float,
    seed: int, report_path: Path,
) -> None:  # fmt: skip
    """Send a Poisson load, write its report."""
    per_request = parse_range(rows_per_request)
    arrivals_rng, rows_rng = (np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(2))
    settings = LoadSettings(rate_per_s=rate, duration_s=duration)
    scheduled_s, duration_s = settings.draw(sum(per_request) / 2, arrivals_rng)
    rows = read_rows(rows_path)
    chosen = choose_rows(len(rows), len(scheduled_s), rows_rng, per_request=per_request, shuffle=False)
    loop = asyncio.run(_run(url.rstrip("/"), model, rows, Load(scheduled_s, chosen, 4.0 * slo)))
    write_json(report_path, summarise(loop.records, labels=rows.labels, duration_s=duration_s, slo_s=slo))


if __name__ == "__main__":
    main()
