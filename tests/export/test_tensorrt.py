"""The variant `tensorrt`: nothing here runs it, which takes a GPU; its config is held to what the backend reads."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf import json_format

from cascadeserve.errors import ExportRefused, UsageError
from cascadeserve.triton_config import has_tensorrt_accelerator, parse_config
from export.config_lint import lint_repository
from export.family import Family, FamilyModel, TensorSpec
from export.repository import model_config, write_model

BACKEND = Path(__file__).parents[2] / "cascadeserve" / "local_triton" / "onnxruntime_backend" / "model.py"
INPUTS = (
    TensorSpec(name="image", datatype="FP32", shape=(3, 32, 32)),
    TensorSpec(name="factor", datatype="INT32", shape=(1,)),
)


def never_built() -> Any:
    raise AssertionError("writing a model does not build it")


def model_of(max_batch_size: int = 16) -> FamilyModel:
    return FamilyModel(name="fast", build=never_built, max_batch_size=max_batch_size, variant="tensorrt")


def family_of(*inputs: TensorSpec) -> Family:
    return Family(name="f", inputs=inputs, classes=7, models=(model_of(),), sample=lambda _: {})


FAMILY = family_of(*INPUTS)


def parameters(config: Any) -> dict[str, str]:
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt"
    return dict(accelerator.parameters)


@pytest.mark.parametrize("max_batch_size", [1, 16])
def test_its_config_parses_as_model_config_and_passes_the_linter(tmp_path: Path, max_batch_size: int) -> None:
    write_model(tmp_path, FAMILY, model_of(max_batch_size), b"onnx")
    config = parse_config((tmp_path / "fast" / "config.pbtxt").read_text())
    assert has_tensorrt_accelerator(config)
    assert list(lint_repository(tmp_path).items()) == [("fast/config.pbtxt", ())]


def test_it_asks_for_one_engine_for_all_batches_built_before_the_first_request() -> None:
    config = parse_config(model_config(FAMILY, model_of(), b"onnx"))
    asked = parameters(config)
    assert asked["precision_mode"] == "FP16"
    assert asked["trt_profile_min_shapes"] == "image:1x3x32x32,factor:1x1"
    assert asked["trt_profile_opt_shapes"] == asked["trt_profile_max_shapes"] == "image:16x3x32x32,factor:16x1"
    assert asked["trt_engine_cache_enable"] == "1"
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, 16]
    (group,) = config.instance_group
    assert (group.count, list(group.gpus), "KIND_GPU" in str(group)) == (1, [0], True)


def test_engines_of_other_weights_are_not_taken_from_the_cache() -> None:
    paths = [
        parameters(parse_config(model_config(FAMILY, model_of(), content)))["trt_engine_cache_path"]
        for content in (b"onnx", b"onnx", b"other")
    ]
    assert paths[0] == paths[1] != paths[2]


def test_a_second_version_is_refused_for_it_would_share_the_cache(tmp_path: Path) -> None:
    write_model(tmp_path, FAMILY, model_of(), b"first")
    with pytest.raises(ExportRefused, match=r"fast holds version 1, and versions of a TensorRT model .* a model name"):
        write_model(tmp_path, FAMILY, model_of(), b"second", 2)
    assert write_model(tmp_path, FAMILY, model_of(), b"second") is True


def test_a_family_with_an_open_axis_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^model 'fast': the variant tensorrt .* input 'words' leaves one open"):
        family_of(INPUTS[0], TensorSpec(name="words", datatype="INT64", shape=(-1,)))


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in backend, which Triton's stub imports otherwise."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", SimpleNamespace())
    spec = importlib.util.spec_from_file_location("stand_in_backend", BACKEND)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_stand_in_backend_hands_over_what_the_native_one_would(backend: Any) -> None:
    text = model_config(FAMILY, model_of(), b"onnx")
    document = json_format.MessageToDict(parse_config(text), preserving_proto_field_name=True)
    (tensorrt, options), (cuda, _) = backend._gpu_providers(document, 0)
    assert (tensorrt, cuda) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    asked = parameters(parse_config(text))
    assert (asked.pop("precision_mode"), asked.pop("max_workspace_size_bytes")) == ("FP16", "1073741824")
    renamed = {"device_id": 0, "trt_fp16_enable": "1", "trt_max_workspace_size": "1073741824"}
    assert options == asked | renamed


def test_the_stand_in_backend_uses_cuda_where_tensorrt_is_not_asked_for(backend: Any) -> None:
    assert backend._gpu_providers({}, 2) == [("CUDAExecutionProvider", {"device_id": 2})]
