from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeserve.errors import InvalidArtefact, UsageError
from planner.importing import import_records, split
from planner.records import CalibrationRecords, HeldOutRecords, ModelAnswers, Records, SearchRecords

if TYPE_CHECKING:
    from collections.abc import Callable

PREDICTIONS = Path(__file__).parents[3] / "shared" / "data" / "predictions"

LLAMA = """
schema_version = 1
family = "llama2-mmlu"
truth = { file = "llama2-mmlu/logits.npz", name = "label" }
[[models]]
name = "llama2_7b"
scores = { file = "llama2-mmlu/logits.npz", name = "llama2_7b" }
scale = "logits"
[[models]]
name = "llama2_13b"
scores = { file = "llama2-mmlu/logits.npz", name = "llama2_13b" }
scale = "logits"
[[models]]
name = "llama2_70b"
scores = { file = "llama2-mmlu/logits.npz", name = "llama2_70b" }
scale = "logits"
"""
CIFAR = """
schema_version = 1
family = "cifar10"
truth = { file = "cifar10/lenet-5-cifar-10.npz", name = "ground_truth" }
keep_scores = true
[[models]]
name = "lenet"
scores = { file = "cifar10/lenet-5-cifar-10.npz", name = "predictions" }
scale = "probabilities"
[[models]]
name = "wideresnet"
scores = { file = "cifar10/wideresnet-16-4-cifar-10.npz", name = "predictions" }
scale = "probabilities"
truth = { file = "cifar10/wideresnet-16-4-cifar-10.npz", name = "ground_truth" }
"""
SPEECH = """
schema_version = 1
family = "command-speech"
truth = { file = "command-speech/samples.csv", name = "true" }
""" + "".join(
    f"""
[[models]]
name = "{name}"
label = {{ file = "command-speech/samples.csv", name = "Model{number}_pred" }}
certainty = {{ file = "command-speech/samples.csv", name = "Model{number}_conf" }}
"""
    for name, number in (("open", 101), ("microsoft", 2), ("ibm", 5), ("google", 0))
)


@pytest.fixture
def import_file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "import.toml"
        path.write_text(text)
        return path

    return write


def accuracy(records: Records) -> dict[str, float]:
    return {name: float(np.mean(answers.label == records.truth)) for name, answers in records.models.items()}


@pytest.mark.skipif(not PREDICTIONS.is_dir(), reason="needs the shared predictions beside the checkout")
@pytest.mark.parametrize(
    ("text", "rows", "wanted"),
    [
        (LLAMA, 9967, {"llama2_7b": 0.461, "llama2_13b": 0.541, "llama2_70b": 0.680}),
        (CIFAR, 10000, {"lenet": 0.531, "wideresnet": 0.911}),
        (SPEECH, 64727, {"open": 0.801, "microsoft": 0.946, "ibm": 0.806, "google": 0.874}),
    ],
    ids=["llama2-mmlu", "cifar10", "command-speech"],
)
def test_the_shared_predictions_can_be_imported(
    import_file: Callable[[str], Path], text: str, rows: int, wanted: dict[str, float]
) -> None:
    # A link, since an import file names files beside itself.
    path = import_file(text)
    for folder in PREDICTIONS.iterdir():
        (path.parent / folder.name).symlink_to(folder)
    records = import_records(path)
    assert len(records) == rows
    assert list(records.models) == list(wanted)
    assert accuracy(records) == pytest.approx(wanted, abs=0.01)
    for answers in records.models.values():
        assert answers.certainty.dtype == np.float32
        assert answers.certainty.min() >= 0.0
        assert answers.certainty.max() <= 1.0
        assert (answers.scores is not None) == ("keep_scores" in text)
    parts = split(records, fractions=(0.4, 0.4, 0.2), seed=0)
    assert sum(len(part) for part in parts) == rows
    for part in parts:
        assert accuracy(part) == pytest.approx(accuracy(records), abs=0.03)


# Files of the tests' own.

NPZ = """
schema_version = 1
family = "tiny"
truth = { file = "data.npz", name = "truth" }
GROUP
[[models]]
name = "m"
scores = { file = "data.npz", name = "scores" }
scale = "SCALE"
"""
CSV = """
schema_version = 1
family = "tiny"
truth = { file = "data.csv", name = "true" }
group = { file = "data.csv", name = "who" }
[[models]]
name = "m"
label = { file = "data.csv", name = "said" }
certainty = { file = "data.csv", name = "how sure" }
"""


def npz(scale: str = "logits", group: str = "") -> str:
    return NPZ.replace("SCALE", scale).replace("GROUP", group)


def test_certainty_is_the_difference_of_the_two_largest_probabilities(import_file: Callable[[str], Path]) -> None:
    path = import_file(npz())
    logits = np.log([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]) + np.array([[3.0], [-700.0]])
    np.savez(path.parent / "data.npz", truth=np.array([0, 1], np.int8), scores=logits)
    records = import_records(path)
    assert records.models["m"].certainty == pytest.approx([0.2, 0.7])
    assert records.models["m"].label.tolist() == [0, 2]
    assert records.truth.tolist() == [0, 1]
    assert records.truth.dtype == np.int64
    assert records.group_id.tolist() == [0, 1]
    assert records.models["m"].provenance.backend == "import"


