"""Draw docs/demo.svg from the records that `make demo` left: `python -m benchmarks.demo_figure`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
import msgspec
import numpy as np

mpl.use("svg")
import matplotlib.pyplot as plt

_BIN_S = 0.5
# shorter spans have no room for their name
_NAMED_FROM_S = 1.5
_COLOURS = {"reference": "#4c72b0", "careful": "#55a868", "brisk": "#dd8452", "overload": "#c44e52", "hasty": "#c44e52"}


def _colour(gear: str) -> str:
    return next((colour for word, colour in _COLOURS.items() if word in gear), "#8c8c8c")


def _percentile(times_s: Any, values: Any, edges: Any, q: float) -> Any:  # noqa: ANN401
    bins = np.digitize(times_s, edges) - 1
    parts = [values[bins == i] for i in range(len(edges) - 1)]
    return np.array([np.percentile(part, q) if len(part) else np.nan for part in parts])


@click.command()
@click.option("--demo", "folder", type=click.Path(path_type=Path, exists=True), default="demo", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default="docs/demo.svg", show_default=True)
def main(folder: Path, output: Path) -> None:
    """Rate, latency and gears of the burst over time."""
    report = msgspec.json.decode((folder / "report.json").read_bytes())
    with np.load(folder / "cascade.npz") as arrays:
        scheduled_s, done_s, outcome = arrays["scheduled_s"], arrays["done_s"], arrays["outcome"]
        answered = np.char.startswith(arrays["outcome_names"][outcome], "answered")
    edges = np.arange(0.0, scheduled_s.max() + _BIN_S, _BIN_S)
    middle = (edges[:-1] + edges[1:]) / 2
    plt.rcParams["svg.hashsalt"] = "demo"  # the same records give the same file
    figure, (rate, latency) = plt.subplots(2, 1, sharex=True, figsize=(8, 5), layout="constrained")
    cascade = report["cascade"]
    for axis in (rate, latency):
        for span in cascade["gears"]:
            axis.axvspan(span["start_s"], span["end_s"], color=_colour(span["gear"]), alpha=0.15, linewidth=0)
        axis.spines[["top", "right"]].set_visible(False)
    for span in cascade["gears"]:
        if span["end_s"] - span["start_s"] > _NAMED_FROM_S:
            centre = (span["start_s"] + span["end_s"]) / 2
            rate.text(centre, 1.0, span["gear"].replace("-", "\n"), transform=rate.get_xaxis_transform(), ha="center",
                      va="bottom", fontsize=8, color=_colour(span["gear"]))  # fmt: skip
    rate.step(middle, np.histogram(scheduled_s, edges)[0] / _BIN_S, where="mid", color="#333333")
    rate.set_ylabel("rows per second")
    rate.set_ylim(bottom=0)
    taken_s = (done_s - scheduled_s)[answered] * 1e3
    for q, style in ((50, "-"), (95, "--")):
        values = _percentile(scheduled_s[answered], taken_s, edges, q)
        latency.plot(middle, values, style, color="#333333", label=f"p{q}")
    latency.axhline(cascade["slo_s"] * 1e3, color="#c44e52", linewidth=1, label="SLO")
    latency.set_ylabel("latency, ms")
    latency.set_xlabel("seconds")
    latency.set_ylim(bottom=0)
    latency.legend(frameon=False, ncols=3, loc="upper left")
    figure.savefig(output, metadata={"Date": None})
    figure.savefig(folder / "figure.png", dpi=110)


if __name__ == "__main__":
    main()
