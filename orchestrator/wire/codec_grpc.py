"""gRPC messages to requests and responses to gRPC messages.

An input's data is either a raw buffer in `raw_input_contents` or a typed list in its `contents`; one request uses one
of the two for all its inputs. Outputs are always raw.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from tritonclient.grpc import service_pb2

from cascadeserve.errors import InvalidRequest, NotSupported
from orchestrator.wire.datatypes import (
    DTYPES,
    array_from_raw,
    bytes_array,
    check_tensor,
    raw_from_tensor,
    shaped,
    shown_shape,
)
from orchestrator.wire.tensors import InferRequest, Parameter, RequestedOutput, Tensor, check_parameter, check_unique

if TYPE_CHECKING:
    from collections.abc import Mapping

    from orchestrator.wire.tensors import Array, InferResponse, ModelMetadata, TensorMetadata

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


def decode_infer_request(message: Any, client_timeout_s: float | None) -> InferRequest:  # noqa: ANN401 - untyped protobuf
    """Read a ModelInferRequest."""
    raw = list(message.raw_input_contents)
    inputs = message.inputs
    if raw and len(raw) != len(inputs):
        raise InvalidRequest(f"the request has {len(inputs)} inputs but {len(raw)} raw_input_contents")
    parameters = _decode_parameters(message.parameters)
    for key, value in parameters.items():
        check_parameter(key, value)
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


def encode_infer_response(request: InferRequest, response: InferResponse) -> Any:  # noqa: ANN401
    """Make a ModelInferResponse."""
    message = service_pb2.ModelInferResponse(
        model_name=response.model_name,
        model_version=response.model_version,
        id=request.id,
        outputs=[
            service_pb2.ModelInferResponse.InferOutputTensor(
                name=tensor.name, datatype=tensor.datatype, shape=tensor.array.shape
            )
            for tensor in response.outputs
        ],
        raw_output_contents=[raw_from_tensor(tensor) for tensor in response.outputs],
    )
    for key, value in response.parameters.items():
        _set_parameter(message.parameters[key], value)
    return message


def encode_model_metadata(metadata: ModelMetadata) -> Any:  # noqa: ANN401
    """Make a ModelMetadataResponse."""
    return service_pb2.ModelMetadataResponse(
        name=metadata.name,
        versions=metadata.versions,
        platform=metadata.platform,
        inputs=[_encode_tensor_metadata(tensor) for tensor in metadata.inputs],
        outputs=[_encode_tensor_metadata(tensor) for tensor in metadata.outputs],
    )


def _encode_tensor_metadata(tensor: TensorMetadata) -> Any:  # noqa: ANN401
    return service_pb2.ModelMetadataResponse.TensorMetadata(
        name=tensor.name, datatype=tensor.datatype, shape=tensor.shape
    )


def _decode_input(item: Any, raw: bytes | None) -> Tensor:  # noqa: ANN401
    name, datatype, shape = item.name, item.datatype, tuple(item.shape)
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
    if "classification" in item.parameters:
        raise NotSupported(f"the classification extension is not supported; ask for the values of '{item.name}'")
    return RequestedOutput(item.name, binary=True)


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
