"""Asks a running Triton for what its models answer, and has it load and unload them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from cascadeserve.errors import ExportRefused, ServerStartFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from cascadeserve.gear_plan import TensorSpec

    Outputs = dict[str, NDArray[Any]]

_CALL_TIMEOUT_S = 10.0
# a dear model takes tens of seconds for a large batch on a CPU, and building engines at load takes minutes
_INFER_TIMEOUT_S = 300.0
_LOAD_TIMEOUT_S = 900.0


class ServedModels:
    """The models of the Triton whose gRPC service is at `address` (host:port). Not for several threads at once."""

    def __init__(self, address: str) -> None:
        """Connects lazily; `check_live` says whether anybody is there."""
        self._address = address
        self._client = InferenceServerClient(url=address)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def check_live(self) -> None:
        """Ask whether a Triton answers.

        Raises:
            ServerStartFailed: none does.

        """
        try:
            live = self._client.is_server_live(client_timeout=_CALL_TIMEOUT_S)
        except InferenceServerException as error:
            raise ServerStartFailed(
                f"no Triton answers at {self._address} ({error.message()}); give host and port of its gRPC service"
            ) from error
        if not live:
            raise ServerStartFailed(f"the Triton at {self._address} is not live; wait until it has started")

    def load(self, model: str) -> None:
        """Load a model and what it is made of; raises ExportRefused with Triton's reason."""
        with self._refusals(model, "is not loaded", "export it again, or mend what the reason names"):
            self._client.load_model(model, client_timeout=_LOAD_TIMEOUT_S)

    def unload(self, model: str) -> None:
        """Unload a model and what it is made of; they may go some time later."""
        with self._refusals(model, "is not unloaded", "unload it by hand"):
            self._client.unload_model(model, unload_dependents=True, client_timeout=_CALL_TIMEOUT_S)

    def newest_version(self, model: str) -> str:
        """Highest version that answers; raises ExportRefused where the model is not served."""
        with self._refusals(model, "is not served", "have it loaded there"):
            metadata = self._client.get_model_metadata(model, client_timeout=_CALL_TIMEOUT_S)
        return str(max(metadata.versions, key=int))

    def answer(
        self,
        model: str,
        version: str,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[str, ...],
        rows: Outputs,
        size: int,
    ) -> Outputs:
        """Outputs [n, ...] for rows [n, ...], by name, put in requests of up to `size` rows, one after the other.

        Raises:
            ExportRefused: a request fails, or an output is not there or has another number of rows.

        """
        count = len(next(iter(rows.values())))
        parts = []
        for start in range(0, count, size):
            batch = {spec.name: rows[spec.name][start : start + size] for spec in inputs}
            parts.append(self._ask(model, version, inputs, outputs, batch))
        return {name: np.concatenate([part[name] for part in parts]) for name in outputs}

    def _ask(
        self, model: str, version: str, inputs: tuple[TensorSpec, ...], outputs: tuple[str, ...], batch: Outputs
    ) -> Outputs:
        tensors = []
        for spec in inputs:
            tensor = InferInput(spec.name, list(batch[spec.name].shape), spec.datatype)
            tensor.set_data_from_numpy(batch[spec.name])
            tensors.append(tensor)
        count = len(next(iter(batch.values())))
        with self._refusals(model, f"does not answer a batch of {count} rows", "export it again, or look into its log"):
            result = self._client.infer(
                model,
                tensors,
                model_version=version,
                outputs=[InferRequestedOutput(name) for name in outputs],
                client_timeout=_INFER_TIMEOUT_S,
            )
            arrays = {name: result.as_numpy(name) for name in outputs}
        for name, array in arrays.items():
            if array is None or len(array) != count:
                found = "no" if array is None else len(array)
                raise ExportRefused(f"{model}: answers {count} rows with {found} rows of {name!r}; export it again")
        return arrays

    @contextmanager
    def _refusals(self, model: str, what: str, advice: str) -> Iterator[None]:
        try:
            yield
        except InferenceServerException as error:
            # Triton's texts run over several lines, and those of the Python backend end in a traceback
            reason = " ".join(str(error.message()).split()).partition(" At: ")[0]
            raise ExportRefused(f"{model}: {what} by the Triton at {self._address} ({reason}); {advice}") from error
