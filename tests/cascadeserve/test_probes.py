from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cascadeserve.errors import InvalidArtefact
from cascadeserve.gear_plan import TensorSpec, read_gear_plan
from cascadeserve.probes import TOLERANCE, ProbeAnswers, Probes, pack_inputs
from tests.fakes.certified import PROBES, certified_document, probes_of

if TYPE_CHECKING:
    from pathlib import Path

X = TensorSpec(name="x", datatype="FP32", shape=(3,))
ONE = {"small": ProbeAnswers(label=(1, 2), certainty=(0.5, 0.25))}


def test_what_differs_is_another_label_or_certainty() -> None:
    wanted = ProbeAnswers(label=(1, 2, 3, 4, 5), certainty=(0.5, 0.5, 0.5, -3.0, 0.5))
    label = np.array([1, 0, 3, 4, 5])
    near = 0.9 * TOLERANCE
    certainty = np.array([0.5 + near, 0.5, 0.5 - 1.5 * TOLERANCE, -3.0 - 3 * near, np.nan], np.float32)
    assert wanted.differing(label, certainty).tolist() == [1, 2, 4]


def test_text_travels_as_utf_8_and_numbers_as_they_are() -> None:
    text = np.array([["grün"], ["a"]])
    number = np.arange(2, dtype=">i8")
    probes = Probes(inputs=pack_inputs({"text": text, "number": number}), answers=ONE)
    specs = (
        TensorSpec(name="number", datatype="INT64", shape=()),
        TensorSpec(name="text", datatype="BYTES", shape=(-1,)),
    )
    found, words = probes.tensors(specs)
    assert found.tolist() == [0, 1]
    assert words.tolist() == [["grün".encode()], [b"a"]]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (b"", "is no .npz file"),
        (b"PK\x03\x04 and so on", "is no .npz file"),
        (pack_inputs({"y": PROBES[:2]}), "holds the inputs y, which are not those of the family"),
        (
            pack_inputs({"x": PROBES[:2].astype(np.float64)}),
            r"'x' is float64 of shape \[2, 3\], but the family's is FP32",
        ),
        (pack_inputs({"x": PROBES[:2, :2]}), r"of shape \[2, 2\], but the family's is FP32 of \[-1, 3\]"),
        (pack_inputs({"x": PROBES[0]}), r"of shape \[3\]"),
        (pack_inputs({"x": PROBES}), "has 3 rows, but a model has more or fewer answers"),
    ],
)
def test_probe_rows_that_cannot_be_sent_are_refused(inputs: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Probes(inputs=inputs, answers=ONE).tensors((X,))


def written(folder: Path, document: dict[str, Any]) -> Path:
    path = folder / "plan.json"
    path.write_text(json.dumps(document))
    return path


def test_a_plan_carries_them(tmp_path: Path) -> None:
    certificate = read_gear_plan(written(tmp_path, certified_document())).families["family"].certificate
    assert certificate is not None
    assert certificate.probes is not None
    (x,) = certificate.probes.tensors((X,))
    np.testing.assert_array_equal(x, PROBES)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inputs": "?"}, r"\$\.families\[\.\.\.\]\.certificate\.probes\.inputs: Invalid base64"),
        ({"inputs": base64.b64encode(b"x").decode()}, r"probes\.inputs: is no \.npz file .*; plan anew, or leave"),
        ({"answers": {}}, r"probes\.answers: Expected `object` of length >= 1"),
        ({"answers": {"other": {"label": [1] * 3, "certainty": [1.0] * 3}}}, r"answers\.other: is no model of this"),
        ({"answers": {"small": {"label": [1] * 3, "certainty": [1.0]}}}, "has 3 labels, but 1 certainties"),
        ({"answers": {"small": {"label": [1], "certainty": [1.0]}}}, "has 3 rows, but a model has more or fewer"),
    ],
)
def test_a_plan_with_wrong_ones_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    document = certified_document()
    probes_of(document).update(change)
    with pytest.raises(InvalidArtefact, match=words):
        read_gear_plan(written(tmp_path, document))
