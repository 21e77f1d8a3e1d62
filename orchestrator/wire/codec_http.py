"""HTTP bodies to requests and responses to HTTP bodies: KServe v2 JSON with the binary tensor extension.

A body is one JSON object, then the raw buffers of its binary tensors in order. `Inference-Header-Content-Length`
says how long the JSON is; without it the whole body is JSON, and 0 means one raw tensor and no JSON at all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec

from cascadeserve.errors import InvalidRequest, NotSupported
from orchestrator.wire.classification import classified, num_classes
from orchestrator.wire.datatypes import DTYPES, MAX_DIM, array_from_raw, bytes_array, check_tensor, raw_from_tensor
from orchestrator.wire.json_data import JSON_ERRORS, array_from_json, flattened, json_from_tensor
from orchestrator.wire.json_numbers import names_not_finite
from orchestrator.wire.limits import (
    MAX_LISTED_ELEMENTS,
    ListedElements,
    check_entries,
    check_fields,
    check_id,
    check_json,
)
from orchestrator.wire.not_finite import marked, read_slowly, unmarked
from orchestrator.wire.tensors import InferRequest, Parameter, RequestedOutput, Tensor, check_parameter, check_unique

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from orchestrator.wire.tensors import InferResponse, ModelMetadata

HEADER_LENGTH = "Inference-Header-Content-Length"
# A client writes the same JSON again and again and other data behind it. What holds data or an id is seldom met twice.
_MAX_KNOWN = 512
_MAX_KNOWN_BYTES = 2048
# elements of BYTES that are cut in a millisecond, and the bytes before each
_MANY = 1 << 12
_LENGTH_BYTES = 4

_Dim = Annotated[int, msgspec.Meta(ge=0, le=MAX_DIM)]
_Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_DIM)]


# Unknown keys are ignored everywhere, as Triton does. gc=False: these live for one decode and hold no cycles.
class _InputParameters(msgspec.Struct, gc=False, frozen=True):
    binary_data_size: _Size | None = None
    shared_memory_region: Any = None


class _Input(msgspec.Struct, gc=False):
    name: str
    datatype: str
    shape: tuple[_Dim, ...]
    # null as well: what serialises objects writes it for one that is absent
    parameters: _InputParameters | None = None
    # Raw: it is decoded once the datatype is known; empty when absent
    data: msgspec.Raw = msgspec.Raw()


class _OutputParameters(msgspec.Struct, gc=False, frozen=True):
    binary_data: bool | None = None
    classification: Any = None
    shared_memory_region: Any = None


class _Output(msgspec.Struct, gc=False):
    name: str
    parameters: _OutputParameters | None = None


_NO_INPUT_PARAMETERS, _NO_OUTPUT_PARAMETERS = _InputParameters(), _OutputParameters()


class _Head(msgspec.Struct, gc=False):
    inputs: list[_Input]
    id: str = ""
    parameters: dict[str, Parameter] = {}
    outputs: list[_Output] = []


class _Beside(msgspec.Struct, gc=False):
    """What stands beside the inputs, unread."""

    parameters: msgspec.Raw = msgspec.Raw()
    outputs: msgspec.Raw = msgspec.Raw()


# JSON of which even that many fields could be a part
_LARGE_BYTES = 1 << 18
_BESIDE_DECODER = msgspec.json.Decoder(_Beside)
_HEAD_DECODER = msgspec.json.Decoder(_Head)
_ENCODER = msgspec.json.Encoder()


@dataclass(slots=True)
class EncodedResponse:
    """An HTTP body; `header_length` is None when it is JSON only."""

    body: bytes
    header_length: int | None


def parse_header_length(value: str | None, body_length: int) -> int | None:
    """Read the `Inference-Header-Content-Length` header of a body of `body_length` bytes."""
    if value is None:
        return None
    digits = value.strip()
    # isascii: int() would also read other scripts' digits; the length: it refuses very long numbers by ValueError
    limit = 20
    if not (digits.isascii() and digits.isdigit() and len(digits) <= limit) or int(digits) > body_length:
        raise InvalidRequest(
            f"the header {HEADER_LENGTH} must be a number of bytes from 0 to the {body_length} bytes of the body, "
            f"but is '{value[:limit]}'"
        )
    return int(digits)


class _Form(NamedTuple):
    """What the JSON of a request says; several requests may share it."""

    id: str
    inputs: Sequence[_Input]
    parameters: Mapping[str, Parameter]
    outputs: Sequence[RequestedOutput]
    binary_outputs: bool


def decode_request(
    body: bytes,
    header_length: int | None,
    *,
    model_name: str,
    model_version: str = "",
    max_listed_elements: int = MAX_LISTED_ELEMENTS,
    checked: bool = False,
) -> InferRequest:
    """Read the body of an infer request; a `header_length` of 0 is for `decode_raw_request`.

    `checked`: what `check_json` would find is known not to be there.
    """
    json_part = body if header_length is None else memoryview(body)[:header_length]
    if not checked:
        check_json(json_part, max_listed_elements)
    if header_length is not None and header_length <= _MAX_KNOWN_BYTES:
        form = _known_form(bytes(json_part))
    else:
        form = _read_form(json_part)
    return InferRequest(
        model_name=model_name,
        model_version=model_version,
        id=form.id,
        inputs=_decode_inputs(form.inputs, body, header_length, max_listed_elements),
        parameters=form.parameters,
        outputs=form.outputs,
        binary_outputs=form.binary_outputs,
    )


def lists_many(body: bytes, header_length: int | None) -> bool:
    """Whether raw BYTES of the request are so many that cutting them takes longer than everything else about it.

    Raises:
        InvalidRequest: the JSON cannot be read.

    """
    if header_length is None or len(body) - header_length < _MANY * _LENGTH_BYTES:
        return False
    json_part = body[:header_length]
    # written with escapes, it may be that word as well
    if b"BYTES" not in json_part and b"\\" not in json_part:
        return False
    if header_length > _MAX_KNOWN_BYTES:
        return True
    elements = 0
    for item in _known_form(json_part).inputs:
        if item.datatype == "BYTES" and item.parameters is not None:
            elements += min(_most_elements(item, item.parameters.binary_data_size or 0), _MANY)
    return elements >= _MANY


def decode_raw_request(body: bytes, metadata: ModelMetadata, *, model_version: str = "") -> InferRequest:
    """Read a body that is nothing but the one input's tensor, as a batch of one; all outputs will be binary."""
    if len(metadata.inputs) != 1:
        raise InvalidRequest(
            f"a raw binary request needs a model with one input but '{metadata.name}' has {len(metadata.inputs)}; "
            f"name the inputs in JSON"
        )
    spec = metadata.inputs[0]
    shape = list(spec.shape)
    if shape and shape[0] < 0:
        shape[0] = 1  # the batch axis
    if spec.datatype == "BYTES":
        # As in Triton: the body is the one element itself, without a length before it.
        if any(dim not in (1, -1) for dim in shape):
            raise InvalidRequest(f"a raw binary request holds one element but input '{spec.name}' needs more")
        array = bytes_array([body]).reshape([1] * len(shape))
    else:
        array = array_from_raw(spec.name, spec.datatype, _filled_shape(spec.name, spec.datatype, shape, body), body)
    return InferRequest(
        model_name=metadata.name,
        model_version=model_version,
        inputs=[Tensor(spec.name, spec.datatype, array)],
        binary_outputs=True,
    )