def test_columns_of_a_csv_file(import_file: Callable[[str], Path]) -> None:
    path = import_file(CSV)
    (path.parent / "data.csv").write_text("true,said,how sure,who\n0,1,0.25,ann\n1,1,0.5,bob\n2.0,0,1,ann\n\n")
    records = import_records(path)
    assert records.truth.tolist() == [0, 1, 2]
    assert records.models["m"].label.tolist() == [1, 1, 0]
    assert records.models["m"].certainty.tolist() == [0.25, 0.5, 1.0]
    assert records.group_id.tolist() == [0, 1, 0]


GOOD = "true,said,how sure,who\n0,1,0.25,ann\n"


@pytest.mark.parametrize(
    ("csv", "says"),
    [
        ("true,said,who\n0,1,ann\n", "how sure: is missing; the file has true, said, who"),
        ("true,said,how sure,who\n", "has no rows"),
        ("", "has no rows"),
        ("true,true,said,how sure\n0,0,1,1\n", "has two columns of one name"),
        ("true,said,how sure,who\n0,1,0.5\n", "has 3 cells in row 0, but 4 columns"),
        (GOOD + "1,1,nan,bob\n", "how sure: is NaN or infinite in 1 rows, first in row 1"),
        (GOOD + "1,cat,0.5,bob\n", "said: must hold numbers"),
        (GOOD + "1,-1,0.5,bob\n", "said: must hold labels"),
        (GOOD + "1,0.5,0.5,bob\n", "said: must hold labels"),
        (GOOD + "1,1,1e300,bob\n", r"how sure: is beyond 3\.4e\+38 in 1 rows, first in row 1"),
        (GOOD + "1,1e300,0.5,bob\n", r"said: is beyond 3\.4e\+38"),
        (GOOD + "1,1e30,0.5,bob\n", "said: must hold labels: whole numbers from 0, below 9007199254740992"),
        (GOOD + '1,1,0.5,"bob\n', "is no .csv file in UTF-8"),
    ],
)
def test_a_wrong_csv_file_is_refused(import_file: Callable[[str], Path], csv: str, says: str) -> None:
    path = import_file(CSV)
    (path.parent / "data.csv").write_text(csv)
    with pytest.raises(InvalidArtefact, match=rf"data\.csv: {says}"):
        import_records(path)


@pytest.mark.parametrize(
    ("scale", "arrays", "says"),
    [
        ("probabilities", {"truth": [0, 1], "scores": [[0.5, 0.5], [2.0, 1.0]]}, "scores: .* do not sum to 1; logits"),
        ("probabilities", {"truth": [0], "scores": [[1.5, -0.5]]}, "scores: .* do not sum to 1"),
        ("logits", {"truth": [0, 1], "scores": [[0.5], [2.0]]}, "scores: needs scores of at least two classes"),
        ("logits", {"truth": [0, 1], "scores": [0.5, 2.0]}, "scores: has 1 axes"),
        ("logits", {"truth": [0], "scores": [[np.nan, 1.0]]}, "scores: is NaN"),
        ("logits", {"truth": [[0]], "scores": [[0.0, 1.0]]}, "truth: has 2 axes"),
        ("logits", {"truth": [0, 1], "scores": np.zeros((0, 2))}, "scores: is empty"),
        ("logits", {"truth": np.zeros(0), "scores": np.zeros((0, 2))}, "truth: is empty"),
        ("logits", {"truth": [0], "scores": np.zeros((1, 0))}, "scores: needs scores of at least two classes"),
        ("logits", {"truth": [0], "scores": [[1.7e308, -1.7e308]]}, "scores: is beyond"),
        ("logits", {"truth": [0], "scores": np.array([["1e999", "1"]])}, "scores: is NaN or infinite"),
        (
            "logits",
            {"truth": [0], "scores": np.array([[1j, 1.0]])},
            "scores: must hold real numbers, but is complex128",
        ),
        (
            "logits",
            {"truth": np.zeros(1, "M8[s]"), "scores": [[0.0, 1.0]]},
            "truth: must hold real numbers, but is dat",
        ),
        (
            "logits",
            {"truth": np.zeros(1, "m8[s]"), "scores": [[0.0, 1.0]]},
            "truth: must hold real numbers, but is tim",
        ),
        ("logits", {"truth": np.zeros(1, [("a", "f8")]), "scores": [[0.0, 1.0]]}, "truth: must hold real numbers"),
        ("logits", {"scores": [[0.0, 1.0]]}, "truth: is missing; the file has scores"),
    ],
)
def test_wrong_scores_are_refused(
    import_file: Callable[[str], Path], scale: str, arrays: dict[str, Any], says: str
) -> None:
    path = import_file(npz(scale))
    np.savez(path.parent / "data.npz", **arrays)
    with pytest.raises(InvalidArtefact, match=rf"data\.npz: {says}"):
        import_records(path)


