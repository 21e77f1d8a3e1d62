"""Preprocessing as a part of a stage: a Python-backend model before the classifier, joined by a Triton ensemble.

So every model of a family takes the family's common inputs, whatever it needs them turned into. Of a model `name` the
repository then holds the ensemble `name`, the classifier `name_classifier`, and the preprocessing under its own name.
"""

from __future__ import annotations

import importlib.util
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cascadeserve.datatypes import FIXED_SIZE
from cascadeserve.errors import CascadeServeError, ExportRefused, UsageError
from cascadeserve.triton_config import ensemble_config, format_config, preprocessing_config
from export.family import Family, FamilyModel
from export.parity import BATCH_TOLERANCE
from export.reasons import reason_of
from export.repository import check_folder, write_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from cascadeserve.gear_plan import TensorSpec

    Rows = dict[str, NDArray[np.generic]]

_FUNCTION = "preprocess"
_MODEL = Path(__file__).with_name("python_model") / "model.py"
# rows that are turned alone and beside others
_NUM_CHECKED = 16
# An ensemble's version holds no model file, and git and archives lose a folder that is empty.
_KEPT = {".gitkeep": b""}
_PYTHON_FILES = ("model.py", "preprocessing.py")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What turns a family's inputs into those of a model, by name; models may share it.

    `source` is a Python file that needs nothing but itself, the standard library and numpy. Its function `preprocess`
    takes the family's inputs by name, each [n, *shape] (BYTES: an object array of `bytes`), and returns `outputs` by
    name, each [n, *shape]. What it makes of a row must depend on that row alone.
    """

    name: str
    source: Path
    outputs: tuple[TensorSpec, ...]

    def load(self) -> Callable[[Mapping[str, NDArray[Any]]], Rows]:
        """Import the function.

        Raises:
            UsageError: there is none.
            ExportRefused: the file fails; so does the function that is returned, where it does or returns no outputs.

        """
        with self._refusals():
            function = self._imported()

        def run(rows: Mapping[str, NDArray[Any]]) -> Rows:
            with self._refusals():
                found = function(rows)
            if not isinstance(found, dict):
                raise self._refused(f"returns a {type(found).__name__}, but arrays by output name are needed")
            if wrong := [spec.name for spec in self.outputs if not isinstance(found.get(spec.name), np.ndarray)]:
                raise self._refused(f"returns no array named {wrong[0]!r}; it says that this is one of its outputs")
            return {spec.name: found[spec.name] for spec in self.outputs}

        return run

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except CascadeServeError:
            raise
        except (Exception, SystemExit) as error:
            # whatever the file does, one sentence says where
            raise self._refused(f"fails: {type(error).__name__}: {reason_of(error)}") from error

    def _refused(self, what: str) -> ExportRefused:
        return ExportRefused(f"preprocessing {self.name!r} ({self.source}) {what}")

    def _imported(self) -> Callable[[Mapping[str, NDArray[Any]]], object]:
        spec = importlib.util.spec_from_file_location(f"preprocessing_{self.name}", self.source)
        if spec is None or spec.loader is None or not self.source.is_file():
            raise UsageError(f"preprocessing {self.name!r}: {self.source} is no Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = getattr(module, _FUNCTION, None)
        if not callable(function):
            raise UsageError(f"preprocessing {self.name!r}: {self.source} has no function {_FUNCTION}")
        return function  # type: ignore[no-any-return]


def classifier_of(family: Family, model: FamilyModel) -> tuple[Family, FamilyModel]:
    """Return the classifier of a model with preprocessing, as a model of a family with the preprocessing's outputs.

    Raises:
        UsageError: the preprocessing's file has no function for it.
        ExportRefused: it fails, or does not give what it is said to.

    """
    preprocessing = _preprocessing(model)
    function = preprocessing.load()
    _check_preprocessing(model, preprocessing, function, family.checked_sample(_NUM_CHECKED))

    def labelled_rows(n: int) -> tuple[Rows, NDArray[np.integer[Any]]]:
        rows, labels = family.checked_labelled_rows(n)
        return function(_as_served(rows)), labels

    part = replace(model, name=model.classifier_name, preprocessing=None)
    inner = Family(
        name=family.name,
        inputs=preprocessing.outputs,
        classes=family.classes,
        models=(part,),
        sample=lambda n: function(_as_served(family.checked_sample(n))),
        quantisation_rows=family.quantisation_rows
        and (lambda n: function(_as_served(family.checked_quantisation_rows(n)))),
        labelled_rows=family.labelled_rows and labelled_rows,
    )
    return inner, part


def preprocessed(model: FamilyModel, rows: Mapping[str, NDArray[np.generic]]) -> Rows:
    """Rows of the family as the classifier of a model with preprocessing takes them."""
    return _preprocessing(model).load()(_as_served(rows))


def refuse_versions(model: FamilyModel, version: int) -> None:
    """Refuse any version but the first of a model with preprocessing.

    Raises:
        ExportRefused: naming the model.

    """
    if model.preprocessing is not None and version != 1:
        raise ExportRefused(
            f"{model.name}: is joined with its preprocessing by an ensemble, and Triton joins the newest versions of "
            "models, whichever one of the ensemble is asked for; give the new one a model name of its own"
        )


def refuse_foreign(repository: Path, model: FamilyModel) -> None:
    """Refuse folders that hold what was not written here, before any part of the model is written.

    Raises:
        ExportRefused: naming the first.

    """
    if model.preprocessing is not None:
        check_folder(repository / model.name, _KEPT)
        check_folder(repository / model.preprocessing.name, _PYTHON_FILES)


def write_ensemble(repository: Path, family: Family, model: FamilyModel) -> bool:
    """Write a model's preprocessing and ensemble beside its classifier; returns whether anything changed."""
    preprocessing = _preprocessing(model)
    largest = max(each.max_batch_size for each in family.models if each.preprocessing == preprocessing)
    first = preprocessing_config(preprocessing.name, family.inputs, preprocessing.outputs, max_batch_size=largest)
    files = dict(zip(_PYTHON_FILES, (_MODEL.read_bytes(), preprocessing.source.read_bytes()), strict=True))
    ensemble = ensemble_config(
        model.name,
        family.inputs,
        preprocessing=preprocessing.name,
        between=preprocessing.outputs,
        classifier=model.classifier_name,
        num_classes=family.classes,
        max_batch_size=model.max_batch_size,
        scores=model.head.keep_scores,
    )
    changed = write_folder(repository / preprocessing.name, files, format_config(first))
    return write_folder(repository / model.name, _KEPT, format_config(ensemble)) or changed


