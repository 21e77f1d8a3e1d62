"""Where a family's models come from: what they answer there, and what they are as ONNX models without a head."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from torch import nn

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # must be set before the import

import onnxruntime as ort

from cascadeserve.errors import ExportRefused, InvalidArtefact, UsageError
from export.graph import inputs_of, shape_of
from export.heads import class_model
from export.onnx_export import export_onnx, quiet_pytorch
from export.reasons import reason_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from export.family import Family, FamilyModel, TensorSpec

    Rows = dict[str, NDArray[np.generic]]

_state = ort.capi.onnxruntime_pybind11_state
ORT_ERRORS = (
    _state.Fail,
    _state.InvalidArgument,
    _state.InvalidGraph,
    _state.InvalidProtobuf,
    _state.NotImplemented,
    _state.RuntimeException,
    ValueError,
)
_DATATYPES = {"FLOAT": "FP32", "DOUBLE": "FP64", "FLOAT16": "FP16", "BFLOAT16": "BF16", "STRING": "BYTES"}


class Source(Protocol):
    """A model before it is exported. `framework` names, in messages, what runs it."""

    framework: str

    def run(self, rows: Rows) -> NDArray[np.float32]:
        """What it gives for one batch: logits or probabilities [n, classes].

        Raises:
            ExportRefused: it does not run.

        """

    def onnx_model(self) -> onnx.ModelProto:
        """Return it in ONNX, its output [n, classes] the only one, the graph named as the model."""


def open_source(family: Family, model: FamilyModel) -> Source:
    """Build a model, or read it from its file.

    Raises:
        InvalidArtefact: the file cannot be read or is of another kind.
        UsageError: its inputs or outputs are not the family's.
        ExportRefused: ONNX Runtime cannot run it.

    """
    if model.file is None:
        if model.build is None:
            raise ValueError(f"{model.name} has no source")  # FamilyModel takes care of that
        return TorchSource(family, model, model.build().eval())
    _refuse_unreadable(model.file)
    if model.is_onnx:
        return OnnxSource(family, model, model.file)
    return TorchSource(family, model, _read_torch(family, model, model.file))


def in_batches(run: Callable[[Rows], NDArray[Any]], rows: Rows, size: int) -> NDArray[Any]:
    """Answers to all rows, asked for `size` at a time."""
    return np.concatenate([run(batch) for batch in batches(rows, size)])


def batches(rows: Rows, size: int) -> Iterator[Rows]:
    """Rows in their order, `size` at a time."""
    for start in range(0, len(next(iter(rows.values()))), size):
        yield {name: array[start : start + size] for name, array in rows.items()}


def open_session(model: bytes | Path) -> ort.InferenceSession:
    """Open an ONNX model, serialised or in a file, on the CPU; raises one of ORT_ERRORS."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(
        model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
    )


class TorchSource:
    """A PyTorch module that takes the family's inputs in their order."""

    framework = "PyTorch"

    def __init__(self, family: Family, model: FamilyModel, module: nn.Module) -> None:
        """`module` computes as in inference."""
        self._family = family
        self._model = model
        self._module = module

    def run(self, rows: Rows) -> NDArray[np.float32]:
        """See `Source.run`."""
        batch = [torch.from_numpy(rows[spec.name]) for spec in self._family.inputs]
        try:
            with torch.inference_mode():
                found = self._module(*batch)
        except Exception as error:
            # whatever the model's own code raises
            raise _does_not_run(self._model, self.framework, error) from error
        if not isinstance(found, torch.Tensor):
            raise ExportRefused(
                f"{self._model.name}: returns a {type(found).__name__}, but one tensor [n, classes] is needed; wrap it"
            )
        return found.float().numpy()

    def onnx_model(self) -> onnx.ModelProto:
        """See `Source.onnx_model`."""
        self.run(self._family.checked_sample(2))  # first, since it fails in plainer words than an exporter
        return _class_model(self._model, export_onnx(self._family, self._model, self._module))


class OnnxSource:
    """An ONNX file as it was given, run by ONNX Runtime."""

    framework = "ONNX Runtime"

    def __init__(self, family: Family, model: FamilyModel, path: Path) -> None:
        """Read it and hold it against what the family states."""
        self._model = model
        self._onnx_model = _class_model(model, _read_onnx(path), path)
        self._onnx_model.graph.name = model.name
        inputs = inputs_of(self._onnx_model.graph)
        _refuse_other_inputs(
            model,
            family.inputs,
            {value.name: (_onnx_datatype(value), shape_of(value) if _has_shape(value) else None) for value in inputs},
        )
        self._output = self._onnx_model.graph.output[0].name
        try:
            self._session = open_session(path)
        except ORT_ERRORS as error:
            raise ExportRefused(
                f"{model.name}: ONNX Runtime, which serves it, does not take {path} ({reason_of(error)}); replace the "
                "operator that it does not know"
            ) from error

    def run(self, rows: Rows) -> NDArray[np.float32]:
        """See `Source.run`."""
        try:
            (found,) = self._session.run([self._output], rows)
        except ORT_ERRORS as error:
            raise _does_not_run(self._model, self.framework, error) from error
        return np.asarray(found, dtype=np.float32)

    def onnx_model(self) -> onnx.ModelProto:
        """See `Source.onnx_model`."""
        return self._onnx_model


