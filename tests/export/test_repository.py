from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import model_config_pb2

from cascadeserve.errors import ExportRefused
from cascadeserve.triton_config import format_config, parse_config, with_instance_count
from export.config_lint import lint_repository
from export.family import Family, FamilyModel, TensorSpec
from export.repository import model_config, write_model

ROOT = Path(__file__).parents[2]
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
    return parse_config(model_config(FAMILY, model, b"onnx"))


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
    assert model_config_pb2.DataType.Name(parse_config(model_config(family, MODEL, b"onnx")).input[0].data_type) == name


def test_a_model_is_written_whole_into_a_repository_that_did_not_exist(tmp_path: Path) -> None:
    repository = tmp_path / "deep" / "repository"
    assert write_model(repository, FAMILY, MODEL, b"onnx") is True
    assert contents(repository) == {
        "small/config.pbtxt": model_config(FAMILY, MODEL, b"onnx").encode(),
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


@pytest.mark.parametrize("name", ["2/model.plan", "02/model.onnx", "labels.txt", "1/model.py", "1/.notes", "2"])
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


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_one_sentence_and_leaves_the_old_model(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path, FAMILY, MODEL, b"old")
    before = state(tmp_path / "small")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    with monkeypatch.context() as patched:
        patched.setattr(*((os, "fsync", full) if call == "fsync" else (Path, "replace", full)))
        with pytest.raises(
            ExportRefused, match=r"^small: cannot be written \(somewhere: No space left on device\); make"
        ):
            write_model(tmp_path, FAMILY, MODEL, b"new")
    assert state(tmp_path / "small") == before
    assert [path.name for path in tmp_path.iterdir()] == ["small"], "nothing is left beside the models"


def test_a_full_disk_leaves_no_half_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ExportRefused, match="No space left"):
        write_model(tmp_path, FAMILY, MODEL, b"new")
    assert list(tmp_path.iterdir()) == []


def test_a_repository_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportRefused, match=rf"^small: cannot be written \({tmp_path}/file.*: Not a directory\); "):
        write_model(tmp_path / "file" / "repository", FAMILY, MODEL, b"onnx")


def test_a_kill_at_any_moment_leaves_no_folder_that_triton_would_take_for_a_model(tmp_path: Path) -> None:
    program = """
import os, sys
from pathlib import Path
from tests.export.test_repository import FAMILY, MODEL, write_model
os.fsync = lambda handle: os._exit(9)  # as a kill would, with no chance to clean up
write_model(Path(sys.argv[1]), FAMILY, MODEL, b"onnx")
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=False)
    assert done.returncode == 9
    (left,) = tmp_path.iterdir()
    assert left.is_file()
    assert left.name.startswith(".export-")
    write_model(tmp_path, FAMILY, MODEL, b"onnx")
    assert contents(tmp_path / "small").keys() == {"config.pbtxt", "1/model.onnx"}


# --- versions ---------------------------------------------------------------------------------------------------------


def versions_of(folder: Path) -> list[int]:
    """Versions that the config says are served; none where it says nothing."""
    config = parse_config((folder / "config.pbtxt").read_text())
    assert config.HasField("version_policy") == bool(config.version_policy.specific.versions)
    return list(config.version_policy.specific.versions)


def test_a_higher_version_stands_beside_the_others_and_all_are_served(tmp_path: Path) -> None:
    write_model(tmp_path, FAMILY, MODEL, b"first")
    assert versions_of(tmp_path / "small") == []
    first = state(tmp_path / "small" / "1")
    assert write_model(tmp_path, FAMILY, MODEL, b"second", 2) is True
    assert write_model(tmp_path, FAMILY, MODEL, b"tenth", 10) is True
    assert state(tmp_path / "small" / "1") == first
    assert versions_of(tmp_path / "small") == [1, 2, 10]
    files = {name: data for name, data in contents(tmp_path / "small").items() if name != "config.pbtxt"}
    assert files == {"1/model.onnx": b"first", "2/model.onnx": b"second", "10/model.onnx": b"tenth"}
    assert [finding for findings in lint_repository(tmp_path).values() for finding in findings] == []


@pytest.mark.parametrize(("content", "version"), [(b"first", 1), (b"second", 2)])
def test_a_version_that_stands_there_already_is_left_as_it_is(tmp_path: Path, content: bytes, version: int) -> None:
    write_model(tmp_path, FAMILY, MODEL, b"first")
    write_model(tmp_path, FAMILY, MODEL, b"second", 2)
    before = state(tmp_path)
    assert write_model(tmp_path, FAMILY, MODEL, content, version) is False
    assert state(tmp_path) == before


def test_the_only_version_is_written_anew_whatever_its_number(tmp_path: Path) -> None:
    write_model(tmp_path, FAMILY, MODEL, b"old", 3)
    assert write_model(tmp_path, FAMILY, MODEL, b"new", 3) is True
    assert contents(tmp_path / "small")["3/model.onnx"] == b"new"
    assert versions_of(tmp_path / "small") == []


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (2, "holds version 2 with other content beside other versions, .* --version 5$"),
        (4, "holds version 4 with other content beside other versions, .* --version 5$"),
        (1, "holds version 4 already, so version 1 is no new one; export it with --version 5$"),
        (3, "holds version 4 already, so version 3 is no new one; export it with --version 5$"),
    ],
)
def test_versions_side_by_side_do_not_change(tmp_path: Path, version: int, words: str) -> None:
    write_model(tmp_path, FAMILY, MODEL, b"second", 2)
    write_model(tmp_path, FAMILY, MODEL, b"fourth", 4)
    before = state(tmp_path)
    with pytest.raises(ExportRefused, match=words):
        write_model(tmp_path, FAMILY, MODEL, b"other", version)
    assert state(tmp_path) == before


def test_a_version_that_needs_another_config_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, FAMILY, MODEL, b"first")
    wider = FamilyModel(name="small", build=never_built, max_batch_size=32)
    before = state(tmp_path)
    with pytest.raises(ExportRefused, match=r"config\.pbtxt has another max_batch_size than this export needs"):
        write_model(tmp_path, FAMILY, wider, b"second", 2)
    assert state(tmp_path) == before


def test_instances_that_the_owner_chose_are_no_other_config(tmp_path: Path) -> None:
    write_model(tmp_path, FAMILY, MODEL, b"first")
    path = tmp_path / "small" / "config.pbtxt"
    path.write_text(format_config(with_instance_count(parse_config(path.read_text()), 3, kind="gpu")))
    assert write_model(tmp_path, FAMILY, MODEL, b"second", 2) is True


@pytest.mark.parametrize("version", [1, 2])
def test_configs_of_endpoints_are_the_owners_and_not_touched(tmp_path: Path, version: int) -> None:
    write_model(tmp_path, FAMILY, MODEL, b"old")
    path = tmp_path / "small" / "configs" / "baseline.pbtxt"
    path.parent.mkdir()
    path.write_text("somebody's")
    before = state(path.parent)
    assert write_model(tmp_path, FAMILY, MODEL, b"new", version) is True
    assert state(path.parent) == before