def encode_response(request: InferRequest, response: InferResponse) -> EncodedResponse:
    """Render a response in the forms that the request asked for."""
    forms = {output.name: output.binary for output in request.outputs}
    buffers: list[bytes] = []
    outputs: list[dict[str, Any]] = []
    for tensor in classified(request, response.outputs):
        rendered: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": tensor.array.shape,
        }
        if forms.get(tensor.name, request.binary_outputs):
            raw = raw_from_tensor(tensor)
            buffers.append(raw)
            rendered["parameters"] = {"binary_data_size": len(raw)}
        else:
            rendered["data"] = json_from_tensor(tensor)
        outputs.append(rendered)
    head: dict[str, Any] = {"model_name": response.model_name, "model_version": response.model_version}
    if request.id:
        head["id"] = request.id
    if response.parameters:
        head["parameters"] = response.parameters
    head["outputs"] = outputs
    json_part = _ENCODER.encode(head)
    if not buffers:
        return EncodedResponse(json_part, None)
    return EncodedResponse(b"".join((json_part, *buffers)), len(json_part))


def _decode_head(data: bytes | memoryview) -> _Head:
    try:
        try:
            return _decode_finite(data)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            text = bytes(data)
            if not names_not_finite(text):
                raise
            return _decode_not_finite(text)
    except JSON_ERRORS as error:
        raise InvalidRequest(f"cannot read the request JSON: {error}") from None


def _decode_finite(data: bytes | memoryview) -> _Head:
    if len(data) > _LARGE_BYTES:
        beside = _BESIDE_DECODER.decode(data)
        check_fields(memoryview(beside.parameters))
        check_fields(memoryview(beside.outputs))
    return _HEAD_DECODER.decode(data)


