"""Records files: one .npz per split, read strictly, and the ledger of what a calibration file was used for.

A file holds `header` (JSON as uint8: `Header`), `truth`, `group_id` and per model `<model>/label`, `<model>/certainty`
and, if they were kept, `<model>/scores`; shapes and types are those of `planner.records`. A calibration file may hold
probe rows: `probe_row`, int64 [k], and their inputs, `input:<TENSOR>` [k, ...] each. Nothing in it is pickled.

**The ledger** `<file>.uses.json` lies beside a calibration file, because the chance delta of a false certificate
belongs to the rows and not to a run of the planner. Each certified ladder takes half of what is left of delta: delta/2,
delta/4, ... The sum never exceeds delta, so by the union bound *all* certificates from these rows hold together with
probability 1 - delta, and nobody needs to know beforehand how many there will be; the price is small, since a bound
grows with log(1/delta). The same ladder again is the same statement and no new use. The union bound does not cover a
ladder that was chosen *in view of* an earlier certificate from the same rows. So a further ladder is refused unless the
caller says so (`spend=True`), which takes responsibility for that; otherwise fresh rows are due. A use is written down
before the rows are looked at, and stays when the same rows are recorded anew into the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import zipfile
import zlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import msgspec
import numpy as np

from cascadeserve.artefacts import Artefact, decode_json, read_json, write_atomically, write_json
from cascadeserve.errors import InvalidArtefact, UsageError
from cascadeserve.gear_plan import Name
from cascadeserve.probes import ProbeAnswers, Probes, pack_inputs
from planner.records import (
    CalibrationRecords,
    HeldOutRecords,
    ModelAnswers,
    Provenance,
    Records,
    SearchRecords,
    arrays,
    problems,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from planner.probing import ProbeRows

R = TypeVar("R", SearchRecords, CalibrationRecords, HeldOutRecords)
Split = Literal["search", "calibration", "test"]

_HEADER = "header"
_PROBE_ROW = "probe_row"
_INPUT = "input:"
_SPLITS: dict[type[Records], Split] = {
    SearchRecords: "search",
    CalibrationRecords: "calibration",
    HeldOutRecords: "test",
}


class RecordedModel(Provenance, frozen=True, kw_only=True):
    """One model of a records file and what its answers were recorded with."""

    name: Name


class Header(Artefact, frozen=True, kw_only=True):
    """What a records file says of itself; models from cheap to dear."""

    schema_version: Literal[1]
    family: Name
    split: Split
    models: Annotated[tuple[RecordedModel, ...], msgspec.Meta(min_length=1)]


class Use(Artefact, frozen=True, kw_only=True):
    """One certificate that calibration rows were used for; `date` is ISO 8601, UTC."""

    ladder_digest: str
    delta: Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)]
    date: str


class UseLedger(Artefact, frozen=True, kw_only=True):
    """All uses of the rows of one calibration file, in order."""

    schema_version: Literal[1] = 1
    uses: tuple[Use, ...] = ()

    def find(self, ladder_digest: str) -> Use | None:
        """The use of a ladder, if there was one."""
        return next((use for use in self.uses if use.ladder_digest == ladder_digest), None)


def write_records(
    path: Path, records: SearchRecords | CalibrationRecords | HeldOutRecords, probe_rows: ProbeRows | None = None
) -> None:
    """Write records atomically; their type names the split. Folders are made.

    `probe_rows` are rows of calibration records, for the certificate.

    Raises:
        InvalidArtefact: the records could not be read again; nothing is written.

    """
    for name, problem in problems(records):
        raise InvalidArtefact(problem, path=path, field=name)
    origins = {name: msgspec.structs.asdict(answers.provenance) for name, answers in records.models.items()}
    header = Header(
        schema_version=1,
        family=records.family,
        split=_SPLITS[type(records)],
        models=tuple(RecordedModel(name=name, **origin) for name, origin in origins.items()),
    )
    content = msgspec.json.encode(header)
    # Names are checked on decoding only.
    decode_json(content, Header, path=path)
    file = io.BytesIO()
    probes: dict[str, NDArray[np.generic]] = {}
    if probe_rows is not None:
        probes = {_PROBE_ROW: probe_rows.row} | {_INPUT + name: each for name, each in probe_rows.inputs.items()}
    np.savez_compressed(file, **{_HEADER: np.frombuffer(content, dtype=np.uint8)}, **dict(arrays(records)), **probes)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, file.getvalue())


def read_search(path: Path) -> SearchRecords:
    """Read the split on which everything is chosen.

    Raises:
        InvalidArtefact: naming the file and the array.

    """
    return _read(path, SearchRecords)


def read_family(path: Path, split: Split) -> str:
    """Family that a records file of a split is of: none of the rows are read.

    Raises:
        InvalidArtefact: naming the file; it is of another split.

    """
    return _header(_load(path, [_HEADER]), path, split).family


def read_calibration(path: Path) -> CalibrationRecords:
    """Read the split for the certificate. Only `planner.certificate` calls this; errors as in `read_search`."""
    return _read(path, CalibrationRecords)


def read_probes(path: Path) -> Probes | None:
    """Read the probe rows of a calibration file; None: it has none. Only `planner.certificate` calls this, too.

    Raises:
        InvalidArtefact: naming the file and the array.

    """
    found = _load(path)
    header = _header(found, path, "calibration")
    inputs = {name.removeprefix(_INPUT): array for name, array in found.items() if name.startswith(_INPUT)}
    row = found.get(_PROBE_ROW)
    if row is None or not inputs:
        return None
    if row.dtype != np.int64 or row.ndim != 1 or not row.size or row.min() < 0 or row.max() >= len(found["truth"]):
        raise InvalidArtefact("must be rows of this file, int64; record it again", path=path, field=_PROBE_ROW)
    for name, array in inputs.items():
        if array.shape[:1] != row.shape:
            problem = f"has shape {list(array.shape)}, but there are {len(row)} probe rows; record the file again"
            raise InvalidArtefact(problem, path=path, field=_INPUT + name)
    answers = {
        name: ProbeAnswers(
            label=tuple(found[f"{name}/label"][row].tolist()),
            certainty=tuple(found[f"{name}/certainty"][row].tolist()),
        )
        for name in (model.name for model in header.models)
    }
    return Probes(inputs=pack_inputs(inputs), answers=answers)


def read_held_out(path: Path) -> HeldOutRecords:
    """Read the test split; errors as in `read_search`."""
    return _read(path, HeldOutRecords)


def _read(path: Path, kind: type[R]) -> R:
    found = _load(path)
    header = _header(found, path, _SPLITS[kind])
    del found[_HEADER]
    names = [model.name for model in header.models]
    if len(set(names)) != len(names):
        raise InvalidArtefact("lists a model twice", path=path, field=f"{_HEADER}: $.models")
    needed = {"truth", "group_id"} | {f"{name}/{kind}" for name in names for kind in ("label", "certainty")}
    for name in sorted(needed - found.keys()):
        raise InvalidArtefact("is missing; record the file again", path=path, field=name)
    known = needed | {f"{name}/scores" for name in names}
    if kind is CalibrationRecords:
        known |= {_PROBE_ROW} | {name for name in found if name.startswith(_INPUT)}
    for name in sorted(found.keys() - known):
        raise InvalidArtefact("is an unknown array; models are named in the header", path=path, field=name)
    records = kind(
        family=header.family,
        models={model.name: _answers(model, found) for model in header.models},
        truth=found["truth"],  # type: ignore[arg-type]  # dtypes are checked below
        group_id=found["group_id"],  # type: ignore[arg-type]
    )
    for name, problem in problems(records):
        raise InvalidArtefact(problem, path=path, field=name)
    return records


def _header(found: Mapping[str, NDArray[np.generic]], path: Path, split: Split) -> Header:
    if _HEADER not in found:
        raise InvalidArtefact("is missing; this is no records file", path=path, field=_HEADER)
    header = decode_json(found[_HEADER].tobytes(), Header, path=f"{path}: {_HEADER}")
    if header.split != split:
        problem = f"is {header.split!r}, but the {split!r} split is wanted here; splits are never exchanged"
        raise InvalidArtefact(problem, path=path, field=f"{_HEADER}: $.split")
    return header


def _answers(model: RecordedModel, found: dict[str, NDArray[np.generic]]) -> ModelAnswers:
    origin = {name: getattr(model, name) for name in Provenance.__struct_fields__}
    return ModelAnswers(
        label=found[f"{model.name}/label"],  # type: ignore[arg-type]
        certainty=found[f"{model.name}/certainty"],  # type: ignore[arg-type]
        scores=found.get(f"{model.name}/scores"),  # type: ignore[arg-type]
        provenance=Provenance(**origin),
    )


def _load(path: Path, wanted: Collection[str] | None = None) -> dict[str, NDArray[np.generic]]:
    """Arrays by name, those that are `wanted`; None: all."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as members:
            names = members.namelist()
            if len(set(names)) != len(names):
                raise InvalidArtefact("holds an array twice", path=path)
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if wanted is None or name in wanted}
    except OSError as error:
        raise InvalidArtefact(f"cannot be read ({error.strerror}); check the path", path=path) from error
    # Whatever a damaged or foreign archive makes zipfile, zlib and numpy's header parser raise.
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, SyntaxError, NotImplementedError, KeyError) as error:
        raise InvalidArtefact(f"is no .npz file of plain arrays ({error})", path=path) from error


