from __future__ import annotations

from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import msgspec
import pytest

from cascadeserve import cli
from cascadeserve.artefacts import write_json
from cascadeserve.cluster import read_cluster
from planner.explain import explain_plan
from planner.explain_layouts import gb, scaling_sentence, serves_sentence
from tests.fakes import tiny
from tests.fakes.plans import make_profile

if TYPE_CHECKING:
    from pathlib import Path

    from cascadeserve.cluster import Cluster
    from planner.profile import Profile

CLUSTER = """schema_version = 1
[[endpoints]]
name = "a"
grpc = "127.0.0.1:8001"
http = "127.0.0.1:8000"
metrics = "127.0.0.1:8002"
device = { kind = "gpu" }
device_kind = "l4"
memory_bytes = 8_000_000_000
cost_per_hour = 3.0
[[endpoints]]
name = "b"
grpc = "127.0.0.1:9001"
http = "127.0.0.1:9000"
metrics = "127.0.0.1:9002"
device = { kind = "cpu", cores = [0] }
cost_per_hour = 0.6
"""
BUSY_S = {"small": [[1, 0.001], [64, 0.002]], "large": [[1, 0.002], [64, 0.010]]}


def document() -> dict[str, Any]:
    """The tiny plan in three layouts of two kinds of device: a large model on b, in exchange for it small ones."""
    made = tiny.plan_document(("a", "b"))
    family = made["families"]["family"]
    models = family["models"]
    models["small"]["busy_s_on"], models["large"]["busy_s_on"] = {"b": [[1, 0.003], [64, 0.1]]}, {"b": [[64, 0.4]]}
    family["expected"] = {
        "rate_prior": [[500.0, 1.0]], "accuracy": 0.9, "accuracy_over_time": 0.9, "gears": {},
    }  # fmt: skip
    family["gears"].append(family["gears"][2] | {"name": "huge.wide", "layout": "huge", "max_rate_per_s": 8000.0})
    family["gears"].append(
        family["gears"][2] | {"name": "huge.cascade", "layout": "huge", "min_rate_per_s": 8000.0, "max_rate_per_s": 9e3}
    )
    made["layouts"] = [
        {"name": "narrow", "instances": {"a": {"small": 1, "large": 1}, "b": {"large": 1}}},
        {"name": "broad", "instances": {"a": {"small": 1, "large": 1}, "b": {"small": 2}}},
        {"name": "huge", "instances": {"a": {"small": 1, "large": 2}, "b": {"small": 2}}},
    ]
    unload = {"endpoint": "b", "model": "large", "present": 1, "wanted": 0}
    load = {"endpoint": "b", "model": "small", "present": 0, "wanted": 2}
    grow = {"endpoint": "a", "model": "large", "present": 1, "wanted": 2}
    made["transitions"] = [
        {
            "from_layout": "narrow", "to_layout": "broad", "gears": {"family": "busy"}, "steps": [unload, load],
            "duration_s": 3.0, "least_rate_per_s": {"family": 900.0},
        },
        {
            "from_layout": "broad", "to_layout": "narrow", "gears": {"family": "wide"},
            "steps": [
                load | {"present": 2, "wanted": 0}, unload | {"present": 0, "wanted": 1},
            ],
            "duration_s": 2.0, "least_rate_per_s": {"family": 850.0},
        },
        {
            "from_layout": "broad", "to_layout": "huge", "gears": {"family": "wide"}, "steps": [grow],
            "duration_s": 2.0, "least_rate_per_s": {"family": 5000.0},
        },
    ]  # fmt: skip
    return made


def sized(kind: str) -> Profile:
    """Profile with a large model of 3 GB and a small one of 0.5 GB."""
    profile = make_profile(BUSY_S)
    sizes = {"small": 500_000_000, "large": 3_000_000_000}
    models = {name: msgspec.structs.replace(each, memory_bytes=sizes[name]) for name, each in profile.models.items()}
    return msgspec.structs.replace(profile, models=models, device_kind=kind)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    (tmp_path / "cluster.toml").write_text(CLUSTER)
    return read_cluster(tmp_path / "cluster.toml")


def test_the_text_tells_layouts_transitions_memory_and_cost(cluster: Cluster) -> None:
    plan = tiny.plan(document())
    profiles = {kind: sized(kind) for kind in ("l4", "cpu")}
    lines = [part for part in explain_plan(plan, cluster, profiles) if isinstance(part, str)]
    assert "gears of layout narrow" in lines
    assert "layout narrow: a: 1 x small, 1 x large (3.5 of 8 GB); b: 1 x large (3 GB)" in lines
    assert "from layout narrow to layout broad: unload large on b; load 2 instances of small on b" in lines
    assert "from layout broad to layout huge: bring large on a from 1 to 2 instances" in lines
    up, down, onward = (line for line in lines if "Meanwhile" in line)
    assert "Meanwhile gear busy serves, as cascade, with device time for at least 900 rows/s at every moment." in up
    assert "That is less than the 1,000 rows/s at which it begins" in up
    assert "The loads take 3 s together" in up
    # it begins below 800, and the next one at 4,000
    assert "That is less" not in down + onward
    # a name that tells the entry is not explained
    assert any("gear huge.cascade\n" in f"{line}\n" for line in lines)
    assert "b takes 40.00 times as long for large as endpoints of the first kind" in lines
    cost = next(line for line in lines if "per hour" in line)
    assert "The endpoints cost 3.60 per hour" in cost
    assert "1 at the highest rate of layout narrow (1,000 rows/s), 0.25 at the highest rate of layout broad" in cost
    assert cost.endswith("and 2 at the mean of the rates of the goal.")


