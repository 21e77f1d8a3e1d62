"""The demo's page: one HTML file that needs nothing else, with the plots as SVG in it."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import jinja2
import matplotlib as mpl
from markupsafe import Markup

from cascadeserve.artefacts import write_atomically
from cascadeserve.demo.figures import TITLES, draw

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

    from cascadeserve.demo.report import DemoReport


def write_page(report: DemoReport, output: Path) -> None:
    """Write `report.html` and, for the README, `timeline.svg`."""
    svgs = {name: _svg(name, figure) for name, figure in draw(report).items()}
    write_atomically(output / "timeline.svg", svgs["timeline"].encode())
    write_atomically(output / "report.html", render(report, svgs).encode())


def render(report: DemoReport, svgs: dict[str, str]) -> str:
    """Text of the page; `svgs` by figure name, each a whole SVG document."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cascadeserve.demo", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"percent": _percent, "milliseconds": _milliseconds, "rate": _rate}
    plots = {name: Markup(svg[svg.index("<svg") :]) for name, svg in svgs.items()}  # noqa: S704 - matplotlib escapes
    systems = [(title.replace("\n", " "), getattr(report, name)) for name, title in TITLES.items()]
    return environment.get_template("page.html.jinja").render(report=report, plots=plots, systems=systems)


def _svg(name: str, figure: Figure) -> str:
    text = io.StringIO()
    # the same figure gives the same file; figures of one page must not share ids
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _percent(share: float | None, digits: int = 2) -> str:
    return "-" if share is None else f"{share * 100:.{digits}f}\N{NO-BREAK SPACE}%"


def _milliseconds(value_s: float | None, digits: int = 1) -> str:
    return "-" if value_s is None else f"{value_s * 1e3:.{digits}f}\N{NO-BREAK SPACE}ms"


def _rate(rows_per_s: float | None) -> str:
    return "-" if rows_per_s is None else f"{rows_per_s:,.0f}"
