"""Measure the exported family: `python -m examples.digits.measure` prints what this folder's README quotes.

Accuracy on search rows and on the image-disjoint test set, escalation from the small CNN to the residual network, and
time per row on one thread. Needs no PyTorch.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

from examples.digits.data import rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

MODELS = ("digits_linear", "digits_mlp", "digits_cnn", "digits_resnet_int8", "digits_resnet")
_SMALL, _LARGE = "digits_cnn", "digits_resnet"
_BATCH = 32
_REPEATS = 21


def _session(repository: Path, model: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    path = repository / model / "1" / "model.onnx"
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _answers(
    session: ort.InferenceSession, inputs: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    parts = [
        session.run(["label", "certainty"], {"image": inputs[start : start + _BATCH]})
        for start in range(0, len(inputs), _BATCH)
    ]
    return np.concatenate([part[0] for part in parts])[:, 0], np.concatenate([part[1] for part in parts])[:, 0]


def _row_ms(session: ort.InferenceSession, inputs: NDArray[np.float32]) -> float:
    """Median milliseconds per row."""
    times_s = []
    for _ in range(_REPEATS):
        started_s = time.perf_counter()
        session.run(["label"], {"image": inputs})
        times_s.append(time.perf_counter() - started_s)
    return float(np.median(times_s)) / len(inputs) * 1e3


@click.command()
@click.option("--repository", type=click.Path(path_type=Path), default="model_repository", show_default=True)
@click.option("--rows", "num_rows", type=click.IntRange(min=100), default=10_000, show_default=True)
def main(repository: Path, num_rows: int) -> None:
    """Print the tables."""
    console = Console()
    search, test = rows("search", num_rows), rows("test", 3_600)
    table = Table("model", "search rows", "test images", "ms per row, batch 1", f"ms per row, batch {_BATCH}")
    found = {}
    for model in track(MODELS, console=Console(stderr=True), transient=True):
        session = _session(repository, model)
        found[model] = _answers(session, search.inputs)
        on_test = float(np.mean(_answers(session, test.inputs)[0] == test.labels))
        table.add_row(
            model,
            f"{np.mean(found[model][0] == search.labels):.2%}",
            f"{on_test:.2%}",
            f"{_row_ms(session, search.inputs[:1]):.3f}",
            f"{_row_ms(session, search.inputs[:_BATCH]):.3f}",
        )
    console.print(table)
    reference = np.mean(found[_LARGE][0] == search.labels)
    label, certainty = found[_SMALL]
    table = Table("threshold", "rows that go on", "points below the largest model", title=f"{_SMALL} -> {_LARGE}")
    for threshold in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95):
        goes_on = certainty < threshold
        accuracy = np.mean(np.where(goes_on, found[_LARGE][0], label) == search.labels)
        table.add_row(f"{threshold:g}", f"{goes_on.mean():.1%}", f"{100 * (reference - accuracy):.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
