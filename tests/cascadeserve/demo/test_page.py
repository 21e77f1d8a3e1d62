from __future__ import annotations

import importlib.util
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest

if importlib.util.find_spec("matplotlib") is None or importlib.util.find_spec("jinja2") is None:
    pytest.skip("needs the [examples] extra", allow_module_level=True)

from cascadeserve.demo.page import write_page
from cascadeserve.demo.report import Pair, SloCurve, SystemResult
from tests.cascadeserve.demo import made_up

if TYPE_CHECKING:
    from pathlib import Path


class _Loads(HTMLParser):
    """All addresses that a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "poster", "action") and value:
                self.found.append(f"{tag} {value}")


def page(folder: Path, **changes: object) -> str:
    write_page(made_up.report(**changes), folder)
    return (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the page of a plain report."""
    folder = tmp_path_factory.mktemp("page")
    page(folder)
    return folder


def test_the_page_says_what_was_found_and_needs_nothing_else(drawn: Path) -> None:
    text = (drawn / "report.html").read_text()
    assert "3.95 times the rate of the largest model" in text
    assert "-0.31 points" in text
    assert "0.72 points" in text
    assert text.count("<svg") == 5
    loads = _Loads()
    loads.feed(text)
    assert [each for each in loads.found if " #" not in each] == []
    assert not re.search(r"url\((?!#)|@import", text)


def test_texts_are_escaped(drawn: Path) -> None:
    text = (drawn / "report.html").read_text()
    assert "Made &lt;up&gt;" in text
    assert "p95 of &lt;b&gt;too&lt;/b&gt; much" in text


def test_the_timeline_stands_alone_too(drawn: Path, tmp_path: Path) -> None:
    svg = (drawn / "timeline.svg").read_text()
    page(tmp_path)
    assert (tmp_path / "timeline.svg").read_text() == svg
    assert svg.startswith("<?xml")


def test_a_report_with_nothing_found_is_a_page_too(tmp_path: Path) -> None:
    nothing = SystemResult(
        sustained_rows_per_s=0.0, p95_s=None, accuracy=None, ledger=None, limited_by="generator",
        probes=(made_up.probe(100.0, 0.5, void=True),),
    )  # fmt: skip
    text = page(
        tmp_path, best_single=nothing, best_single_direct=nothing, cascade=nothing, certificate=None, saving=0.0,
        reference_accuracy=None, accuracy_drop=None, paired_answers=0,
        slo_curve=SloCurve(simulated=(), measured=(), left_out=()),
    )  # fmt: skip
    assert "the load generator could not keep up" in text
    assert "no certificate" in text


def test_pairs_are_listed(tmp_path: Path) -> None:
    pair = Pair(best_single_direct=380.0, best_single=430.0, cascade=1700.0, saving=3.95)
    text = page(tmp_path, tier="full", pairs=(pair,) * 5, saving_range=(3.8, 4.1))
    assert "3.80 to 4.10 over 5 pairs" in text
    assert text.count("<td>1,700</td>") >= 5


def test_the_curve_is_a_table_too_and_says_what_it_has_not(drawn: Path) -> None:
    text = (drawn / "report.html").read_text()
    assert "<td>40 x</td><td>80.0\N{NO-BREAK SPACE}ms</td>" in text
    assert "Left out: 3 x, simulated: no plan of the large model keeps the SLO." in text