def _preprocessing(model: FamilyModel) -> Preprocessing:
    if model.preprocessing is None:
        raise ValueError(f"{model.name} has no preprocessing")  # a mistake of the caller, not of the family
    return model.preprocessing


def _as_served(rows: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[Any]]:
    """Rows as Triton hands them over."""
    return {name: array.astype(object) if array.dtype.kind == "S" else array for name, array in rows.items()}


def _check_preprocessing(
    model: FamilyModel,
    preprocessing: Preprocessing,
    function: Callable[[Mapping[str, NDArray[Any]]], Rows],
    sample: Mapping[str, NDArray[np.generic]],
) -> None:
    rows = _as_served(sample)
    together = function(rows)
    for spec in preprocessing.outputs:
        array, wanted = together[spec.name], (_NUM_CHECKED, *spec.shape)
        if array.shape != wanted or array.dtype != FIXED_SIZE.get(spec.datatype):
            raise ExportRefused(
                f"{model.name}: preprocessing {preprocessing.name!r} gives {array.dtype} {list(array.shape)} as "
                f"{spec.name!r} for {_NUM_CHECKED} rows, but it is stated as {spec.datatype} {list(wanted)}; make them "
                "agree"
            )
    for row in range(_NUM_CHECKED):
        alone = function({name: array[row : row + 1] for name, array in rows.items()})
        for spec in preprocessing.outputs:
            one, among = alone[spec.name], together[spec.name][row : row + 1]
            if not np.allclose(one, among, rtol=0, atol=BATCH_TOLERANCE, equal_nan=True):
                raise ExportRefused(
                    f"{model.name}: preprocessing {preprocessing.name!r} makes another {spec.name!r} of a row alone "
                    "than beside others; certificates need answers that depend on the row alone"
                )
