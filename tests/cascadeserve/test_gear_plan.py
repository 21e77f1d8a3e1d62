from __future__ import annotations

import json
from copy import deepcopy
from itertools import pairwise
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeserve.cluster import Cluster, CpuDevice, Endpoint
from cascadeserve.errors import InvalidArtefact
from cascadeserve.gear_plan import PlannedModel, Scheduling, read_gear_plan
from cascadeserve.policy.admission import ADMISSIONS
from cascadeserve.policy.balancing import BALANCERS
from cascadeserve.policy.ordering import ORDERS
from tests.fakes.tiny import plan_document

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Document = dict[str, Any]


def family_of(document: Document) -> Document:
    return document["families"]["family"]


def gear_of(document: Document, index: int) -> Document:
    return family_of(document)["gears"][index]


def written(folder: Path, document: Document) -> Path:
    path = folder / "plan.json"
    path.write_text(json.dumps(document))
    return path


def refusal(path: Path, cluster: Cluster | None = None) -> InvalidArtefact:
    with pytest.raises(InvalidArtefact) as caught:
        read_gear_plan(path, cluster)
    assert caught.value.path == path
    assert str(path) in str(caught.value)
    return caught.value


def test_the_tiny_plan_is_accepted_and_read_back_as_written(tmp_path: Path) -> None:
    plan = read_gear_plan(written(tmp_path, plan_document()))
    family = plan.families["family"]
    assert [gear.name for gear in family.gears_of("narrow")] == ["calm", "busy"]
    assert family.max_rate_per_s("narrow") == 1000.0
    assert family.max_rate_per_s("broad") == 4000.0, "a degraded gear adds nothing to what a layout is planned for"
    assert plan.layout("broad").instances == {"a": {"small": 1, "large": 2}}
    assert [stage.threshold for stage in family.entry("cascade").stages] == [0.5, None]


PREDICTED = {
    "sustained_rate_per_s": 120.0, "p50_s": 0.1, "p95_s": 0.3, "p99_s": 0.5, "worst_s": 0.4,
    "accuracy": 0.9, "utilisation": 0.8,
}  # fmt: skip


def test_evidence_is_read_back_and_may_be_left_out(tmp_path: Path) -> None:
    document = plan_document()
    bare = read_gear_plan(written(tmp_path, document))
    assert (bare.made_from, bare.families["family"].certificate, bare.families["family"].expected) == (None, None, None)
    certify(document, epsilon=0.004)
    gear_of(document, 0)["predicted"] = PREDICTED
    document["made_from"] = {"planner_version": "1", "policy": "cascade", "seed": 3, "digests": {"goal": "sha256:2"}}
    plan = read_gear_plan(written(tmp_path, document))
    family = plan.families["family"]
    assert family.certificate is not None
    assert family.certificate.epsilon == family.entry("cascade").epsilon == 0.004
    assert family.gears[0].predicted is not None
    assert plan.made_from is not None
    assert plan.made_from.seed == 3


def add_gear(document: Document, **changes: Any) -> None:
    family_of(document)["gears"].append({**gear_of(document, 0), **changes})


def second_family(document: Document) -> None:
    document["families"]["other"] = deepcopy(family_of(document))


def shares_of_too_much(document: Document) -> None:
    second_family(document)
    for family in document["families"].values():
        family["share"] = 0.6


def rename_family(document: Document) -> None:
    document["families"] = {"small": family_of(document)}


def certify(document: Document, *, epsilon: float) -> None:
    for entry, certified in zip(family_of(document)["ladder"], (0.0, 0.004), strict=True):
        entry["epsilon"] = certified
    family_of(document)["certificate"] = {
        "epsilon": epsilon,
        "delta": 0.05,
        "rows": 1000,
        "method": "clopper_pearson, bonferroni",
        "ladder_digest": "sha256:0",
        "records_digest": "sha256:1",
        "reference_accuracy": 0.9,
    }


FAMILY = "$.families[...]"  # msgspec names no keys
AT = "$.families.family"