def _does_not_run(model: FamilyModel, framework: str, error: Exception) -> ExportRefused:
    return ExportRefused(
        f"{model.name}: {framework} does not run it on rows of the stated inputs ({reason_of(error)}); make them agree"
    )


def _class_model(model: FamilyModel, onnx_model: onnx.ModelProto, path: Path | None = None) -> onnx.ModelProto:
    try:
        return class_model(onnx_model, model.output_name)
    except UsageError as error:
        where = "" if path is None else f"{path}: "
        raise UsageError(f"{model.name}: {where}{error}") from error


# --- files


def _refuse_unreadable(path: Path) -> None:
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise InvalidArtefact(f"cannot be read ({error.strerror}); check the path", path=path) from error


def _read_onnx(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path)
    except DecodeError as error:
        raise InvalidArtefact("is no ONNX file, or a damaged one; export the model again", path=path) from error
    except (OSError, onnx.checker.ValidationError) as error:
        raise InvalidArtefact(
            f"lacks weights of its own file ({reason_of(error)}); put it beside", path=path
        ) from error
    if not model.graph.output:
        raise InvalidArtefact("is no ONNX file: it holds no graph with an output; export the model again", path=path)
    return model


def _read_torch(family: Family, model: FamilyModel, path: Path) -> nn.Module:
    kind = "TorchScript" if model.is_torchscript else "torch.export"
    try:
        with quiet_pytorch():
            if model.is_torchscript:
                return torch.jit.load(path, map_location="cpu").eval()  # type: ignore[no-untyped-call,no-any-return]
            program = torch.export.load(path)
            module = _Program(program)
    except Exception as error:
        # which error, depends on where its reader stumbles
        raise InvalidArtefact(
            f"is no {kind} file, or a damaged one ({reason_of(error)}); weights alone hold no model: save it by "
            f"{'torch.jit.save' if model.is_torchscript else 'torch.export.save'}, or give `build` in a Python family",
            path=path,
        ) from error
    _refuse_other_program(family, model, program)
    return module


class _Program(nn.Module):
    """A program as a module that lets exporters ask for inference; it was settled when the program was made."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        self.module = program.module()

    def train(self, mode: bool = True) -> _Program:  # noqa: ARG002, FBT001, FBT002 - as PyTorch has it
        return self

    def forward(self, *inputs: torch.Tensor) -> Any:  # noqa: ANN401 - whatever the program returns
        return self.module(*inputs)


def _refuse_other_program(family: Family, model: FamilyModel, program: torch.export.ExportedProgram) -> None:
    """Programs state what they take; a fixed batch would be told late, and in PyTorch's words."""
    names = program.graph_signature.user_inputs
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    if len(values) != len(family.inputs):
        raise UsageError(
            f"{model.name}: {model.file} takes {len(values)} inputs, the family states {len(family.inputs)}"
        )
    found = {}
    for spec, value in zip(family.inputs, values, strict=True):
        shape = [size if isinstance(size, int) else "?" for size in value.shape]
        if shape and isinstance(shape[0], int):
            raise UsageError(
                f"{model.name}: the input {spec.name!r} of {model.file} is fixed to a batch of {shape[0]}: export it "
                "with dynamic_shapes that leave axis 0 open"
            )
        datatype = str(value.dtype).removeprefix("torch.").replace("bfloat", "BF").replace("float", "FP").upper()
        found[spec.name] = (datatype, ["n", *shape[1:]])
    _refuse_other_inputs(model, family.inputs, found)


def _has_shape(value: onnx.ValueInfoProto) -> bool:
    return value.type.tensor_type.HasField("shape")


def _onnx_datatype(value: onnx.ValueInfoProto) -> str:
    name = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
    return _DATATYPES.get(name, name)


def _refuse_other_inputs(
    model: FamilyModel, inputs: Sequence[TensorSpec], found: Mapping[str, tuple[str, Sequence[int | str] | None]]
) -> None:
    """`found`: datatype and shape, batch axis included, by name; axes that are no numbers are open."""
    if set(found) != {spec.name for spec in inputs}:
        names, stated = (", ".join(map(repr, names)) for names in (found, (spec.name for spec in inputs)))
        raise UsageError(f"{model.name}: {model.file} has the inputs {names}, the family states {stated}; name them so")
    for spec in inputs:
        datatype, shape = found[spec.name]
        sizes = shape[1:] if shape is not None else spec.shape
        # an axis that is open in the file may be stated as fixed, the other way round Triton refuses it
        agrees = len(sizes) == len(spec.shape) and all(
            isinstance(size, str) or size == wanted for size, wanted in zip(sizes, spec.shape, strict=True)
        )
        if datatype != spec.datatype or not agrees:
            has, states = (", ".join(map(str, axes)) for axes in (shape or ("n", "..."), ("n", *spec.shape)))
            raise UsageError(
                f"{model.name}: the input {spec.name!r} of {model.file} is {datatype} [{has}], but the family states "
                f"{spec.datatype} [{states}]; make them agree"
            )
