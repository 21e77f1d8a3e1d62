from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

pytest.importorskip("jinja2", reason="needs the [examples] extra")

from cascadeserve import cli
from cascadeserve.artefacts import write_json
from planner.derived import layout_rates
from planner.explain_page import render_page
from planner.explain_pictures import draw_front, draw_rates, marks, step_within
from tests.fakes import tiny

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits" / "gear_plan.json"
CLUSTER = """schema_version = 1
[[endpoints]]
name = "a"
grpc = "127.0.0.1:8001"
http = "127.0.0.1:8000"
metrics = "127.0.0.1:8002"
device = { kind = "gpu" }
slots = 2
"""
HOSTILE = "<script>alert('x')</script>&\"quoted\""
EVIL = "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&amp;&#34;quoted&#34;"


def certified(endpoints: tuple[str, ...] = ("a",)) -> dict[str, Any]:
    """The tiny plan as the planner would write it: accuracies, bounds, predictions, a prior, where it comes from."""
    document = tiny.plan_document(endpoints)
    family = document["families"]["family"]
    for entry, accuracy, epsilon in zip(family["ladder"], (0.95, 0.94), (0.0, 0.0123), strict=True):
        entry |= {"accuracy": accuracy, "epsilon": epsilon}
    for gear in family["gears"][:3]:
        gear["predicted"] = {
            "sustained_rate_per_s": gear["max_rate_per_s"] / 0.9, "p50_s": 0.1, "p95_s": 0.3, "p99_s": 0.4,
            "worst_s": 0.35, "accuracy": 0.94, "utilisation": 0.85, "ended_by": "sustained",
        }  # fmt: skip
    family["certificate"] = {
        "epsilon": 0.0123, "delta": 0.05, "rows": 6000, "method": "clopper_pearson", "ladder_digest": "sha256:1",
        "records_digest": "sha256:2", "reference_accuracy": 0.951, "assumptions": ["Rows stay as they are."],
    }  # fmt: skip
    family["expected"] = {
        "rate_prior": [[50.0, 0.75], [500.0, 0.25]], "accuracy": 0.94, "accuracy_over_time": 0.945,
        "gears": {"calm": 0.2, "busy": 0.8},
    }  # fmt: skip
    document["made_from"] = {
        "planner_version": "0.1.0", "policy": "cascade", "seed": 7, "digests": {"goal": "sha256:3"},
    }  # fmt: skip
    return document


def two_families() -> dict[str, Any]:
    document = certified()
    text = tiny.plan_document()["families"]["family"]
    other = {"small": "tiny", "large": "huge"}
    text["models"] = {other[name]: model for name, model in text["models"].items()}
    text["reference_model"] = "huge"
    for entry in text["ladder"]:
        for stage in entry["stages"]:
            stage["model"] = other[stage["model"]]
    text["gears"][1]["triggers"] = {"tiny": text["gears"][1]["triggers"]["small"]}
    document["families"]["other"] = text
    for layout in document["layouts"]:
        layout["instances"]["a"] |= {"tiny": 1, "huge": 3}
    return document