# what is wrong -> (change to the valid document, field named, words in the message)
WRONG: dict[str, tuple[Callable[[Document], Any], str, str]] = {
    "unknown key": (lambda d: gear_of(d, 0).update(fast=True), f"{FAMILY}.gears[0]", "fast"),
    "missing key": (lambda d: gear_of(d, 0).pop("layout"), f"{FAMILY}.gears[0]", "layout"),
    "wrong type": (lambda d: family_of(d).update(slo_s="0.5"), f"{FAMILY}.slo_s", "float"),
    "number beyond any float": (lambda d: family_of(d).update(slo_s=10**400), f"{FAMILY}.slo_s", "range"),
    "negative time": (
        lambda d: gear_of(d, 1)["triggers"]["small"].update(max_wait_s=-0.1),
        f"{FAMILY}.gears[1].triggers[...].max_wait_s",
        ">= 0",
    ),
    "negative rate": (lambda d: gear_of(d, 0).update(min_rate_per_s=-1.0), f"{FAMILY}.gears[0].min_rate_per_s", ">= 0"),
    "batch in no time": (
        lambda d: family_of(d)["models"]["small"].update(busy_s=[[1, 0.0]]),
        f"{FAMILY}.models[...].busy_s[0][1]",
        "> 0",
    ),
    "sustained rate of zero": (
        lambda d: gear_of(d, 0).update(predicted=PREDICTED | {"sustained_rate_per_s": 0}),
        f"{FAMILY}.gears[0].predicted.sustained_rate_per_s",
        "> 0",
    ),
    "SLO of zero": (lambda d: family_of(d).update(slo_s=0.0), f"{FAMILY}.slo_s", "> 0"),
    "instance count of zero": (
        lambda d: d["layouts"][0]["instances"]["a"].update(small=0),
        "$.layouts[0].instances[...][...]",
        ">= 1",
    ),
    "newer schema": (lambda d: d.update(schema_version=2), "$.schema_version", "2"),
    "no family": (lambda d: d.update(families={}), "$.families", "length >= 1"),
    "dispersion below Poisson": (lambda d: family_of(d).update(dispersion=0.5), f"{FAMILY}.dispersion", ">= 1"),
    "reach of the wrong length": (
        lambda d: family_of(d)["ladder"][1].update(reach=[1.0]),
        f"{FAMILY}.ladder[1]",
        "one share per stage",
    ),
    "reach that does not start at 1": (
        lambda d: family_of(d)["ladder"][1].update(reach=[0.9, 0.3]),
        f"{FAMILY}.ladder[1]",
        "first of them 1.0",
    ),
    "threshold at the last stage": (
        lambda d: family_of(d)["ladder"][1]["stages"][1].update(threshold=0.5),
        f"{FAMILY}.ladder[1]",
        "last stage",
    ),
    "stage without threshold": (
        lambda d: family_of(d)["ladder"][1]["stages"][0].pop("threshold"),
        f"{FAMILY}.ladder[1]",
        "needs a threshold",
    ),
    "model in two stages": (
        lambda d: family_of(d)["ladder"][1]["stages"][1].update(model="small"),
        f"{FAMILY}.ladder[1]",
        "one stage",
    ),
    "trigger with min above max": (
        lambda d: gear_of(d, 1)["triggers"]["small"].update(min_batch=33),
        f"{FAMILY}.gears[1].triggers[...]",
        "min_batch",
    ),
    "busy times out of order": (
        lambda d: family_of(d)["models"]["small"].update(busy_s=[[64, 0.002], [1, 0.001]]),
        f"{FAMILY}.models[...]",
        "rising",
    ),
    "an endpoint's busy times out of order": (
        lambda d: family_of(d)["models"]["small"].update(busy_s_on={"a": [[64, 0.002], [1, 0.001]]}),
        f"{FAMILY}.models[...]",
        "rising",
    ),
    "no busy times for an endpoint": (
        lambda d: family_of(d)["models"]["small"].update(busy_s_on={"a": []}),
        f"{FAMILY}.models[...].busy_s_on[...]",
        "length >= 1",
    ),
    "busy times of an unknown endpoint": (
        lambda d: family_of(d)["models"]["small"].update(busy_s_on={"c": [[1, 0.001]]}),
        f"{AT}.models.small.busy_s_on.c",
        "no layout has",
    ),
    "unknown reference model": (lambda d: family_of(d).update(reference_model="huge"), f"{AT}.reference_model", "huge"),
    "unknown model in a stage": (
        lambda d: family_of(d)["ladder"][1]["stages"][1].update(model="huge"),
        f"{AT}.ladder[1].stages[1].model",
        "models are large, small",
    ),
    "unknown layout": (
        lambda d: gear_of(d, 0).update(layout="tall"),
        f"{AT}.gears[0].layout",
        "layouts are broad, narrow",
    ),
    "unknown ladder entry": (
        lambda d: gear_of(d, 0).update(ladder_entry="guess"),
        f"{AT}.gears[0].ladder_entry",
        "cascade, reference",
    ),
    "two layouts of one name": (lambda d: d["layouts"].append(d["layouts"][0]), "$.layouts[2].name", "narrow"),
    "two ladder entries of one name": (
        lambda d: family_of(d)["ladder"].append(family_of(d)["ladder"][0]),
        f"{AT}.ladder[2].name",
        "reference",
    ),
    "two gears of one name": (lambda d: gear_of(d, 1).update(name="calm"), f"{AT}.gears[1].name", "calm"),
    "empty range": (
        lambda d: gear_of(d, 0).update(min_rate_per_s=100.0),
        f"{AT}.gears[0].max_rate_per_s",
        "exceed min_rate_per_s",
    ),
    "gap between gears": (lambda d: gear_of(d, 1).update(min_rate_per_s=101.0), f"{AT}.gears", "'calm' ends at 100"),
    "overlap of gears": (lambda d: gear_of(d, 1).update(min_rate_per_s=99.0), f"{AT}.gears", "'busy' starts at 99"),
    "no gear for rate 0": (lambda d: gear_of(d, 0).update(min_rate_per_s=1.0), f"{AT}.gears", "rate 0"),
    "layout without gears": (
        lambda d: family_of(d).update(gears=family_of(d)["gears"][:2]),
        f"{AT}.gears",
        "layout 'broad'",
    ),
    "gear above the degraded one": (
        lambda d: add_gear(d, name="beyond", layout="broad", min_rate_per_s=5000.0, max_rate_per_s=6000.0),
        f"{AT}.gears",
        "'overload' ends at inf",
    ),
    "unlimited but not degraded": (
        lambda d: gear_of(d, 3).update(degraded=False),
        f"{AT}.gears[3].max_rate_per_s",
        "degraded",
    ),
    "degraded but limited": (
        lambda d: gear_of(d, 3).update(max_rate_per_s=5000.0),
        f"{AT}.gears[3].max_rate_per_s",
        "degraded",
    ),
    "layouts from large to small": (lambda d: d["layouts"].reverse(), "$.layouts", "lowest rates"),
    "trigger beyond the model": (
        lambda d: gear_of(d, 1)["triggers"]["small"].update(max_batch=65),
        f"{AT}.gears[1].triggers.small.max_batch",
        "64",
    ),
    "trigger of an unknown model": (
        lambda d: gear_of(d, 1)["triggers"].update(huge={"min_batch": 1, "max_batch": 1, "max_wait_s": 0.0}),
        f"{AT}.gears[1].triggers.huge",
        "no model",
    ),
    "model placed nowhere": (
        lambda d: d["layouts"][0]["instances"]["a"].pop("large"),
        f"{AT}.gears[0].ladder_entry",
        "'large', which layout 'narrow' places nowhere",
    ),
    "no endpoint with weight": (
        lambda d: gear_of(d, 0).update(load={"small": {"a": 0.0}}),
        f"{AT}.gears[0].load.small",
        "above 0",
    ),
    "weight for an endpoint without the model": (
        lambda d: gear_of(d, 0).update(load={"small": {"a": 1.0, "b": 1.0}}),
        f"{AT}.gears[0].load.small.b",
        "does not place",
    ),
    "layout with a foreign model": (
        lambda d: d["layouts"][0]["instances"]["a"].update(huge=1),
        "$.layouts[0].instances.a.huge",
        "no model of any family",
    ),
    "model in two families": (second_family, "$.families.other.models.small", "one family"),
    "family named like its model": (rename_family, "$.families.small", "has the name of a model"),
    "certificate that is not the largest epsilon": (
        lambda d: certify(d, epsilon=0.001),
        f"{AT}.certificate.epsilon",
        "the largest epsilon of the ladder, which is 0.004",
    ),
    "epsilon that nothing certifies": (
        lambda d: family_of(d)["ladder"][1].update(epsilon=0.004),
        f"{AT}.ladder[1].epsilon",
        "there is no certificate",
    ),
    "certified share beyond 1": (
        lambda d: family_of(d)["ladder"][1].update(epsilon=1.5),
        f"{FAMILY}.ladder[1].epsilon",
        "<= 1",
    ),
    "percentile in percent": (lambda d: family_of(d).update(percentile=95.0), f"{FAMILY}.percentile", "< 1"),
    # found missing when these tests were written
    "key that is no name": (
        lambda d: family_of(d)["models"].update({"no name": family_of(d)["models"]["small"]}),
        f"{FAMILY}.models",
        "regex",
    ),
    "name that ends in a line break": (lambda d: d.update(name="tiny\n"), "$.name", "regex"),
    "no share": (lambda d: family_of(d).update(share=0.0), f"{FAMILY}.share", "> 0.0"),
    "shares of more than there is": (shares_of_too_much, "$.families", "family 0.6, other 0.6; their shares must sum"),
    "layout with a degraded gear only": (
        lambda d: family_of(d).update(
            gears=[{**gear_of(d, 0), "max_rate_per_s": None, "degraded": True}, *family_of(d)["gears"][2:]]
        ),
        f"{AT}.gears",
        "degraded",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_plan_is_refused_with_file_field_and_reason(case: str, tmp_path: Path) -> None:
    change, field, words = WRONG[case]
    document = plan_document()
    change(document)
    error = refusal(written(tmp_path, document))
    assert error.field == field
    assert words in str(error)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b'{"schema_version": NaN}', b'{"schema_version": 1} {}', b'{"name": "\xff"}'],
    ids=["empty", "cut short", "a list", "null", "NaN", "trailing data", "not UTF-8"],
)
def test_what_is_no_json_object_is_refused_naming_the_file(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(data)
    refusal(path)


@pytest.mark.parametrize("name", ["absent.json", "."])
def test_what_cannot_be_read_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    assert "cannot be read" in str(refusal(tmp_path / name))


def cluster(*names: str) -> Cluster:
    endpoints = (
        Endpoint(name=name, grpc=f"{name}:1", http=f"{name}:2", metrics=f"{name}:3", device=CpuDevice(cores=(0,)))
        for name in names
    )
    return Cluster(schema_version=1, endpoints=tuple(endpoints))


def test_a_plan_may_leave_endpoints_unused_but_not_name_unknown_ones(tmp_path: Path) -> None:
    path = written(tmp_path, plan_document(("a",)))
    assert read_gear_plan(path, cluster("a", "b")).name == "tiny"
    error = refusal(path, cluster("b", "c"))
    assert error.field == "$.layouts[0].instances.a"
    assert "endpoints are b, c" in str(error)


def test_an_endpoint_of_another_kind_has_busy_times_of_its_own(tmp_path: Path) -> None:
    document = plan_document()
    family_of(document)["models"]["small"]["busy_s_on"] = {"a": [[1, 0.01], [64, 0.073]]}
    plan = read_gear_plan(written(tmp_path, document))
    model = plan.families["family"].models["small"]
    assert [model.batch_busy_s(64, endpoint) for endpoint in ("a", "b", None)] == [0.073, 0.002, 0.002]
    assert model.batch_busy_s(11, "a") == pytest.approx(0.02)


points = st.lists(st.tuples(st.integers(1, 4096), st.floats(0.0, 10.0)), min_size=1, max_size=8).map(
    lambda pairs: tuple(zip(sorted({rows for rows, _ in pairs}), sorted(seconds for _, seconds in pairs), strict=False))
)


@given(points, st.integers(1, 10_000))
def test_busy_time_is_exact_at_the_points_and_never_falls_with_rows(
    busy_s: tuple[tuple[int, float], ...], rows: int
) -> None:
    model = PlannedModel(max_batch=1, busy_s=busy_s)
    for point_rows, point_s in busy_s:
        assert model.batch_busy_s(point_rows) == pytest.approx(point_s)
    assert model.batch_busy_s(rows) <= model.batch_busy_s(rows + 1) * (1 + 1e-9) + 1e-12


@given(points, st.integers(1, 100))
def test_busy_time_between_points_lies_between_them_and_beyond_grows_by_row(
    busy_s: tuple[tuple[int, float], ...], factor: int
) -> None:
    model = PlannedModel(max_batch=1, busy_s=busy_s)
    for (low, low_s), (high, high_s) in pairwise(busy_s):
        assert low_s - 1e-9 <= model.batch_busy_s((low + high) // 2) <= high_s + 1e-9
    last_rows, last_s = busy_s[-1]
    assert model.batch_busy_s(last_rows * factor) == pytest.approx(last_s * factor)


def with_an_ensemble() -> Document:
    document = plan_document()
    family_of(document)["models"]["large"]["composed_of"] = {"tokens": 1, "classifier": 1}
    document["layouts"][0]["instances"]["a"] = {"small": 1, "tokens": 1, "classifier": 1}
    document["layouts"][1]["instances"]["a"] = {"small": 1, "tokens": 2, "classifier": 3}
    return document


def test_layouts_count_what_an_ensemble_is_composed_of(tmp_path: Path) -> None:
    plan = read_gear_plan(written(tmp_path, with_an_ensemble()))
    assert plan.ensembles == {"large": ("tokens", "classifier")}
    broad = plan.layout("broad")
    assert plan.standing(broad) == {"a": {"small": 1, "tokens": 2, "classifier": 3, "large": 1}}
    assert broad.count("a", "large", plan.ensembles["large"]) == 2
    assert broad.count("a", "small", ()) == 1
    assert broad.count("b", "small", ()) == 0


@pytest.mark.parametrize(
    ("change", "field", "what"),
    [
        (lambda d: d["layouts"][0]["instances"]["a"].pop("tokens"), "ladder_entry", "all that it is composed of"),
        (lambda d: d["layouts"][0]["instances"]["a"].update(large=1), "instances.a.large", "is an ensemble"),
        (
            lambda d: family_of(d)["models"]["large"].update(composed_of={"small": 1}),
            "models.small",
            "never called alone",
        ),
    ],
)
def test_an_ensemble_that_cannot_stand_is_refused(
    tmp_path: Path, change: Callable[[Document], object], field: str, what: str
) -> None:
    document = with_an_ensemble()
    change(document)
    error = refusal(written(tmp_path, document))
    assert field in str(error)
    assert what in str(error)


def test_a_plan_without_scheduling_takes_the_default_and_an_unknown_policy_is_refused(tmp_path: Path) -> None:
    assert read_gear_plan(written(tmp_path, plan_document())).scheduling == Scheduling()
    error = refusal(written(tmp_path, plan_document() | {"scheduling": {"order": "lifo"}}))
    assert error.field == "$.scheduling.order"
    assert all(order in str(error) for order in ORDERS)


def test_the_names_of_a_plan_are_those_of_the_policy() -> None:
    hints = get_type_hints(Scheduling)
    for field, names in (("balancer", BALANCERS), ("order", ORDERS), ("admission", ADMISSIONS)):
        assert get_args(hints[field]) == names
