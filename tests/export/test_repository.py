from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from tritonclient.grpc import model_config_pb2

from cascadeserve.errors import ExportRefused
from cascadeserve.triton_config import parse_config
from export.family import Family, FamilyModel, TensorSpec
from export.repository import model_config, write_model

INPUTS = (
    TensorSpec(name="image", datatype="FP32", shape=(1, 32, 32)),
    TensorSpec(name="words", datatype="BYTES", shape=(-1, 2)),
)


def never_built() -> Any:
    raise AssertionError("writing a model does not build it")


MODEL = FamilyModel(name="small", build=never_built, max_batch_size=16)
FAMILY = Family(
    name="family", inputs=INPUTS, classes=7, models=(MODEL,), sample=lambda n: {"image": np.zeros((n, 1, 32, 32))}
)


def config_of(max_batch_size: int = 16) -> Any:
    model = FamilyModel(name="small", build=never_built, max_batch_size=max_batch_size)
    return parse_config(model_config(FAMILY, model))


def state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Name -> inode, time of change, content; of every file and folder, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): (
            path.stat().st_ino,
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in [folder, *folder.rglob("*")]
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {name: content for name, (_, _, content) in state(folder).items() if (folder / name).is_file()}


def test_the_config_leaves_nothing_to_auto_completion() -> None:
    config = config_of()
    assert (config.name, config.backend, config.max_batch_size) == ("small", "onnxruntime", 16)
    assert config.default_model_filename == "model.onnx"
    types = model_config_pb2.DataType
    assert [(tensor.name, types.Name(tensor.data_type), list(tensor.dims)) for tensor in config.input] == [
        ("image", "TYPE_FP32", [1, 32, 32]),
        ("words", "TYPE_STRING", [-1, 2]),
    ]
    assert [(tensor.name, types.Name(tensor.data_type), list(tensor.dims)) for tensor in config.output] == [
        ("label", "TYPE_INT64", [1]),
        ("certainty", "TYPE_FP32", [1]),
        ("scores", "TYPE_FP32", [7]),
    ]


def test_triton_does_not_batch_and_starts_one_instance() -> None:
    config = config_of()
    assert not config.HasField("dynamic_batching")
    assert not config.HasField("sequence_batching")
    assert [group.count for group in config.instance_group] == [1]
    assert config.parameters["intra_op_thread_count"].string_value == "1"


@pytest.mark.parametrize(("max_batch_size", "sizes"), [(16, [1, 16]), (1, [1]), (2, [1, 2])])
def test_the_smallest_and_the_largest_batch_are_warmed_up_with_every_input(
    max_batch_size: int, sizes: list[int]
) -> None:
    warmups = config_of(max_batch_size).model_warmup
    assert [warmup.batch_size for warmup in warmups] == sizes
    assert len({warmup.name for warmup in warmups}) == len(sizes)
    for warmup in warmups:
        assert {name: list(tensor.dims) for name, tensor in warmup.inputs.items()} == {
            "image": [1, 32, 32],
            "words": [1, 2],  # a variable axis is given a size
        }
        assert all(tensor.zero_data for tensor in warmup.inputs.values())


@pytest.mark.parametrize("datatype", ["BOOL", "UINT8", "INT32", "INT64", "FP16", "FP64", "BF16", "BYTES"])
def test_every_datatype_has_a_place_in_the_config(datatype: Any) -> None:
    inputs = (TensorSpec(name="x", datatype=datatype, shape=(3,)),)
    family = Family(name="f", inputs=inputs, classes=2, models=(MODEL,), sample=FAMILY.sample)
    name = "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
    assert model_config_pb2.DataType.Name(parse_config(model_config(family, MODEL)).input[0].data_type) == name


def test_a_model_is_written_whole_into_a_repository_that_did_not_exist(tmp_path: Path) -> None:
    repository = tmp_path / "deep" / "repository"
    assert write_model(repository, FAMILY, MODEL, b"onnx") is True
    assert contents(repository) == {
        "small/config.pbtxt": model_config(FAMILY, MODEL).encode(),
        "small/1/model.onnx": b"onnx",
    }
    assert [path.name for path in repository.iterdir()] == ["small"], "no staging folder is left"
    assert (repository / "small").stat().st_mode & 0o755 == 0o755, "Triton may run as another user"


def test_writing_the_same_model_again_touches_nothing(tmp_path: Path) -> None:
    write_model(tmp_path, FAMILY, MODEL, b"onnx")
    before = state(tmp_path)
    assert write_model(tmp_path, FAMILY, MODEL, b"onnx") is False
    assert state(tmp_path) == before


def test_a_changed_model_is_replaced_and_its_neighbours_are_not_touched(tmp_path: Path) -> None:
    other = FamilyModel(name="other", build=never_built, max_batch_size=4)
    write_model(tmp_path, FAMILY, other, b"other")
    write_model(tmp_path, FAMILY, MODEL, b"old")
    before = state(tmp_path / "other")
    assert write_model(tmp_path, FAMILY, MODEL, b"new") is True
    assert contents(tmp_path / "small")["1/model.onnx"] == b"new"
    assert state(tmp_path / "other") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "small"]


def test_a_changed_config_is_replaced_too(tmp_path: Path) -> None:
    write_model(tmp_path, FAMILY, MODEL, b"onnx")
    wider = FamilyModel(name="small", build=never_built, max_batch_size=32)
    assert write_model(tmp_path, FAMILY, wider, b"onnx") is True
    assert parse_config((tmp_path / "small" / "config.pbtxt").read_text()).max_batch_size == 32


def test_a_model_with_a_missing_file_is_completed(tmp_path: Path) -> None:
    write_model(tmp_path, FAMILY, MODEL, b"onnx")
    (tmp_path / "small" / "1" / "model.onnx").unlink()
    assert write_model(tmp_path, FAMILY, MODEL, b"onnx") is True
    assert contents(tmp_path)["small/1/model.onnx"] == b"onnx"


@pytest.mark.parametrize("name", ["2/model.onnx", "labels.txt", "1/model.py", "1/.notes"])
@pytest.mark.parametrize("also_ours", [True, False])
def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path, name: str, *, also_ours: bool) -> None:
    if also_ours:
        write_model(tmp_path, FAMILY, MODEL, b"old")
    path = tmp_path / "small" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("somebody's")
    before = state(tmp_path)
    with pytest.raises(ExportRefused, match=f"{tmp_path / 'small'} holds {name}, which this command did not write"):
        write_model(tmp_path, FAMILY, MODEL, b"new")
    assert state(tmp_path) == before


def test_a_file_where_the_model_should_stand_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "small").write_text("somebody's")
    with pytest.raises(ExportRefused, match="small"):
        write_model(tmp_path, FAMILY, MODEL, b"new")
    assert (tmp_path / "small").read_text() == "somebody's"


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failure_in_the_middle_leaves_the_old_model(
    tmp_path: Path, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path, FAMILY, MODEL, b"old")
    before = state(tmp_path / "small")
    calls = 0
    rename = Path.rename

    def failing_rename(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(28, "No space left on device")
        return cast("Path", rename(self, target))

    monkeypatch.setattr(Path, "rename", failing_rename)
    with pytest.raises(OSError, match="No space left"):
        write_model(tmp_path, FAMILY, MODEL, b"new")
    assert state(tmp_path / "small") == before
    assert [path.name for path in tmp_path.iterdir()] == ["small"], "no staging folder is left"


def test_a_failure_while_writing_leaves_no_half_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_self: Path, _data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_model(tmp_path, FAMILY, MODEL, b"new")
    assert list(tmp_path.iterdir()) == []