def test_without_cluster_and_profiles_less_is_told(cluster: Cluster) -> None:
    plan = tiny.plan(document())
    bare = [part for part in explain_plan(plan, None, {}) if isinstance(part, str)]
    assert "layout narrow: a: 1 x small, 1 x large; b: 1 x large" in bare
    assert not any("per hour" in line for line in bare)
    given = [part for part in explain_plan(plan, cluster, {}) if isinstance(part, str)]
    assert "layout narrow: a: 1 x small, 1 x large (? of 8 GB); b: 1 x large" in given


def test_when_layouts_come_and_go_in_words() -> None:
    plan = tiny.plan(document())
    family = plan.families["family"]
    low, middle, high = (serves_sentence(plan, family, layout.name) for layout in plan.layouts)
    assert low == (
        "This layout is left for layout broad once the demand has been above 1,000 rows/s for 1 s, and comes back once "
        "it has been below 800 for 10 s."
    )
    assert "comes once the demand has been above 1,000 rows/s for 1 s" in middle
    assert "is left for layout narrow once it has been below 800 rows/s for 10 s" in middle
    assert "is left for layout huge once it has been above 4,000 rows/s for 1 s" in middle
    assert high.endswith("is left for layout broad once it has been below 3,200 rows/s for 10 s.")
    one = tiny.plan_document()
    one["families"]["family"]["gears"] = one["families"]["family"]["gears"][2:]
    one["layouts"] = one["layouts"][1:]
    alone = tiny.plan(one)
    assert serves_sentence(alone, alone.families["family"], "broad") == ""


def test_why_nothing_is_said_of_one_endpoint_more() -> None:
    assert scaling_sentence("", "broad", several=True) == ""
    assert "under layout-1 does not follow from the plan alone, since x;" in scaling_sentence(
        "x", "layout-1", several=True
    )


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0"), (8_000_000_000, "8"), (7_920_000_000, "7.92"), (120_000, "0.00012"), (80_123_000_000, "80.1"),
     (1_234_000_000_000, "1,234")],
)  # fmt: skip
def test_gigabytes(size: int, words: str) -> None:
    assert gb(size) == words


def test_the_page_tells_the_same(cluster: Cluster) -> None:
    pytest.importorskip("jinja2", reason="needs the [examples] extra")
    from planner.explain_page import render_page  # noqa: PLC0415

    plan = tiny.plan(document())
    page = render_page(plan, cluster, {kind: sized(kind) for kind in ("l4", "cpu")})
    words = " ".join(" ".join(ET.fromstring(page).itertext()).replace("\N{NO-BREAK SPACE}", " ").split())
    for sentence in (
        "This layout is left for layout broad once the demand has been above 1,000 rows/s",
        "below 800: narrow", "above 4,000: huge",
        "l4 (a) cpu (b)", "64 rows: 400 ms",
        "memory taken 3.5 of 8 GB 3 GB",
        "From layout narrow to layout broad", "load 2 instances of small on b",
        "What it costs", "The endpoints cost 3.60 per hour",
    ):  # fmt: skip
        assert sentence in words, sentence
    assert "What it costs" not in render_page(plan, None, {})


def refused(folder: Path, *options: str) -> int | str | None:
    write_json(folder / "plan.json", document())
    with pytest.raises(SystemExit) as stopped:
        cli.main(["explain", str(folder / "plan.json"), *options])
    return stopped.value.code


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("version", "kind", "with_cluster", "words"),
    [
        (1, "l4", False, "give --cluster too"),
        (1, "tpu", True, "no endpoint is of device kind 'tpu'"),
        (2, "l4", True, "is another one in the plan than in the profile"),
    ],
)
def test_profiles_that_do_not_belong_to_the_plan_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], version: int, kind: str, with_cluster: bool, words: str
) -> None:
    profile = sized(kind)
    models = {name: msgspec.structs.replace(each, version=version) for name, each in profile.models.items()}
    write_json(tmp_path / "profile.json", msgspec.structs.replace(profile, models=models))
    options = [f"--profile={tmp_path / 'profile.json'}"]
    if with_cluster:
        options.append(f"--cluster={tmp_path / 'cluster.toml'}")
    assert refused(tmp_path, *options) == 2
    assert words in " ".join(capsys.readouterr().err.split())