def test_files_of_other_lengths_are_refused(import_file: Callable[[str], Path]) -> None:
    path = import_file(npz())
    np.savez(path.parent / "data.npz", truth=[0, 1, 1], scores=[[0.0, 1.0], [1.0, 0.0]])
    with pytest.raises(InvalidArtefact, match="m/label: has 2 rows, but truth has 3"):
        import_records(path)


def test_rows_in_another_order_are_found_by_the_second_truth(import_file: Callable[[str], Path]) -> None:
    path = import_file(npz() + 'truth = { file = "data.npz", name = "other" }\n')
    data = {"truth": [0, 1], "scores": [[0.0, 1.0], [1.0, 0.0]]}
    np.savez(path.parent / "data.npz", **data, other=[0, 1])
    import_records(path)
    np.savez(path.parent / "data.npz", **data, other=[1, 0])
    with pytest.raises(InvalidArtefact, match="other: differs from the family's truth"):
        import_records(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (npz().replace('scale = "logits"', ""), "either scores and scale, or label and certainty"),
        (npz("percent"), r"\$\.models\[0\]\.scale"),
        (npz() + "[extra]", "extra"),
        (npz() + npz().partition("[[models]]")[2].join(["[[models]]", ""]), "two models have the same name"),
    ],
)
def test_a_wrong_import_file_is_refused(import_file: Callable[[str], Path], text: str, says: str) -> None:
    with pytest.raises(InvalidArtefact, match=says):
        import_records(import_file(text))


@pytest.mark.parametrize("data", [None, b"", b"PK\x03\x04 and no more"])
def test_what_is_no_npz_file_is_refused(import_file: Callable[[str], Path], data: bytes | None) -> None:
    path = import_file(npz())
    if data is not None:
        (path.parent / "data.npz").write_bytes(data)
    with pytest.raises(InvalidArtefact, match=r"data\.npz: (cannot be read|is neither|is no)"):
        import_records(path)


# Splits.

NAN = math.nan


def grouped(groups: list[int]) -> Records:
    rows = len(groups)
    answers = ModelAnswers(label=np.arange(rows), certainty=np.ones(rows, np.float32))
    return Records(family="f", models={"m": answers}, truth=np.arange(rows), group_id=np.array(groups))


@given(st.lists(st.integers(0, 30), min_size=40, max_size=200), st.integers(0, 5))
def test_every_row_is_in_one_split_and_every_group_too(groups: list[int], seed: int) -> None:
    records = grouped([*range(20), *groups])
    parts = split(records, fractions=(0.5, 0.3, 0.2), seed=seed)
    assert [type(part) for part in parts] == [SearchRecords, CalibrationRecords, HeldOutRecords]
    assert sorted(np.concatenate([part.truth for part in parts])) == list(range(len(records)))
    sets = [set(part.group_id) for part in parts]
    assert not sets[0] & sets[1] | sets[0] & sets[2] | sets[1] & sets[2]
    count = len(set(records.group_id))
    assert [len(found) for found in sets] == pytest.approx([0.5 * count, 0.3 * count, 0.2 * count], abs=1.01)
    for part in parts:
        assert np.all(np.diff(part.truth) > 0)


def test_the_same_seed_gives_the_same_splits_and_another_one_others() -> None:
    records = grouped(list(range(100)))
    one, again, other = (split(records, fractions=(0.4, 0.4, 0.2), seed=seed) for seed in (1, 1, 2))
    assert one.calibration.digest() == again.calibration.digest() != other.calibration.digest()
    assert [len(part) for part in one] == [40, 40, 20]


def test_each_group_is_as_likely_in_each_split() -> None:
    records = grouped([0] * 50 + list(range(1, 11)))
    places = [int(np.any(split(records, fractions=(0.5, 0.3, 0.2), seed=s).search.group_id == 0)) for s in range(600)]
    # 11 groups: the search split holds 6 of them (5.5, rounded to even)
    assert np.mean(places) == pytest.approx(6 / 11, abs=0.08)


@pytest.mark.parametrize(
    "fractions",
    [(0.5, 0.5, 0.5), (0.5, 0.5, 0.0), (1.2, -0.1, -0.1), (NAN, NAN, NAN), (0.5, NAN, 0.5), (math.inf, 0.5, 0.5)],
)
def test_fractions_must_be_a_division(fractions: tuple[float, float, float]) -> None:
    with pytest.raises(UsageError, match="positive and sum to 1"):
        split(grouped(list(range(10))), fractions=fractions, seed=0)


def test_too_few_groups_are_refused() -> None:
    with pytest.raises(UsageError, match="2 independent groups of rows are too few"):
        split(grouped([1] * 50 + [2] * 50), fractions=(0.4, 0.4, 0.2), seed=0)
