"""gRPC messages to requests and responses to gRPC messages.

An input's data is either a raw buffer in `raw_input_contents` or a typed list in its `contents`; one request uses one
of the two for all its inputs. Outputs are always raw.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
from tritonclient.grpc import service_pb2

from cascadeserve.errors import InvalidRequest, NotSupported
from orchestrator.wire.classification import PARAMETER, classified, num_classes
from orchestrator.wire.datatypes import (
    DTYPES,
    array_from_raw,
    bytes_array,
    check_dims,
    check_tensor,
    raw_from_tensor,
    shaped,
    shown_shape,
)
from orchestrator.wire.limits import MAX_LISTED_ELEMENTS, ListedElements, check_entries, check_id
from orchestrator.wire.tensors import InferRequest, Parameter, RequestedOutput, Tensor, check_parameter, check_unique

if TYPE_CHECKING:
    from collections.abc import Mapping

    from orchestrator.wire.tensors import Array, InferResponse

# The field of InferTensorContents that holds a datatype. FP16 and BF16 have none: they must be raw.
_CONTENTS_FIELD = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
# how fields 1 and 2 of a message begin where they are strings
_MODEL_TAGS = (0x0A, 0x12)
_MAX_SHORT = 0x7F
_MAX_INT64 = 2**63 - 1
# the one key that begins with triton_ and is not refused
_EMPTY_FINAL = "triton_enable_empty_final_response"
_VERSION = re.compile(r"[0-9]{1,19}")


def model_of(message: bytes) -> tuple[str, str]:
    """Model name and version of a serialised ModelInferRequest, or what of them is found at its very beginning.

    The two are its first fields, and what writes messages writes fields in order.
    """
    places = ["", ""]
    start = 0
    for position, tag in enumerate(_MODEL_TAGS):
        # a name of more than 127 bytes has a length of two bytes or more: not worth looking for
        if len(message) < start + 2 or message[start] != tag or message[start + 1] > _MAX_SHORT:
            continue
        end = start + 2 + message[start + 1]
        places[position] = message[start + 2 : end].decode("utf-8", "replace")
        start = end
    return places[0], places[1]


def decode_infer_request(
    message: Any,  # noqa: ANN401 - untyped protobuf
    client_timeout_s: float | None,
    *,
    max_listed_elements: int = MAX_LISTED_ELEMENTS,
) -> InferRequest:
    """Read a ModelInferRequest."""
    check_version(message.model_version)
    inputs = message.inputs
    check_entries(inputs, message.outputs, message.parameters)
    check_id(message.id)
    num_raw = len(message.raw_input_contents)
    if num_raw and num_raw != len(inputs):
        raise InvalidRequest(f"the request has {len(inputs)} inputs but {num_raw} raw_input_contents")
    raw = list(message.raw_input_contents)
    parameters = _decode_parameters(message.parameters)
    # It asks for something that only comes from models with several answers per request.
    if not isinstance(parameters.pop(_EMPTY_FINAL, True), bool):
        raise InvalidRequest(f"invalid value type for '{_EMPTY_FINAL}' parameter, expected bool_param.")
    for key, value in parameters.items():
        check_parameter(key, value)
    listed = ListedElements(max_listed_elements)
    for index, item in enumerate(inputs):
        if not raw:
            for _, values in item.contents.ListFields():
                listed.add(item.name, len(values))
        elif item.datatype == "BYTES":
            # each takes at least the four bytes of its length
            listed.add(item.name, min(check_tensor(item.name, item.datatype, item.shape), len(raw[index]) // 4))
    tensors = [_decode_input(item, raw[index] if raw else None) for index, item in enumerate(inputs)]
    check_unique([tensor.name for tensor in tensors])
    return InferRequest(
        model_name=message.model_name,
        model_version=message.model_version,
        id=message.id,
        inputs=tensors,
        parameters=parameters,
        outputs=[_decode_output(item) for item in message.outputs],
        client_timeout_s=client_timeout_s,
    )


def check_version(version: str) -> None:
    """Refuse what is no version at all, as Triton does; empty stands for whichever there is."""
    if version and not _VERSION.fullmatch(version):
        raise InvalidRequest(
            f"failed to get model version from specified version string '{version}', "
            "version should be an integral value > 0"
        )


def encode_infer_response(request: InferRequest, response: InferResponse) -> Any:  # noqa: ANN401
    """Make a ModelInferResponse."""
    outputs = classified(request, response.outputs)
    message = service_pb2.ModelInferResponse(
        model_name=response.model_name,
        model_version=response.model_version,
        id=request.id,
        outputs=[
            service_pb2.ModelInferResponse.InferOutputTensor(
                name=tensor.name, datatype=tensor.datatype, shape=tensor.array.shape
            )
            for tensor in outputs
        ],
        raw_output_contents=[raw_from_tensor(tensor) for tensor in outputs],
    )
    for key, value in response.parameters.items():
        _set_parameter(message.parameters[key], value)
    return message


def _decode_input(item: Any, raw: bytes | None) -> Tensor:  # noqa: ANN401
    name, datatype = item.name, item.datatype
    check_dims(name, item.shape)
    shape = tuple(item.shape)
    if "shared_memory_region" in item.parameters:
        raise NotSupported(f"shared memory is not supported; send the data of input '{name}' in the request")
    if raw is None:
        return Tensor(name, datatype, _array_from_contents(name, datatype, shape, item.contents))
    if item.HasField("contents"):
        raise InvalidRequest(f"input '{name}' has contents although the request uses raw_input_contents")
    return Tensor(name, datatype, array_from_raw(name, datatype, shape, raw))


def _array_from_contents(name: str, datatype: str, shape: tuple[int, ...], contents: Any) -> Array:  # noqa: ANN401
    """Read a typed list."""
    count = check_tensor(name, datatype, shape)
    field = _CONTENTS_FIELD.get(datatype)
    if field is None:
        raise InvalidRequest(f"{datatype} data needs raw_input_contents; there are no contents for input '{name}'")
    for descriptor, _value in contents.ListFields():
        if descriptor.name != field:
            raise InvalidRequest(f"input '{name}' of datatype {datatype} has {descriptor.name} instead of {field}")
    values = getattr(contents, field)
    if len(values) != count:
        raise InvalidRequest(
            f"input '{name}' has {len(values)} elements in {field} but its shape {shown_shape(shape)} has {count}"
        )
    if datatype == "BYTES":
        return shaped(name, bytes_array(list(values)), shape)
    dtype = DTYPES[datatype]
    if field not in ("int_contents", "uint_contents"):
        return shaped(name, np.fromiter(values, dtype, count), shape)
    # These fields are wider than the datatype may be.
    wide = np.fromiter(values, np.int64, count)
    limits = np.iinfo(dtype)
    if count and (int(wide.min()) < limits.min or int(wide.max()) > limits.max):
        raise InvalidRequest(f"input '{name}' holds a number outside the range of {datatype}")
    return shaped(name, wide.astype(dtype), shape)


def _decode_output(item: Any) -> RequestedOutput:  # noqa: ANN401
    if "shared_memory_region" in item.parameters:
        raise NotSupported(f"shared memory is not supported; output '{item.name}' is sent in the response")
    asked = item.parameters[PARAMETER].int64_param if PARAMETER in item.parameters else None
    return RequestedOutput(item.name, binary=True, num_classes=num_classes(item.name, asked))


def _decode_parameters(parameters: Mapping[str, Any]) -> dict[str, Parameter]:
    decoded: dict[str, Parameter] = {}
    for key, choice in parameters.items():
        field = choice.WhichOneof("parameter_choice")
        if field is None:
            raise InvalidRequest(f"the request parameter '{key}' has no value")
        decoded[key] = getattr(choice, field)
    return decoded


def _set_parameter(choice: Any, value: Parameter) -> None:  # noqa: ANN401
    # bool first: it is an int too
    if isinstance(value, bool):
        choice.bool_param = value
    elif isinstance(value, str):
        choice.string_param = value
    elif isinstance(value, float):
        choice.double_param = value
    elif value > _MAX_INT64:
        choice.uint64_param = value
    else:
        choice.int64_param = value
