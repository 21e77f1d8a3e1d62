"""Train the texts models and write `weights/`: `python -m examples.texts.train [--only NAME]`.

Nothing trains on first use: the weights are committed. Seeds are fixed; results still differ with the installed
versions of the packages whose source is the text, and in the last digits from one processor to another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save
from torch import nn

from cascadeserve.artefacts import write_atomically
from examples.texts import grams, models, words
from examples.texts.data import rows
from examples.texts.family import WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    Preprocess = Callable[[Mapping[str, NDArray[np.generic]]], dict[str, NDArray[np.generic]]]

_BATCH = 64
_EVALUATION_ROWS = 6_000
_SEED = 7

# model -> preprocessing, build, rows per epoch (fresh ones in each), epochs, largest learning rate
_RECIPES: dict[str, tuple[Preprocess, Callable[[], nn.Module], int, int, float]] = {
    "texts_words": (words.preprocess, models.build_words, 20_000, 6, 1e-2),
    "texts_grams": (grams.preprocess, models.build_grams, 20_000, 5, 2e-3),
}


def _tensors(preprocess: Preprocess, texts: NDArray[np.bytes_]) -> torch.Tensor:
    (array,) = preprocess({"text": texts.astype(object)}).values()
    return torch.from_numpy(array)


def _train(name: str) -> nn.Module:
    preprocess, build, rows_per_epoch, epochs, peak_rate = _RECIPES[name]
    torch.manual_seed(_SEED)
    model = build().train()
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    steps = epochs * (rows_per_epoch // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak_rate, total_steps=steps)
    for epoch in track(range(epochs), description=name):
        part = rows("train", rows_per_epoch - rows_per_epoch % _BATCH, seed=_SEED * 1_000 + epoch)
        inputs, labels = _tensors(preprocess, part.inputs), torch.from_numpy(part.labels)
        for batch, target in zip(inputs.split(_BATCH), labels.split(_BATCH), strict=True):
            loss = nn.functional.cross_entropy(model(batch), target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return model.eval()


def _accuracy(name: str, model: nn.Module) -> float:
    part = rows("test", _EVALUATION_ROWS)
    with torch.inference_mode():
        answers = [model(batch).argmax(1) for batch in _tensors(_RECIPES[name][0], part.inputs).split(_BATCH)]
    return float(np.mean(torch.cat(answers).numpy() == part.labels))


@click.command()
@click.option("--only", type=click.Choice(list(_RECIPES)), default=None, help="Train one model.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
def main(only: str | None, threads: int) -> None:
    """Train, print the accuracy on files that were never trained on, write the weights."""
    torch.set_num_threads(threads)
    WEIGHTS.mkdir(exist_ok=True)
    for name in _RECIPES:
        if only not in (None, name):
            continue
        model = _train(name)
        Console().print(f"{name}: {_accuracy(name, model):.4f} on {_EVALUATION_ROWS} rows of test files")
        # in half precision, which changes hardly an answer
        tensors = {key: value.half().contiguous() for key, value in model.state_dict().items()}
        write_atomically(WEIGHTS / f"{name}.safetensors", save(tensors))


if __name__ == "__main__":
    main()