def ledger_path(records: Path) -> Path:
    """Where the ledger of a calibration file lies; another name that only links to the file is no other file."""
    records = records.resolve()
    return records.with_name(f"{records.name}.uses.json")


def read_ledger(records: Path) -> UseLedger:
    """Ledger of a calibration file; empty if the file was never used."""
    path = ledger_path(records)
    return read_json(path, UseLedger) if path.exists() else UseLedger()


def delta_available(records: Path, delta_total: float, ladder_digest: str, *, spend: bool = False) -> float:
    """Delta that a certificate of this ladder may use on this calibration file: the module's text has the rule.

    Raises:
        UsageError: the rows were used for another ladder and `spend` is not set, or nothing is left of `delta_total`.

    """
    if not 0.0 < delta_total < 1.0:
        raise UsageError(f"delta is {delta_total:g}, but must lie between 0 and 1")
    ledger = read_ledger(records)
    # A repeated use keeps its delta, also where a larger total is asked for now: it is the statement that was made.
    if (known := ledger.find(ladder_digest)) is not None:
        if known.delta > delta_total:
            raise UsageError(
                f"{records}: this ladder was certified at delta {known.delta:g} and {delta_total:g} is asked for; "
                f"record fresh calibration rows into another file, or ask for delta >= {known.delta:g}"
            )
        return known.delta
    spent = sum(use.delta for use in ledger.uses)
    if spent >= delta_total:
        raise UsageError(
            f"{records}: earlier certificates spent delta {spent:g} of {delta_total:g}; record fresh calibration rows "
            "into another file"
        )
    if ledger.uses and not spend:
        raise UsageError(
            f"{records}: these rows certified another ladder on {ledger.uses[-1].date[:10]}; record fresh calibration "
            "rows into another file, or use --spend if the new ladder was not chosen in view of that certificate"
        )
    return (delta_total - spent) / 2.0


def claim_delta(records: Path, delta_total: float, ladder_digest: str, *, spend: bool = False) -> float:
    """Take `delta_available` and write the use into the ledger; to be called before the rows are looked at.

    Safe against another process that does the same. Errors as in `delta_available`.
    """
    with _locked(records):
        delta = delta_available(records, delta_total, ladder_digest, spend=spend)
        ledger = read_ledger(records)
        if ledger.find(ladder_digest) is None:
            use = Use(ladder_digest=ladder_digest, delta=delta, date=datetime.now(UTC).isoformat(timespec="seconds"))
            write_json(ledger_path(records), msgspec.structs.replace(ledger, uses=(*ledger.uses, use)))
    return delta


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise InvalidArtefact(f"cannot be read ({error.strerror}); check the path", path=path) from error
    with file:
        # released when the file is closed
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
