"""Time the cascade search on one core: `python -m benchmarks.search [--result FILE]`.

The records are made up: 20,000 rows, models each four times the work of the one before, which get better with cost and
whose certainties say something, but not all, about being right.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from statistics import median

# One core, as in the planner's budget: no thread pools behind numpy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import click
import numpy as np

from cascadeserve.artefacts import write_json
from planner.ladder import ladder
from planner.records import ModelAnswers, SearchRecords
from planner.search import reference_model, search

_NUM_ROWS = 20_000
_REPEATS = 5


def made_up_family(
    num_rows: int, num_models: int, seed: int = 1, *, gain: float = 0.8
) -> tuple[SearchRecords, dict[str, float]]:
    """Records of `num_models` models and the device-seconds one row costs each; `gain` is from model to model."""
    rng = np.random.default_rng(seed)
    truth, hardness = rng.integers(0, 10, num_rows), 1.2 * rng.normal(size=num_rows)
    models = {}
    for index in range(num_models):
        margin = 1.2 + gain * index - hardness + 0.7 * rng.normal(size=num_rows)
        certainty = 1 / (1 + np.exp(-np.abs(margin) - 0.3 * rng.normal(size=num_rows)))
        label = np.where(margin > 0, truth, (truth + 1) % 10)
        models[f"model{index}"] = ModelAnswers(label, certainty.astype(np.float32))
    records = SearchRecords("made-up", models, truth, np.arange(num_rows))
    return records, {name: 1e-4 * 4.0**index for index, name in enumerate(models)}


def measured(num_models: int, *, any_order: bool = False) -> dict[str, float]:
    """Median seconds of a search to depth 3 (on the clock and of the processor) and of choosing the ladder."""
    records, row_work_s = made_up_family(_NUM_ROWS, num_models)
    wall_s, cpu_s, ladder_s = [], [], []
    for _ in range(_REPEATS):
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        candidates = search(records, row_work_s, depth=3, any_order=any_order)
        wall_s.append(time.perf_counter() - started_s)
        cpu_s.append(time.process_time() - started_cpu_s)
        started_s = time.perf_counter()
        entries = ladder(candidates, reference=reference_model(records))
        ladder_s.append(time.perf_counter() - started_s)
    return {
        "num_models": num_models,
        "search_s": median(wall_s),
        "search_cpu_s": median(cpu_s),
        "ladder_s": median(ladder_s),
        "num_candidates": len(candidates),
        "num_entries": len(entries),
    }


@click.command()
@click.option("--result", type=click.Path(path_type=Path), default=Path("benchmarks/results/local/search.json"))
def main(result: Path) -> None:
    """Write the seconds that search and ladder take for four and five models."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    runs = {
        "four_models": measured(4),
        "five_models": measured(5),
        "four_models_any_order": measured(4, any_order=True),
        "five_models_any_order": measured(5, any_order=True),
    }
    write_json(result, {"num_rows": _NUM_ROWS, "depth": 3, "repeats": _REPEATS, "runs": runs})
    for name, run in runs.items():
        print(f"{name}: search {run['search_s']:.2f} s, ladder {run['ladder_s']:.2f} s")


if __name__ == "__main__":
    main()
