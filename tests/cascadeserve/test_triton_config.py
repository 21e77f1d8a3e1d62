from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from cascadeserve.errors import InvalidArtefact
from cascadeserve.gear_plan import TensorSpec
from cascadeserve.triton_config import (
    composing_models,
    config_digest,
    ensemble_config,
    format_config,
    instance_count,
    model_digest,
    model_versions,
    parse_config,
    preprocessing_config,
    served_versions,
    with_instance_count,
    with_versions,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Group = model_config_pb2.ModelInstanceGroup
CONFIG = """
name: "small"
backend: "onnxruntime"
max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: 4 }
output { name: "label" data_type: TYPE_INT64 dims: 1 }
instance_group { count: 1 }
parameters { key: "intra_op_thread_count" value { string_value: "1" } }
model_warmup { name: "one" batch_size: 1 }
"""

text = st.text(max_size=12)
groups = st.builds(
    Group, count=st.integers(1, 40), kind=st.sampled_from(Group.Kind.values()), gpus=st.lists(st.integers(0, 7))
)
tensors = st.builds(
    model_config_pb2.ModelInput,
    name=text,
    data_type=st.sampled_from(model_config_pb2.DataType.values()),
    dims=st.lists(st.integers(-1, 2**40), max_size=4),
)
parameters = st.dictionaries(text, text.map(lambda value: model_config_pb2.ModelParameter(string_value=value)))
configs = st.builds(
    model_config_pb2.ModelConfig,
    name=text,
    backend=text,
    max_batch_size=st.integers(0, 2**31 - 1),
    input=st.lists(tensors, max_size=3),
    instance_group=st.lists(groups, max_size=3),
    parameters=parameters,
)
relaxed = settings(deadline=None, max_examples=50)


def parsed(suffix: str = "") -> Any:
    return parse_config(CONFIG + suffix)


@relaxed
@given(configs)
def test_a_config_survives_the_round_trip_through_text(config: Any) -> None:
    assert parse_config(format_config(config)) == config


@relaxed
@given(parameters)
def test_equal_configs_have_the_same_text_and_digest_whatever_the_order_of_their_maps(entries: dict[str, Any]) -> None:
    forwards = model_config_pb2.ModelConfig(parameters=entries)
    backwards = model_config_pb2.ModelConfig(parameters=dict(reversed(entries.items())))
    assert format_config(forwards) == format_config(backwards)
    assert config_digest(forwards) == config_digest(backwards)


@relaxed
@given(st.text(max_size=60))
def test_any_text_is_a_config_or_an_invalid_artefact(content: str) -> None:
    with suppress(InvalidArtefact):
        assert parse_config(content).IsInitialized()


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ('name: "a"\nmax_batch_sice: 8\n', "2:1"),
        ('name: "a"\n\n  max_batch_size: "eight"\n', "3:19"),
        ("max_batch_size: 1\ninput [ {\n", "2:9"),
        ("max_batch_size: 99999999999999999999", "1:17"),
    ],
)
def test_bad_text_is_refused_with_path_line_and_column(content: str, place: str, tmp_path: Path) -> None:
    path = tmp_path / "config.pbtxt"
    with pytest.raises(InvalidArtefact) as caught:
        parse_config(content, path=path)
    assert caught.value.path == path
    assert f"{path}: is no Triton model config: {place} : " in str(caught.value)


def test_what_the_schema_of_this_project_does_not_use_survives_too() -> None:
    config = parsed('optimization { priority: PRIORITY_MAX } sequence_batching { control_input { name: "start" } }')
    again = parse_config(format_config(config))
    assert again.optimization.priority == model_config_pb2.ModelOptimizationPolicy.PRIORITY_MAX
    assert again.sequence_batching.control_input[0].name == "start"


@relaxed
@given(configs)
def test_instance_count_sums_the_groups(config: Any) -> None:
    assert instance_count(config) == sum(group.count for group in config.instance_group)


def test_a_config_without_groups_has_no_instances() -> None:
    assert instance_count(model_config_pb2.ModelConfig()) == 0
    assert instance_count(parsed("instance_group { count: 3 kind: KIND_GPU gpus: [1] }")) == 1 + 3


@relaxed
@given(configs, st.integers(1, 1000), st.sampled_from(["cpu", "gpu"]))
def test_an_instance_count_is_set_by_one_group_and_nothing_else_changes(config: Any, count: int, kind: Any) -> None:
    before = config.SerializeToString(deterministic=True)
    changed = with_instance_count(config, count, kind=kind)
    assert config.SerializeToString(deterministic=True) == before, "the original is left as it was"
    assert len(changed.instance_group) == 1
    assert instance_count(changed) == count
    assert config_digest(changed) == config_digest(config)


