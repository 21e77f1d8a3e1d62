"""`cascadeserve export`."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from cascadeserve.errors import CascadeServeError, ExportRefused
from export.ensemble import classifier_of, write_ensemble
from export.loading import load_family
from export.onnx_export import export_onnx
from export.parity import check_parity, check_variant
from export.repository import write_model
from export.variants import make_variant, refuse_dynamic_quantisation


@click.command()
@click.argument("reference", metavar="MODULE:ATTRIBUTE")
@click.option("--repository", type=click.Path(path_type=Path), required=True, help="Model repository to write to.")
@click.option(
    "--tolerance", type=click.FloatRange(min=0.0, min_open=True), default=1e-4, show_default=True,
    help="Largest difference of a score from PyTorch's.",
)  # fmt: skip
def export(reference: str, repository: Path, tolerance: float) -> None:
    """Export the models of a family to ONNX, check them against PyTorch, write them as Triton models.

    A variant (FP16, INT8, optimised) is made from a model that passed and checked against it, within wider limits.
    A model with preprocessing becomes an ensemble of the preprocessing and <model>_classifier.
    A model that does not do what its source does is not written; models already written stay.
    """
    family = load_family(reference)
    table = Table(
        Column("model", no_wrap=True), "variant", "size", "max error", "label agreement", "batch difference", "written"
    )
    console = Console()
    for model in track(family.models, description="exporting", console=Console(stderr=True), transient=True):
        try:
            source, part = (family, model) if model.preprocessing is None else classifier_of(family, model)
            module = part.build().eval()
            onnx_model = export_onnx(source, part, module)
            refuse_dynamic_quantisation(onnx_model, part.name)
            parity = check_parity(source, part, module, onnx_model, tolerance)
            if part.variant is not None:
                float_model, onnx_model = onnx_model, make_variant(source, part, onnx_model)
                parity = check_variant(source, part, float_model, onnx_model)
        except CascadeServeError:
            raise
        except Exception as error:
            # the family's own code, or an exporter that cannot do what it needs: one sentence says which model
            what = (str(error).strip().splitlines() or [""])[0]
            raise ExportRefused(f"{model.name}: {type(error).__name__}: {what}") from error
        changed = write_model(repository, source, part, onnx_model)
        if model.preprocessing is not None:
            changed |= write_ensemble(repository, family, model)
        table.add_row(
            model.name,
            model.variant or "",
            f"{len(onnx_model) / 1e6:.2f} MB",
            f"{parity.max_abs_error:.1e}",
            f"{parity.label_agreement:.4f}",
            f"{parity.max_batch_difference:.1e}",
            "yes" if changed else "unchanged",
        )
    console.print(table)