def _decode_not_finite(text: bytes) -> _Head:
    """Decode what may be valid but for NaN and Infinity in the data of an input."""
    text_marked = marked(text)
    if text_marked is not None:
        head = _decode_finite(text_marked)
        for item in head.inputs:
            item.data = msgspec.Raw(unmarked(bytes(memoryview(item.data))))
        return head
    read = read_slowly(text)
    inputs = read.get("inputs") if isinstance(read, dict) else None
    for item in inputs if isinstance(inputs, list) else ():
        if isinstance(item, dict) and "data" in item:
            # flat: it is written and read once more
            item["data"] = msgspec.Raw(json.dumps(flattened(str(item.get("name")), item["data"])).encode())
    head = msgspec.convert(read, _Head)
    _check_text(head)
    return head


def _check_text(head: _Head) -> None:
    """Find half of a surrogate pair: only the standard library takes it, and no answer could hold it."""
    texts = [head.id, *(text for item in head.inputs for text in (item.name, item.datatype))]
    texts += [output.name for output in head.outputs]
    for key, value in head.parameters.items():
        texts += (key, value) if isinstance(value, str) else (key,)
    "".join(texts).encode()


def _read_form(data: bytes | memoryview) -> _Form:
    """Read and check the JSON of a request."""
    head = _decode_head(data)
    parameters = head.parameters
    check_entries(head.inputs, head.outputs, parameters)
    check_id(head.id)
    binary_outputs = parameters.pop("binary_data_output", False)
    if not isinstance(binary_outputs, bool):
        raise InvalidRequest("the request parameter 'binary_data_output' must be true or false")
    for key, value in parameters.items():
        check_parameter(key, value)
    for item in head.inputs:
        asked = item.parameters or _NO_INPUT_PARAMETERS
        if asked.shared_memory_region is not None:
            raise NotSupported(f"shared memory is not supported; send the data of input '{item.name}' in the request")
        if (asked.binary_data_size is None) is not bool(memoryview(item.data)):
            raise InvalidRequest(
                f"input '{item.name}' must set exactly one of 'data' and the parameter 'binary_data_size'"
            )
    check_unique([item.name for item in head.inputs])
    outputs = [_decode_output(output, binary_by_default=binary_outputs) for output in head.outputs]
    return _Form(head.id, head.inputs, parameters, outputs, binary_outputs)


_known_form = lru_cache(_MAX_KNOWN)(_read_form)


def _decode_inputs(
    inputs: Sequence[_Input], body: bytes, header_length: int | None, max_listed_elements: int
) -> list[Tensor]:
    """Read each input from its JSON data or from its slice of the body behind the JSON."""
    buffers = memoryview(body)
    listed = ListedElements(max_listed_elements)
    offset = len(body) if header_length is None else header_length
    tensors = []
    for item in inputs:
        name = item.name
        size = (item.parameters or _NO_INPUT_PARAMETERS).binary_data_size
        if size is None:
            array = array_from_json(name, item.datatype, item.shape, memoryview(item.data))
            listed.add(name, array.size)
        else:
            end = offset + size
            if end > len(body):
                raise InvalidRequest(
                    f"input '{name}' has binary_data_size {size} but only {len(body) - offset} bytes follow "
                    f"(does the header {HEADER_LENGTH} give the length of the JSON?)"
                )
            if item.datatype == "BYTES":
                listed.add(name, _most_elements(item, size))
            array = array_from_raw(name, item.datatype, item.shape, buffers[offset:end])
            offset = end
        tensors.append(Tensor(name, item.datatype, array))
    if offset != len(body):
        raise InvalidRequest(f"{len(body) - offset} bytes follow the data of the last input")
    return tensors


def _most_elements(item: _Input, size_bytes: int) -> int:
    """Bound the elements of BYTES: each takes at least its length."""
    return min(check_tensor(item.name, item.datatype, item.shape), size_bytes // _LENGTH_BYTES)


def _decode_output(output: _Output, *, binary_by_default: bool) -> RequestedOutput:
    parameters = output.parameters or _NO_OUTPUT_PARAMETERS
    if parameters.shared_memory_region is not None:
        raise NotSupported(f"shared memory is not supported; output '{output.name}' is sent in the response")
    binary = binary_by_default if parameters.binary_data is None else parameters.binary_data
    return RequestedOutput(output.name, binary, num_classes(output.name, parameters.classification))


def _filled_shape(name: str, datatype: str, shape: list[int], body: bytes) -> list[int]:
    """Fill in the one variable dimension from the length of the body."""
    variable = [axis for axis, dim in enumerate(shape) if dim < 0]
    if not variable:
        return shape
    if len(variable) > 1:
        raise InvalidRequest(f"input '{name}' has several variable dimensions; state its shape in JSON")
    fixed = DTYPES[datatype].itemsize
    for dim in shape:
        fixed *= dim if dim >= 0 else 1
    filled = list(shape)
    # A length that does not divide is refused by the byte count that follows.
    filled[variable[0]] = len(body) // fixed if fixed else 0
    return filled