@pytest.mark.parametrize(
    ("kind", "gpu", "wanted"),
    [
        ("cpu", None, Group(count=2, kind=Group.KIND_CPU)),
        ("gpu", None, Group(count=2, kind=Group.KIND_GPU, gpus=[0])),
        ("gpu", 0, Group(count=2, kind=Group.KIND_GPU, gpus=[0])),
        ("gpu", 3, Group(count=2, kind=Group.KIND_GPU, gpus=[3])),
    ],
)
def test_the_one_group_stands_on_the_endpoints_device(kind: Any, gpu: int | None, wanted: Any) -> None:
    assert list(with_instance_count(parsed(), 2, kind=kind, gpu=gpu).instance_group) == [wanted]


@pytest.mark.parametrize("count", [0, -1])
@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_a_count_below_one_is_refused(count: int, kind: Any) -> None:
    with pytest.raises(ValueError, match=f"at least 1, got {count}"):
        with_instance_count(parsed(), count, kind=kind)


@pytest.mark.parametrize(
    "suffix",
    [
        "instance_group { count: 7 kind: KIND_GPU gpus: [0, 1] }",
        "version_policy { latest { num_versions: 2 } }",
        "version_policy { specific { versions: [1, 2] } }",
    ],
)
def test_the_digest_ignores_instances_and_version_policy(suffix: str) -> None:
    assert config_digest(parsed(suffix)) == config_digest(parsed())


