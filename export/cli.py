"""`cascadeserve export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from cascadeserve.errors import CascadeServeError, ExportRefused, UsageError
from export.ensemble import classifier_of, refuse_foreign, refuse_versions, write_ensemble
from export.heads import add_head
from export.loading import load_family
from export.parity import check_parity, check_variant
from export.reasons import reason_of
from export.repository import check_model, write_model
from export.sources import open_source
from export.temperature import with_fitted_temperature
from export.variants import make_variant, refuse_dynamic_quantisation

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import onnx

    from export.family import Family, FamilyModel
    from export.parity import Parity


@click.command()
@click.argument("reference", metavar="FAMILY")
@click.option("--repository", type=click.Path(path_type=Path), required=True, help="Model repository to write to.")
@click.option(
    "--version", type=click.IntRange(min=1), default=1, show_default=True,
    help="Version to write; one that is higher than all others stands beside them.",
)  # fmt: skip
@click.option(
    "--tolerance", type=click.FloatRange(min=0.0, min_open=True), default=1e-4, show_default=True,
    help="Largest difference of a score from the source's.",
)  # fmt: skip
def export(reference: str, repository: Path, version: int, tolerance: float) -> None:
    """Export the models of a family to ONNX, check them against their source, write them as Triton models.

    FAMILY is a file (family.toml) or MODULE:ATTRIBUTE; `cascadeserve init` writes a start of either.

    A variant (FP16, INT8, optimised) is made from a model that passed and checked against it, within wider limits; for
    TensorRT the model stays what it is. A model with preprocessing becomes an ensemble of the preprocessing and
    <model>_classifier. Unless every model of the family does what its source does, nothing is written. The only version
    of a model is written anew in its place; where there are several, none of them changes any more.
    """
    family = load_family(reference)
    table = Table(
        Column("model", no_wrap=True), "variant", "temperature", "size", "max error", "label agreement",
        "batch difference", "written",
    )  # fmt: skip
    models = list(family.models)
    found = [_made(family, model, version, tolerance) for model in _progress(models)]
    for model, made in zip(models, found, strict=True):
        refuse_foreign(repository, model)
        check_model(repository, made.family, made.model, made.onnx_model, version)
    for model, made in zip(models, found, strict=True):
        changed = write_model(repository, made.family, made.model, made.onnx_model, version)
        if model.preprocessing is not None:
            changed |= write_ensemble(repository, family, model)
        table.add_row(
            model.name,
            model.variant or "",
            f"{made.model.head.temperature:.4g}{' (fitted)' * model.fit_temperature}",
            f"{len(made.onnx_model) / 1e6:.2f} MB",
            f"{made.parity.max_abs_error:.1e}",
            f"{made.parity.label_agreement:.4f}",
            f"{made.parity.max_batch_difference:.1e}",
            "yes" if changed else "unchanged",
        )
    Console().print(table)


@dataclass(frozen=True)
class _Made:
    """An ONNX model that passed, its temperature settled, and the family it is of: of its preprocessing, if any."""

    family: Family
    model: FamilyModel
    onnx_model: bytes
    parity: Parity


def _progress(models: Sequence[FamilyModel]) -> Iterable[FamilyModel]:
    return track(models, description="exporting", console=Console(stderr=True), transient=True)


def _made(family: Family, model: FamilyModel, version: int, tolerance: float) -> _Made:
    try:
        refuse_versions(model, version)
        if model.preprocessing is None:
            return _make(family, model, tolerance)
        return _make(*classifier_of(family, model), tolerance)
    except CascadeServeError:
        raise
    except (Exception, SystemExit) as error:
        # the family's own code, or an exporter that cannot do what it needs: one sentence says which model
        raise ExportRefused(f"{model.name}: {type(error).__name__}: {reason_of(error)}") from error


def _make(family: Family, model: FamilyModel, tolerance: float) -> _Made:
    source = open_source(family, model)
    bare = source.onnx_model()
    refuse_dynamic_quantisation(bare, model.name)
    model = with_fitted_temperature(family, model, source)
    onnx_model = _with_head(model, bare)
    parity = check_parity(family, model, source, onnx_model, tolerance)
    if model.variant is not None:
        float_model, onnx_model = onnx_model, _with_head(model, make_variant(family, model, bare))
        parity = check_variant(family, model, float_model, onnx_model)
    return _Made(family, model, onnx_model, parity)


def _with_head(model: FamilyModel, bare: onnx.ModelProto) -> bytes:
    try:
        return add_head(bare, model.head).SerializeToString(deterministic=True)
    except UsageError as error:
        raise UsageError(f"{model.name}: {error}") from error
