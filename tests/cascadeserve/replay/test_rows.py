from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cascadeserve.errors import InvalidArtefact, UsageError
from cascadeserve.replay.payload import ModelSignature, TensorSignature, choose_outputs, encode_rows, match_inputs
from cascadeserve.replay.rows import Rows, choose_rows, read_rows

if TYPE_CHECKING:
    from pathlib import Path


def save(tmp_path: Path, **arrays: Any) -> Path:
    path = tmp_path / "rows.npz"
    np.savez(path, **{key.replace("__", ":"): value for key, value in arrays.items()})
    return path


def test_rows_and_labels_are_read(tmp_path: Path) -> None:
    rows = read_rows(save(tmp_path, input__x=np.zeros((4, 2), np.float32), label=np.arange(4, dtype=np.int32)))
    assert len(rows) == 4
    assert rows.labels is not None
    assert rows.labels.dtype == np.int64


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"input__x": np.array([b"a", None], dtype=object)}, "input:x: is an object array"),
        ({"input__x": np.array([1j, 2j])}, "input:x: has dtype complex128"),
        ({"x": np.zeros(3)}, "x: is neither"),
        ({"label": np.zeros(3, np.int64)}, "holds no array"),
        ({"input__x": np.zeros(3), "input__y": np.zeros(4)}, "input:y: has 4 rows"),
        ({"input__x": np.zeros(3), "label": np.zeros((3, 1), np.int64)}, r"label: has dtype int64 and shape \(3, 1\)"),
        ({"input__x": np.zeros((0, 3))}, r"input:x: holds no rows: its shape is \(0, 3\)$"),
    ],
)
def test_a_wrong_array_is_named(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArtefact, match=message):
        read_rows(save(tmp_path, **arrays))


def test_files_that_are_no_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.npz"
    path.write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(InvalidArtefact, match=r"no \.npz"):
        read_rows(path)
    with pytest.raises(InvalidArtefact, match="check the path"):
        read_rows(tmp_path / "nowhere")
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(InvalidArtefact, match="single array"):
        read_rows(path)


def test_rows_go_round_in_order() -> None:
    chosen = choose_rows(3, 4, np.random.default_rng(0), per_request=(2, 2))
    assert chosen.offset.tolist() == [0, 2, 4, 6, 8]
    assert chosen.row_index.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_a_shuffled_round_holds_every_row_once() -> None:
    chosen = choose_rows(50, 100, np.random.default_rng(0), shuffle=True)
    first, second = chosen.row_index.reshape(2, 50).tolist()
    assert first == second
    assert sorted(first) == list(range(50))
    assert first != sorted(first)


def test_request_sizes_are_uniform_in_their_range() -> None:
    sizes = np.diff(choose_rows(10, 6000, np.random.default_rng(0), per_request=(1, 3)).offset)
    assert np.bincount(sizes)[1:] == pytest.approx([2000, 2000, 2000], rel=0.1)


@pytest.mark.parametrize(
    ("dtype", "datatype"),
    [("f4", "FP32"), (">f4", "FP32"), ("f2", "FP16"), ("i8", "INT64"), ("?", "BOOL"), ("u1", "UINT8")],
)
def test_datatype_follows_from_the_array(dtype: str, datatype: str) -> None:
    array = np.arange(6).reshape(3, 2).astype(dtype)
    encoded = encode_rows("x", array)
    assert encoded.datatype == datatype
    little = array.astype(array.dtype.newbyteorder("<"))
    assert bytes(encoded.chunk([1])) == little[1].tobytes()
    assert bytes(encoded.chunk([2, 0])) == little[[2, 0]].tobytes()


def test_rows_must_fit_the_model() -> None:
    signature = ModelSignature((TensorSignature("x", "FP32", (-1, 2, -1)),), ("certainty", "label"))
    (encoded,) = match_inputs(Rows({"x": np.zeros((5, 2, 7), np.float32)}, None), signature)
    assert encoded.row_shape == (2, 7)
    assert choose_outputs(signature) == ("label", "certainty")
    for array, message in ((np.zeros((5, 2, 7)), "float64"), (np.zeros((5, 3, 7), np.float32), "shape")):
        with pytest.raises(UsageError, match=message):
            match_inputs(Rows({"x": array}, None), signature)
    with pytest.raises(UsageError, match="rows hold the inputs y"):
        match_inputs(Rows({"y": np.zeros(5)}, None), signature)
    with pytest.raises(UsageError, match="no output `label`"):
        choose_outputs(ModelSignature((), ("scores",)))


def test_bfloat16_is_carried_as_its_bits() -> None:
    signature = ModelSignature((TensorSignature("x", "BF16", (-1, 2)),), ("label",))
    (encoded,) = match_inputs(Rows({"x": np.zeros((5, 2), np.uint16)}, None), signature)
    assert encoded.datatype == "BF16"


@pytest.mark.parametrize("kind", ["S", "U"])
def test_text_travels_as_length_and_bytes(kind: str) -> None:
    words = np.array([["a", ""], ["longer", "x"], ["", "\u00fc" if kind == "U" else "y"]])
    array = words if kind == "U" else words.astype("S")
    signature = ModelSignature((TensorSignature("x", "BYTES", (-1, 2)),), ("label",))
    (encoded,) = match_inputs(Rows({"x": array}, None), signature)
    last = words[2, 1].encode()
    assert bytes(encoded.chunk([0])) == b"\1\0\0\0a\0\0\0\0"
    assert bytes(encoded.chunk([2])) == b"\0\0\0\0" + bytes([len(last)]) + b"\0\0\0" + last
    assert bytes(encoded.chunk([1, 0])) == b"\6\0\0\0longer\1\0\0\0x\1\0\0\0a\0\0\0\0"
    assert encode_rows("x", array).datatype == "BYTES"


def test_text_and_numbers_are_not_taken_for_each_other() -> None:
    for datatype, array in (("BYTES", np.zeros((5, 2), np.float32)), ("FP32", np.array([["a", "b"]]))):
        signature = ModelSignature((TensorSignature("x", datatype, (-1, 2)),), ("label",))
        with pytest.raises(UsageError, match=f"the model wants {datatype}"):
            match_inputs(Rows({"x": array}, None), signature)


def test_a_rows_file_may_hold_text(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", **{"input:x": np.array([[b"a"], [b"bc"]])})
    assert read_rows(tmp_path / "rows.npz").inputs["x"].tolist() == [[b"a"], [b"bc"]]