CHANGES: dict[str, Callable[[Any], Any]] = {
    "name": lambda config: setattr(config, "name", "other"),
    "backend": lambda config: setattr(config, "backend", "python"),
    "max_batch_size": lambda config: setattr(config, "max_batch_size", 9),
    "input dims": lambda config: config.input[0].dims.append(1),
    "input type": lambda config: setattr(config.input[0], "data_type", model_config_pb2.TYPE_FP16),
    "further input": lambda config: config.input.add(name="y"),
    "output name": lambda config: setattr(config.output[0], "name", "class"),
    "no output": lambda config: config.ClearField("output"),
    "parameter": lambda config: setattr(config.parameters["intra_op_thread_count"], "string_value", "2"),
    "further parameter": lambda config: setattr(config.parameters["more"], "string_value", ""),
    "warm-up": lambda config: config.ClearField("model_warmup"),
    "dynamic batching": lambda config: config.dynamic_batching.SetInParent(),
    "default file": lambda config: setattr(config, "default_model_filename", "m.onnx"),
    "response cache": lambda config: setattr(config.response_cache, "enable", True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_depends_on_every_other_field(change: str) -> None:
    config = parsed()
    CHANGES[change](config)
    assert config_digest(config) != config_digest(parsed())


def test_taking_a_digest_leaves_the_config_alone() -> None:
    config = parsed("version_policy { latest { num_versions: 2 } }")
    before = format_config(config)
    config_digest(config)
    assert format_config(config) == before


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(CONFIG)
    (folder / "1" / "model.onnx").write_bytes(b"weights")
    return folder


def test_a_model_digest_is_the_same_wherever_and_whenever_the_folder_was_written(folder: Path) -> None:
    first = model_digest(folder)
    (folder / "1" / "model.onnx").write_bytes(b"weights")
    (folder / "empty").mkdir()
    moved = folder.rename(folder.with_name("elsewhere"))
    assert model_digest(moved) == first
    assert first.removeprefix("sha256:").isalnum()
    assert len(first) == len("sha256:") + 64


MODEL_CHANGES: dict[str, Callable[[Path], Any]] = {
    "content": lambda folder: (folder / "1" / "model.onnx").write_bytes(b"Weights"),
    "longer": lambda folder: (folder / "1" / "model.onnx").write_bytes(b"weights\0"),
    "empty": lambda folder: (folder / "1" / "model.onnx").write_bytes(b""),
    "file name": lambda folder: (folder / "1" / "model.onnx").rename(folder / "1" / "model.plan"),
    "version": lambda folder: (folder / "1").rename(folder / "2"),
    "further file": lambda folder: (folder / "labels.txt").write_text(""),
    "removed file": lambda folder: (folder / "1" / "model.onnx").unlink(),
    "nested configs": lambda folder: _write(folder / "1" / "configs" / "a"),
    "nested config.pbtxt": lambda folder: _write(folder / "1" / "config.pbtxt"),
    "config": lambda folder: (folder / "config.pbtxt").write_text(CONFIG + "response_cache { enable: true }"),
}
NO_CHANGES: dict[str, Callable[[Path], Any]] = {
    "configs": lambda folder: _write(folder / "configs" / "wide.pbtxt"),
    "__pycache__": lambda folder: _write(folder / "1" / "__pycache__" / "model.cpython-311.pyc"),
    "instances": lambda folder: (folder / "config.pbtxt").write_text(CONFIG + "instance_group { count: 4 }"),
    "layout of the text": lambda folder: (folder / "config.pbtxt").write_text(format_config(parsed())),
}


def _write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")


@pytest.mark.parametrize("change", MODEL_CHANGES)
def test_the_model_digest_depends_on_the_name_and_content_of_every_file(change: str, folder: Path) -> None:
    before = model_digest(folder)
    MODEL_CHANGES[change](folder)
    assert model_digest(folder) != before


@pytest.mark.parametrize("change", NO_CHANGES)
def test_the_model_digest_ignores_instances_other_configs_and_caches(change: str, folder: Path) -> None:
    before = model_digest(folder)
    NO_CHANGES[change](folder)
    assert model_digest(folder) == before


def test_content_does_not_move_unnoticed_between_files(folder: Path) -> None:
    (folder / "1" / "a").write_bytes(b"12")
    (folder / "1" / "b").write_bytes(b"3")
    before = model_digest(folder)
    (folder / "1" / "a").write_bytes(b"1")
    (folder / "1" / "b").write_bytes(b"23")
    assert model_digest(folder) != before


def test_a_broken_config_in_a_model_folder_is_named(folder: Path) -> None:
    (folder / "config.pbtxt").write_text("name: 1")
    with pytest.raises(InvalidArtefact, match=str(folder / "config.pbtxt")):
        model_digest(folder)


def test_the_digest_of_a_version_is_of_its_files_and_of_those_of_no_version(folder: Path) -> None:
    before = model_digest(folder)
    _write(folder / "2" / "model.onnx")
    assert model_digest(folder, 1) == before
    second = model_digest(folder, 2)
    assert second == model_digest(folder) != before
    _write(folder / "labels.txt")
    assert model_digest(folder, 1) != before
    assert model_digest(folder, 2) != second


def test_versions_are_the_folders_that_triton_takes_for_ones(folder: Path) -> None:
    for name in ("2", "10", "03", "x4", "5x", "²"):
        (folder / name).mkdir()
    _write(folder / "7")
    assert model_versions(folder) == [1, 2, 10]
    assert model_versions(folder / "nothing") == []


@pytest.mark.parametrize(
    ("policy", "served"),
    [
        ("", {3}),
        ("version_policy { latest { num_versions: 2 } }", {2, 3}),
        ("version_policy { all { } }", {1, 2, 3}),
        ("version_policy { specific { versions: 1 versions: 3 versions: 9 } }", {1, 3}),
    ],
)
def test_which_versions_a_server_loads(policy: str, served: set[int]) -> None:
    assert served_versions(parsed(policy), [1, 2, 3]) == served


def test_named_versions_replace_whatever_policy_there_was() -> None:
    config = with_versions(parsed("version_policy { all { } }"), {2, 1})
    assert list(config.version_policy.specific.versions) == [1, 2]
    assert served_versions(config, [1, 2, 3]) == {1, 2}


def test_an_ensemble_joins_preprocessing_and_classifier() -> None:
    words = TensorSpec(name="text", datatype="BYTES", shape=(1,))
    counts = TensorSpec(name="label", datatype="FP32", shape=(512,))
    joined = ensemble_config(
        "words", (words,), preprocessing="tokens", between=(counts,), classifier="words_classifier",
        num_classes=3, max_batch_size=8,
    )  # fmt: skip
    assert composing_models(joined) == ("tokens", "words_classifier")
    first, second = joined.ensemble_scheduling.step
    assert dict(first.input_map) == {"text": "text"}
    # an output of the ensemble has that name too: the tensor between them needs its own
    assert dict(first.output_map) == dict(second.input_map) == {"label": "tokens:label"}
    assert dict(second.output_map) == {name: name for name in ("label", "certainty", "scores")}
    assert instance_count(joined) == 1
    assert with_instance_count(joined, 3, kind="gpu") == joined
    tokens = preprocessing_config("tokens", (words,), (counts,), max_batch_size=8)
    assert composing_models(tokens) == ()
    assert with_instance_count(tokens, 3, kind="gpu").instance_group[0] == Group(count=3, kind=Group.KIND_CPU)
