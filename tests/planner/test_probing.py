"""Probe rows are chosen among the calibration rows, kept in their file and carried by the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cascadeserve.errors import InvalidArtefact
from planner.certificate import certify_file, freeze
from planner.planning import plan_family
from planner.probing import LARGEST_BYTES, PROBE_ROWS, choose_probe_rows
from planner.records import CalibrationRecords, ModelAnswers, SearchRecords
from planner.records_files import read_calibration, read_probes, read_search, write_records
from tests.fakes import planned
from tests.fakes.planned import FormulaPredictor

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


def calibration(certainties: dict[str, NDArray[np.float32]]) -> CalibrationRecords:
    rows = len(next(iter(certainties.values())))
    truth = np.zeros(rows, np.int64)
    models = {name: ModelAnswers(label=truth, certainty=certainty) for name, certainty in certainties.items()}
    return CalibrationRecords(family="tiny", models=models, truth=truth, group_id=np.arange(rows))


def inputs(rows: int, size: int = 3) -> dict[str, NDArray[np.generic]]:
    return {"x": np.random.default_rng(0).random((rows, size), np.float32)}


def test_they_are_those_of_which_models_are_unsure_without_being_at_a_tie() -> None:
    certainty = np.random.default_rng(1).permutation(1000).astype(np.float32)
    chosen = choose_probe_rows(calibration({"small": certainty}), inputs(1000))
    assert chosen is not None
    found = np.sort(certainty[chosen.row])
    assert len(found) == PROBE_ROWS
    assert (found[0], found[-1]) == (20.0, 509.0)
    assert np.diff(found).min() > 25, "all along"
    np.testing.assert_array_equal(chosen.inputs["x"], inputs(1000)["x"][chosen.row])


def test_no_model_is_at_a_tie() -> None:
    one = np.random.default_rng(1).permutation(1000).astype(np.float32)
    # the other has another scale, and is sure of what the first is unsure of
    records = calibration({"small": one, "large": (-one / 1000).astype(np.float32)})
    chosen = choose_probe_rows(records, inputs(1000))
    assert chosen is not None
    for answers in records.models.values():
        assert (np.argsort(np.argsort(answers.certainty))[chosen.row] >= 20).all()


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (3, 3), (16, 16), (17, 16), (1000, 16)])
def test_few_rows_are_enough(rows: int, count: int) -> None:
    chosen = choose_probe_rows(calibration({"small": np.ones(rows, np.float32)}), inputs(rows))
    assert chosen is not None
    assert len(set(chosen.row.tolist())) == count


@pytest.mark.parametrize(("row_bytes", "count"), [(LARGEST_BYTES // 3, 3), (2 * LARGEST_BYTES, 1)])
def test_of_large_rows_there_are_fewer(row_bytes: int, count: int) -> None:
    chosen = choose_probe_rows(calibration({"small": np.ones(20, np.float32)}), inputs(20, row_bytes // 4))
    assert chosen is not None
    assert len(chosen.row) == count


def write(path: Path) -> CalibrationRecords:
    records = planned.calibration()
    records.models["not-planned"] = records.models["small"]
    write_records(path, records, choose_probe_rows(records, inputs(len(records))))
    return records


def test_the_plan_carries_the_rows_and_what_its_models_answered(tmp_path: Path) -> None:
    records = write(tmp_path / "calibration.npz")
    write_records(tmp_path / "plain.npz", records)
    plans = [
        plan_family(planned.inputs(), tmp_path / name, predict=FormulaPredictor.of)
        for name in ("calibration.npz", "plain.npz")
    ]
    certificates: list[Any] = [plan.families["tiny"].certificate for plan in plans]
    assert certificates[0].records_digest == certificates[1].records_digest, "what is certified is the same"
    assert certificates[1].probes is None
    probes = certificates[0].probes
    chosen = choose_probe_rows(records, inputs(len(records)))
    assert chosen is not None
    (x,) = probes.tensors(plans[0].families["tiny"].inputs)
    np.testing.assert_array_equal(x, chosen.inputs["x"])
    assert set(probes.answers) == set(plans[0].families["tiny"].models)
    for name, answers in probes.answers.items():
        label, certainty = records.models[name].label[chosen.row], records.models[name].certainty[chosen.row]
        assert not answers.differing(label, certainty).size
        assert answers.certainty == tuple(certainty.tolist()), "exactly"


def test_the_certificate_of_a_file_has_its_probe_rows(tmp_path: Path) -> None:
    write(tmp_path / "calibration.npz")
    search = planned.records()
    entry = plan_family(planned.inputs(), None, predict=FormulaPredictor.of).families["tiny"].ladder
    certificate = certify_file(freeze(entry, "large", search), tmp_path / "calibration.npz", delta=0.05)
    assert certificate.probes == read_probes(tmp_path / "calibration.npz")


def damaged(path: Path, **changes: Any) -> Path:
    """The file with some arrays changed; None leaves one out."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files} | {
            name.replace("input_", "input:"): array for name, array in changes.items()
        }
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"probe_row": np.array([0, 6000])}, "probe_row: must be rows of this file"),
        ({"probe_row": np.array([-1, 1])}, "probe_row: must be rows of this file"),
        ({"probe_row": np.array([0.5])}, "probe_row: must be rows of this file"),
        ({"input_x": np.zeros((3, 3), np.float32)}, r"input:x: has shape \[3, 3\], but there are 16 probe rows"),
        ({"input_x": np.float32(1.0)}, r"input:x: has shape \[\]"),
    ],
)
def test_wrong_ones_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    write(tmp_path / "calibration.npz")
    with pytest.raises(InvalidArtefact, match=words):
        read_probes(damaged(tmp_path / "calibration.npz", **changes))


def test_a_file_without_them_has_none_and_search_rows_are_never_any(tmp_path: Path) -> None:
    write(tmp_path / "calibration.npz")
    assert len(read_calibration(tmp_path / "calibration.npz")) == 6000
    assert read_probes(damaged(tmp_path / "calibration.npz", probe_row=None, input_x=None)) is None
    search = planned.records(SearchRecords)
    write_records(tmp_path / "search.npz", search, choose_probe_rows(search, inputs(len(search))))
    with pytest.raises(InvalidArtefact, match="is an unknown array"):
        read_search(tmp_path / "search.npz")


def test_none_may_be_wanted() -> None:
    assert choose_probe_rows(calibration({"small": np.ones(5, np.float32)}), inputs(5), 0) is None
