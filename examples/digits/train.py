"""Train the digits models and write `weights/`: `python -m examples.digits.train [--only NAME]`.

Nothing trains on first use: the weights are committed. Seeds are fixed; results still differ in the last digits from
one processor or PyTorch version to another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save
from torch import nn

from cascadeserve.artefacts import write_atomically
from examples.digits import models
from examples.digits.data import rows
from examples.digits.family import WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Callable

_BATCH = 128
_EVALUATION_ROWS = 4_000
_SEED = 7


@dataclass(frozen=True)
class _Recipe:
    build: Callable[[], nn.Module]
    # every epoch shows this many fresh distortions of training images
    rows_per_epoch: int
    epochs: int
    peak_rate: float


_RECIPES = {
    "digits_linear": _Recipe(models.build_linear, 20_000, 12, 3e-3),
    "digits_mlp": _Recipe(models.build_mlp, 20_000, 12, 4e-3),
    "digits_cnn": _Recipe(models.build_cnn, 20_000, 12, 6e-3),
    "digits_resnet": _Recipe(models.build_resnet, 12_800, 14, 4e-3),
}


def _train(name: str, recipe: _Recipe) -> nn.Module:
    torch.manual_seed(_SEED)
    model = recipe.build().to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=1e-3)
    steps = recipe.epochs * (recipe.rows_per_epoch // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.peak_rate, total_steps=steps)
    # bfloat16 is several times faster on processors that have it; only the large model is worth its rounding
    mixed = name == "digits_resnet"
    for epoch in track(range(recipe.epochs), description=name):
        part = rows("train", recipe.rows_per_epoch, seed=_SEED * 1_000 + epoch)
        inputs = torch.from_numpy(part.inputs).to(memory_format=torch.channels_last)
        labels = torch.from_numpy(part.labels)
        for batch, target in zip(inputs.split(_BATCH), labels.split(_BATCH), strict=True):
            if len(target) < _BATCH:
                break
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
                loss = nn.functional.cross_entropy(model(batch), target, label_smoothing=0.02)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return model.eval()


def _accuracy(model: nn.Module) -> float:
    part = rows("test", _EVALUATION_ROWS)
    with torch.inference_mode():
        answers = [model(batch).argmax(1) for batch in torch.from_numpy(part.inputs).split(_BATCH)]
    return float(np.mean(torch.cat(answers).numpy() == part.labels))


@click.command()
@click.option("--only", type=click.Choice(list(_RECIPES)), default=None, help="Train one model.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
def main(only: str | None, threads: int) -> None:
    """Train, print the accuracy on images that were never trained on, write the weights."""
    torch.set_num_threads(threads)
    WEIGHTS.mkdir(exist_ok=True)
    for name, recipe in _RECIPES.items():
        if only not in (None, name):
            continue
        model = _train(name, recipe)
        Console().print(f"{name}: {_accuracy(model):.4f} on {_EVALUATION_ROWS} rows of test images")
        tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
        write_atomically(WEIGHTS / f"{name}.safetensors", save(tensors))


if __name__ == "__main__":
    main()