class Reader(HTMLParser):
    """Text of a page, and everything in it that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "poster", "action", "srcset") and value:
                self.loads.append(value)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    return reader


@pytest.mark.parametrize(
    "document", [tiny.plan_document(), certified(), certified(("a", "b", "c")), two_families()],
    ids=["by hand", "certified", "three endpoints", "two families"],
)  # fmt: skip
def test_the_page_is_well_formed_names_everything_and_loads_nothing(document: dict[str, Any]) -> None:
    page = render_page(tiny.plan(document), None, {})
    ET.fromstring(page)
    reader = read(page)
    assert [load for load in reader.loads if not load.startswith("#")] == []
    assert not re.search(r"url\((?!#)|@import|https?:", page)
    assert not reader.tags & {"script", "link", "img", "iframe", "object", "base"}
    text = " ".join(reader.words)
    for family in document["families"].values():
        for named in (*family["ladder"], *family["gears"]):
            assert named["name"] in text
        for model in family["models"]:
            assert model in text
    # said only where it means something
    assert ("of several the one decides" in text) == (len(document["families"]) > 1)
    for layout in document["layouts"]:
        assert layout["name"] in text
        for endpoint in layout["instances"]:
            assert endpoint in text


def words_of(page: str) -> str:
    return " ".join(" ".join(read(page).words).replace("\N{NO-BREAK SPACE}", " ").split())


def test_the_page_says_what_the_plan_promises_and_what_it_assumes() -> None:
    text = words_of(render_page(tiny.plan(certified()), None, {}))
    for sentence in (
        "Planned for up to 4,000 rows per second on 1 endpoint, with 95% of the requests within 500 ms, and certified",
        "to lose at most 1.23 points of accuracy against large.",
        "on rows like the 6,000 calibration rows, with probability 0.95",
        "Rows stay as they are.",
        "reference model large",
        "Device time: sustains",
        "8 to 32 rows, or after 10.0 ms",
        "Takes whatever is above; requests that would come too late are refused.",
        "1 endpoint sustains 4,444 rows/s under layout broad . One more would bring that to about 8,889",
        "Planner 0.1.0, policy cascade, seed 7.",
        "sha256:3",
        "80.0% of rows",
    ):
        assert sentence.replace(" .", ".") in text.replace(" .", "."), sentence


def test_a_plan_by_hand_promises_less() -> None:
    text = words_of(render_page(tiny.plan(), None, {}))
    assert "Nothing is certified: this is a draft" in text
    assert "The plan does not say what it was made from." in text
    assert "What ends its range" not in text
    assert "reference model" not in text


def test_the_example_is_readable() -> None:
    from cascadeserve.gear_plan import read_gear_plan  # noqa: PLC0415

    page = render_page(read_gear_plan(EXAMPLE), None, {})
    ET.fromstring(page)
    assert "calm-overload" in page


def test_hostile_texts_are_escaped() -> None:
    document = certified()
    family = document["families"]["family"]
    family["certificate"]["assumptions"] = [HOSTILE]
    family["certificate"]["method"] = HOSTILE
    family["certificate"]["ladder_digest"] = HOSTILE
    document["made_from"] = {
        "planner_version": HOSTILE, "policy": HOSTILE, "seed": 1, "digests": {HOSTILE: HOSTILE},
    }  # fmt: skip
    page = render_page(tiny.plan(document), None, {})
    ET.fromstring(page)
    assert "script" not in read(page).tags
    assert page.count(EVIL) == 7


def test_the_same_plan_gives_the_same_bytes() -> None:
    assert render_page(tiny.plan(certified()), None, {}) == render_page(tiny.plan(certified()), None, {})


def explain(folder: Path, *options: str) -> None:
    cli.main(["explain", str(folder / "plan.json"), *options])


def test_explain_writes_the_page_beside_the_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "plan.json", certified())
    (tmp_path / "cluster.toml").write_text(CLUSTER)
    page = tmp_path / "deep" / "plan.html"
    explain(tmp_path, f"--html={page}", f"--cluster={tmp_path / 'cluster.toml'}")
    shown = capsys.readouterr().out
    assert "gears of layout narrow" in shown
    assert "p50 100 ms, p95 300 ms, p99 400 ms" in " ".join(shown.split())
    assert "GPU, 2 slots" in page.read_text()
    assert "p50 100 ms p95 300 ms p99 400 ms" in words_of(page.read_text())


def test_a_cluster_that_lacks_an_endpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "plan.json", certified(("a", "b")))
    (tmp_path / "cluster.toml").write_text(CLUSTER)
    page = tmp_path / "plan.html"
    with pytest.raises(SystemExit) as stopped:
        explain(tmp_path, f"--html={page}", f"--cluster={tmp_path / 'cluster.toml'}")
    assert stopped.value.code == 2
    assert "is no endpoint of the cluster" in capsys.readouterr().err
    assert not page.exists()


def test_a_missing_package_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(tmp_path / "plan.json", certified())
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(SystemExit) as stopped:
        explain(tmp_path, f"--html={tmp_path / 'plan.html'}")
    assert stopped.value.code == 2
    assert "cascadeserve[examples]" in capsys.readouterr().err
    # the text needs no package
    explain(tmp_path)


def test_bands_tile_the_axis() -> None:
    plan = tiny.plan(certified())
    family = plan.families["family"]
    mark_of = {entry.name: mark for entry, mark in zip(family.ladder, marks(2), strict=True)}
    rates = layout_rates(plan, family)
    narrow, broad = (draw_rates(family, layout, mark_of, 4000.0, rates) for layout in ("narrow", "broad"))
    assert [band.left for band in narrow.bands] == [0.0, narrow.bands[0].right]
    assert broad.bands[-1].right == pytest.approx(100.0)
    # both on one axis
    assert narrow.bands[-1].right == pytest.approx(broad.bands[0].right / 4)
    assert broad.slo is not None
    level = broad.bands[0].level
    assert level is not None
    assert broad.band_bottom < broad.slo < level.worst < level.p95 < level.p50 < broad.axis
    assert [bar.height for bar in broad.prior] == pytest.approx([34.0, 34.0 / 3])
    # both rates are below 800, where the narrow layout comes back
    assert [[bar.here for bar in each.prior] for each in (narrow, broad)] == [[True, True], [False, False]]
    assert [leave.label for leave in (*narrow.leaves, *broad.leaves)] == ["above 1,000: broad", "below 800: narrow"]
    assert narrow.leaves[0].at == pytest.approx(narrow.bands[-1].right)


def test_the_front_has_the_accurate_above_and_the_dear_to_the_right() -> None:
    family = tiny.plan(certified()).families["family"]
    mark_of = {entry.name: mark for entry, mark in zip(family.ladder, marks(2), strict=True)}
    front = draw_front(family, mark_of, {"reference": 0.002, "cascade": 0.0005})
    assert front is not None
    dear, cheap = front.points
    assert (dear.name, dear.is_reference, cheap.is_reference) == ("reference", True, False)
    assert dear.at > cheap.at
    assert dear.y < cheap.y
    assert len(front.legs) == 1
    # the same accuracy and one entry are no trouble
    assert draw_front(tiny.plan().families["family"], mark_of, {}) is None


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_marks_are_told_apart(count: int) -> None:
    made = marks(count)
    assert [mark.number for mark in made] == list(range(1, count + 1))
    assert len({mark.fill for mark in made}) == count


@pytest.mark.parametrize(
    ("span", "most", "step"), [(1113.0, 5, 500.0), (1000.0, 5, 200.0), (0.0047, 4, 0.002), (3, 3, 1)]
)
def test_steps_are_round(span: float, most: int, step: float) -> None:
    assert step_within(span, most) == pytest.approx(step)
