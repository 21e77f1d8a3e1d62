from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from cascadeserve.artefacts import read_json, write_json
from cascadeserve.errors import InvalidArtefact, UsageError
from cascadeserve.gear_plan import LadderEntry, Stage
from planner.bounds import gap_upper, grouped_gap_upper
from planner.certificate import Certificate, FrozenLadder, certify, certify_file, freeze, gaps
from planner.records import CalibrationRecords, HeldOutRecords, ModelAnswers, Provenance, Records, SearchRecords
from planner.records_files import read_ledger, write_records

if TYPE_CHECKING:
    from pathlib import Path

ROWS = 2000


def make(kind: type[Records], rows: int = ROWS, seed: int = 0, *, group_size: int = 1) -> Any:
    """A small model that is right on 80 %, sure where it is right, and a large one that is right on 95 %."""
    rng = np.random.default_rng(seed)
    group_id = np.arange(rows) // group_size
    fate = rng.random((rows // group_size + 1, 2))[group_id]
    truth = rng.integers(0, 10, rows)
    right = fate < [0.8, 0.95]
    certainty = np.clip(0.6 * right[:, 0] + rng.random(rows) * 0.5, 0, 1).astype(np.float32)
    models = {
        name: ModelAnswers(label=np.where(ok, truth, 10), certainty=certainty, provenance=Provenance(digest=name))
        for name, ok in zip(("small", "large"), right.T, strict=True)
    }
    return kind(family="tiny", models=models, truth=truth, group_id=group_id)


def entry(name: str, threshold: float | None = None) -> LadderEntry:
    """Single model `large` or `small`, or both with a threshold."""
    if threshold is None:
        return LadderEntry(name=name, stages=(Stage(model=name),), reach=(1.0,))
    stages = (Stage(model="small", threshold=threshold), Stage(model="large"))
    return LadderEntry(name=name, stages=stages, reach=(1.0, 0.5))


LADDER = (entry("large"), entry("sure", 0.55), entry("bold", 0.3), entry("small"))
SEARCH = make(SearchRecords)
CALIBRATION = make(CalibrationRecords, seed=1)


def test_each_entry_gets_its_share_of_delta() -> None:
    frozen = freeze(LADDER, "large", SEARCH)
    certificate = certify(frozen, CALIBRATION, delta=0.06)
    assert (certificate.method, certificate.correction) == ("clopper_pearson", "bonferroni")
    assert (certificate.rows, certificate.groups) == (ROWS, ROWS)
    assert certificate.delta_each == pytest.approx(0.02)  # the reference model alone takes none
    for found in certificate.entries[1:]:
        expected = gap_upper(found.harm, found.repairs, ROWS, 0.02, repair_share=0.1)
        assert found.epsilon == pytest.approx(expected)
    large, sure, bold, small = certificate.entries
    assert (large.epsilon, large.harm, large.repairs) == (0.0, 0, 0)
    assert sure.harm <= bold.harm <= small.harm
    assert certificate.max_epsilon == max(sure.epsilon, bold.epsilon, small.epsilon)  # type: ignore[type-var]
    assert certificate.reference_accuracy == large.accuracy == pytest.approx(0.95, abs=0.02)
    assert small.accuracy - large.accuracy == pytest.approx((small.repairs - small.harm) / ROWS)
    assert certificate.ladder_digest == frozen.digest
    assert certificate.records_digest == CALIBRATION.digest()
    assert any("does not depend on the load" in text for text in certificate.assumptions)


def test_a_ladder_of_the_reference_alone_is_certified_without_delta() -> None:
    certificate = certify(freeze(LADDER[:1], "large", SEARCH), CALIBRATION, delta=0.05)
    assert certificate.max_epsilon == 0.0


def test_degraded_entries_are_not_certified_and_take_no_share() -> None:
    frozen = freeze(LADDER, "large", SEARCH, degraded=["small"])
    certificate = certify(frozen, CALIBRATION, delta=0.06)
    assert certificate.delta_each == pytest.approx(0.03)
    assert certificate.entry("small").epsilon is None
    assert certificate.max_epsilon == certificate.entry("bold").epsilon
    with pytest.raises(UsageError, match="'small' answers rows but is not certified"):
        certificate.weighted_epsilon({"sure": 0.5, "small": 0.5})
    assert certificate.weighted_epsilon({"sure": 1.0, "small": 0.0}) == certificate.entry("sure").epsilon


def test_the_loss_of_a_mix_is_weighted_by_rows() -> None:
    certificate = certify(freeze(LADDER, "large", SEARCH), CALIBRATION, delta=0.05)
    sure, small = certificate.entry("sure").epsilon, certificate.entry("small").epsilon
    assert sure is not None
    assert small is not None
    assert certificate.weighted_epsilon({"large": 0.2, "sure": 0.5, "small": 0.3}) == pytest.approx(
        0.5 * sure + 0.3 * small
    )
    for wrong in ({"sure": 0.5}, {"sure": 1.5, "small": -0.5}, {"sure": 0.5, "none": 0.5}):
        with pytest.raises(UsageError):
            certificate.weighted_epsilon(wrong)


def test_a_fixed_sequence_stops_at_the_first_target_that_is_missed() -> None:
    ladder = (entry("large"), entry("sure", 0.55), entry("bold", 0.3), entry("late", 0.56), entry("small"))
    frozen = freeze(ladder, "large", SEARCH, targets=[0.02, 1e-4, 0.5, 0.5])
    certificate = certify(frozen, CALIBRATION, delta=0.05)
    assert certificate.correction == "fixed_sequence"
    assert certificate.delta_each == 0.05
    # what passes gets its target, not what the data would have allowed
    assert [found.epsilon for found in certificate.entries] == [0.0, 0.02, None, None, None]
    assert certificate.max_epsilon == 0.02


def test_targets_belong_to_the_entries_that_are_tested() -> None:
    with pytest.raises(UsageError, match="4 targets were given for 3 entries"):
        freeze(LADDER, "large", SEARCH, targets=[0.0, 0.1, 0.1, 0.1])


def test_the_digest_is_that_of_what_is_stated() -> None:
    frozen = freeze(LADDER, "large", SEARCH)
    nudged = (LADDER[0], entry("sure", float(np.nextafter(0.55, 1))), *LADDER[2:])
    others = [
        freeze(nudged, "large", SEARCH),
        freeze(LADDER[:3], "large", SEARCH),
        freeze(LADDER, "small", SEARCH),
        freeze(LADDER, "large", SEARCH, method="betting"),
        freeze(LADDER, "large", SEARCH, repair_share=0.2),
        freeze(LADDER, "large", SEARCH, targets=[0.1, 0.1, 0.1]),
        freeze(LADDER, "large", SEARCH, targets=[0.1, 0.1, 0.2]),
        freeze(LADDER, "large", SEARCH, degraded=["small"]),
        freeze(LADDER, "large", SEARCH, largest_group=5),
        freeze(LADDER, "large", replace(SEARCH, family="other")),
        msgspec.structs.replace(frozen, model_digests={"large": "another"}),
    ]
    assert len({frozen.digest, *(other.digest for other in others)}) == 1 + len(others)
    measured_anew = tuple(msgspec.structs.replace(e, reach=(1.0,) * len(e.stages)) for e in LADDER)
    assert freeze(measured_anew, "large", SEARCH).digest == frozen.digest
    assert msgspec.json.decode(msgspec.json.encode(frozen), type=FrozenLadder).digest == frozen.digest
    # written once: a digest that changes between versions would void every ledger
    assert frozen.digest == "sha256:6444c2c99b7fe36f973af5cb3110c3864d456d4cb2da6c1579ec2ddaab64be20"


def test_grouped_rows_are_certified_by_groups() -> None:
    search, calibration = (make(kind, group_size=5) for kind in (SearchRecords, CalibrationRecords))
    frozen = freeze(LADDER, "large", search)
    assert frozen.method == "betting"
    certificate = certify(frozen, calibration, delta=0.06)
    assert (certificate.rows, certificate.groups) == (ROWS, ROWS // 5)
    small = certificate.entry("small")
    label, reference = calibration.models["small"].label, calibration.models["large"].label
    net = (reference == calibration.truth).astype(int) - (label == calibration.truth)
    per_group = net.reshape(-1, 5).sum(axis=1)
    assert small.epsilon == pytest.approx(grouped_gap_upper(per_group, np.full(ROWS // 5, 5), 0.02))
    independent = freeze(LADDER, "large", search, method="clopper_pearson")
    with pytest.raises(UsageError, match="come in groups"):
        certify(independent, calibration, delta=0.06)
    assert small.epsilon > gap_upper(small.harm, small.repairs, ROWS, 0.02, repair_share=0.1)  # type: ignore[operator]


def test_rows_needed_for_a_wanted_epsilon() -> None:
    for method in ("clopper_pearson", "betting"):
        frozen = freeze(LADDER, "large", SEARCH, method=method)  # type: ignore[arg-type]
        bold = certify(frozen, CALIBRATION, delta=0.06).entry("bold")
        assert bold.rows_needed is None
        assert bold.epsilon is not None
        gap = (bold.harm - bold.repairs) / ROWS
        halved = gap + (bold.epsilon - gap) / 2
        certificate = certify(frozen, CALIBRATION, delta=0.06, wanted_epsilon=halved)
        needed = certificate.entry("bold").rows_needed
        assert needed is not None
        assert 3 * ROWS < needed < 5 * ROWS  # half the slack: some four times the rows
        assert certificate.entry("large").rows_needed is None
        same = certify(frozen, CALIBRATION, delta=0.06, wanted_epsilon=bold.epsilon).entry("bold").rows_needed
        assert same == pytest.approx(ROWS, abs=2)
        never = certify(frozen, CALIBRATION, delta=0.06, wanted_epsilon=gap).entry("bold").rows_needed
        assert never is None


@pytest.mark.parametrize("other", [SearchRecords, HeldOutRecords])
def test_only_calibration_records_certify(other: type[Records]) -> None:
    with pytest.raises(UsageError, match="only calibration records certify"):
        certify(freeze(LADDER, "large", SEARCH), make(other), delta=0.05)


def test_records_that_do_not_fit_are_refused() -> None:
    frozen = freeze(LADDER, "large", SEARCH)
    large = CALIBRATION.models["large"]
    retrained = {**CALIBRATION.models, "large": replace(large, provenance=Provenance(digest="new"))}
    for records, says in [
        (replace(CALIBRATION, family="other"), "family"),
        (replace(CALIBRATION, models={"large": large}), "hold no model small"),
        (replace(CALIBRATION, models=retrained), "'large' changed between"),
    ]:
        with pytest.raises(UsageError, match=says):
            certify(frozen, records, delta=0.05)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ladder": ()}, "at least one entry"),
        ({"ladder": (LADDER[1], LADDER[1])}, "a name of its own"),
        ({"reference_model": "huge"}, "hold no model huge"),
        ({"degraded": ["none"]}, "no entry none"),
    ],
)
def test_a_ladder_that_makes_no_sense_cannot_be_frozen(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        freeze(**{"ladder": LADDER, "reference_model": "large", "search": SEARCH} | change)


def test_a_certificate_is_an_artefact(tmp_path: Path) -> None:
    certificate = certify(freeze(LADDER, "large", SEARCH), CALIBRATION, delta=0.05, wanted_epsilon=0.01)
    write_json(tmp_path / "certificate.json", certificate)
    assert read_json(tmp_path / "certificate.json", Certificate) == certificate
    assert certify(freeze(LADDER, "large", SEARCH), CALIBRATION, delta=0.05, wanted_epsilon=0.01) == certificate
    text = (tmp_path / "certificate.json").read_text().replace('"max_epsilon": 0', '"max_epsilon": -0')
    (tmp_path / "forged.json").write_text(text)
    with pytest.raises(InvalidArtefact, match="max_epsilon must be the largest"):
        read_json(tmp_path / "forged.json", Certificate)


def test_a_file_is_used_before_it_is_looked_at_and_once_per_ladder(tmp_path: Path) -> None:
    path = tmp_path / "calibration.npz"
    write_records(path, CALIBRATION)
    frozen = freeze(LADDER, "large", SEARCH)
    certificate = certify_file(frozen, path, delta=0.1)
    assert certificate == certify(frozen, CALIBRATION, delta=0.05)
    assert certify_file(frozen, path, delta=0.1) == certificate
    assert [use.ladder_digest for use in read_ledger(path).uses] == [frozen.digest]
    other = freeze(LADDER[:2], "large", SEARCH)
    with pytest.raises(UsageError, match="record fresh calibration rows"):
        certify_file(other, path, delta=0.1)
    second = certify_file(other, path, delta=0.1, spend=True)
    assert second.delta == pytest.approx(0.025)
    assert any("served 1 other ladder(s)" in text for text in second.assumptions)


def test_a_file_that_does_not_fit_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "calibration.npz"
    write_records(path, replace(CALIBRATION, family="other"))
    with pytest.raises(UsageError, match="family"):
        certify_file(freeze(LADDER, "large", SEARCH), path, delta=0.1)
    assert read_ledger(path).uses == ()


def test_gaps_are_those_of_the_rows_that_are_shown() -> None:
    held_out = make(HeldOutRecords, seed=2)
    found = gaps(freeze(LADDER, "large", SEARCH), held_out)
    accuracy = {name: np.mean(a.label == held_out.truth) for name, a in held_out.models.items()}
    assert found["small"] == pytest.approx(accuracy["large"] - accuracy["small"])
    assert found["large"] == 0.0


@pytest.mark.parametrize(("method", "group_size"), [("clopper_pearson", 1), ("betting", 1), ("betting", 4)])
def test_all_statements_hold_together(method: Any, group_size: int) -> None:
    """Drawn anew each time from a population whose gaps are known: all entries within epsilon, but for delta."""
    population = make(HeldOutRecords, 40_000, group_size=group_size)
    frozen = freeze(LADDER, "large", SEARCH, method=method)
    truth = gaps(frozen, population)
    rng = np.random.default_rng(7)
    resamples, violations = 300, 0
    for _ in range(resamples):
        first = rng.integers(40_000 // group_size, size=400 // group_size) * group_size
        drawn = population.take((first[:, None] + np.arange(group_size)).ravel())
        drawn = replace(drawn, group_id=np.arange(400) // group_size)
        certificate = certify(frozen, CalibrationRecords(**vars(drawn)), delta=0.2)
        violations += any(e.epsilon is not None and e.epsilon < truth[e.name] - 1e-12 for e in certificate.entries)
    # 85 of 300 is beyond the 99.9 % quantile of a rate of 0.2
    assert violations <= 85
