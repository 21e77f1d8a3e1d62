"""The certificate: how much less accurate than the reference model each cascade of a ladder can be.

Everything is chosen on the search split. The ladder is then **frozen**: the exact thresholds, the models, the reference
model, the method and, where there are any, the targets are hashed together. The calibration split is looked at once,
and each entry gets an epsilon such that *all* statements hold together with probability at least 1 - delta over the
calibration rows: accuracy(entry) >= accuracy(reference) - epsilon. Hence any mix of the entries loses at most the
largest epsilon, however the gears shift, as long as what rows look like does not depend on the load.

Two corrections for many entries. *Bonferroni*: epsilon is read off the data, at delta / G for each of the G entries.
*Fixed sequence*, only with targets that were hashed with the ladder: entries are tested in order, each at the whole
delta, until the first one misses its target; those before it get their targets, the others nothing.
Entries that only answer with the reference model lose nothing by definition and take no part of delta; degraded entries
are not certified.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import msgspec
import numpy as np

from cascadeserve.artefacts import Artefact, digest_bytes
from cascadeserve.errors import UsageError
from cascadeserve.gear_plan import LadderEntry, Name
from cascadeserve.probes import Probes
from planner.bounds import gap_upper, grouped_gap_upper, harms, repairs
from planner.cascade_rows import cascade_answers
from planner.records import CalibrationRecords, HeldOutRecords, Records, SearchRecords
from planner.records_files import claim_delta, read_calibration, read_ledger, read_probes

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

Method = Literal["clopper_pearson", "betting"]
Share = Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)]
Delta = Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)]
Gap = Annotated[float, msgspec.Meta(ge=-1.0, le=1.0)]
NumRows = Annotated[int, msgspec.Meta(ge=0)]

# Share of an entry's delta that pays for counting repairs: widens the bound by about 1 % where there are none and
# keeps nearly all of what they gain.
REPAIR_SHARE = 0.1
POPULATION = "the source that the calibration rows were drawn from"
_MOST_ROWS = 10**9


class FrozenLadder(Artefact, frozen=True, kw_only=True):
    """All that must be fixed before calibration rows are looked at; made by `freeze`."""

    family: Name
    reference_model: Name
    ladder: Annotated[tuple[LadderEntry, ...], msgspec.Meta(min_length=1)]
    # entries that serve overload without a certificate
    degraded: tuple[Name, ...] = ()
    method: Method
    repair_share: Share
    # wanted epsilons of the entries that take part, in order; None: Bonferroni
    targets: tuple[Gap, ...] | None = None
    # rows that no group of the population exceeds; None: as in the calibration rows
    largest_group: Annotated[int, msgspec.Meta(ge=1)] | None = None
    # model -> digest, of those that are known
    model_digests: dict[Name, str] = msgspec.field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Digest `sha256:<hex>` of everything that the statement depends on; `reach` is not part of it."""
        content = [
            "cascadeserve frozen ladder 1",
            [self.family, self.reference_model, self.method, self.repair_share.hex(), self.largest_group],
            [[entry.name, [[s.model, _hex(s.threshold)] for s in entry.stages]] for entry in self.ladder],
            sorted(self.degraded),
            None if self.targets is None else [_hex(target) for target in self.targets],
            sorted(self.model_digests.items()),
        ]
        return digest_bytes(msgspec.json.encode(content))

    @property
    def tested(self) -> tuple[LadderEntry, ...]:
        """The entries that take part of delta, in order."""
        return tuple(e for e in self.ladder if e.name not in self.degraded and not self.is_reference(e))

    def is_reference(self, entry: LadderEntry) -> bool:
        """Whether the entry answers as the reference model on every row."""
        return {stage.model for stage in entry.stages} == {self.reference_model}


class CertifiedEntry(Artefact, frozen=True, kw_only=True):
    """One ladder entry; `epsilon` bounds its loss of accuracy (negative: a gain), None: not certified."""

    name: Name
    epsilon: Gap | None
    # counts among the calibration rows
    harm: NumRows
    repairs: NumRows
    # share of the calibration rows answered rightly: an estimate, not a bound
    accuracy: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
    # calibration rows with which the wanted epsilon would be certified at these rates about every other time
    rows_needed: int | None = None


class Certificate(Artefact, frozen=True, kw_only=True):
    """With probability 1 - delta: accuracy(entry) >= accuracy(reference model) - epsilon, for all entries at once."""

    schema_version: Literal[1] = 1
    family: Name
    reference_model: Name
    reference_accuracy: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
    ladder_digest: str
    records_digest: str
    method: Method
    correction: Literal["bonferroni", "fixed_sequence"]
    repair_share: Share
    delta: Delta
    delta_each: Delta
    rows: Annotated[int, msgspec.Meta(ge=1)]
    groups: Annotated[int, msgspec.Meta(ge=1)]
    entries: Annotated[tuple[CertifiedEntry, ...], msgspec.Meta(min_length=1)]
    # the loss under any mix of the certified entries; None if there are none
    max_epsilon: Gap | None
    wanted_epsilon: Gap | None = None
    assumptions: tuple[str, ...]
    probes: Probes | None = None

    def __post_init__(self) -> None:
        """Check that the largest epsilon is the largest."""
        if self.max_epsilon != _largest(self.entries):
            raise ValueError("max_epsilon must be the largest epsilon of the certified entries")

    def entry(self, name: str) -> CertifiedEntry:
        """Entry by name."""
        return next(entry for entry in self.entries if entry.name == name)

    def weighted_epsilon(self, row_shares: Mapping[str, float]) -> float:
        """Loss under a stated mix: `row_shares` is the share of rows (not of time) that each entry answers.

        Raises:
            UsageError: the shares do not sum to 1, or an entry with a share is unknown or not certified.

        """
        shares = list(row_shares.values())
        if not math.isclose(sum(shares), 1.0, rel_tol=1e-6) or min(shares) < 0.0:
            raise UsageError("the shares of rows per ladder entry must not be negative and must sum to 1")
        epsilons = {entry.name: entry.epsilon for entry in self.entries}
        total = 0.0
        for name, share in row_shares.items():
            epsilon = epsilons.get(name)
            if epsilon is None and share > 0.0:
                raise UsageError(f"ladder entry {name!r} answers rows but is not certified")
            total += share * (epsilon or 0.0)
        return total


def freeze(
    ladder: Sequence[LadderEntry],
    reference_model: str,
    search: SearchRecords,
    *,
    method: Method | None = None,
    repair_share: float = REPAIR_SHARE,
    targets: Sequence[float] | None = None,
    degraded: Collection[str] = (),
    largest_group: int | None = None,
) -> FrozenLadder:
    """Fix a ladder and the way it will be certified; nothing of it may change afterwards.

    `method` None takes "clopper_pearson" if each search row is a group of its own and "betting" otherwise. `targets`
    gives an epsilon for each entry that is tested (`FrozenLadder.tested`), and asks for the fixed sequence.

    Raises:
        UsageError: names are used twice or are unknown, or the targets do not fit.

    """
    names = [entry.name for entry in ladder]
    if not ladder or len(set(names)) != len(names):
        raise UsageError("a ladder needs at least one entry, and a name of its own for each")
    models = {stage.model for entry in ladder for stage in entry.stages} | {reference_model}
    if unknown := models - search.models.keys():
        raise UsageError(f"the search records hold no model {', '.join(sorted(unknown))}")
    if unknown := set(degraded) - set(names):
        raise UsageError(f"the ladder has no entry {', '.join(sorted(unknown))} to be degraded")
    if method is None:
        method = "clopper_pearson" if _num_groups(search) == len(search) else "betting"
    frozen = FrozenLadder(
        family=search.family,
        reference_model=reference_model,
        ladder=tuple(ladder),
        degraded=tuple(sorted(degraded)),
        method=method,
        repair_share=repair_share,
        targets=None if targets is None else tuple(targets),
        largest_group=largest_group,
        model_digests={m: digest for m in sorted(models) if (digest := search.models[m].provenance.digest)},
    )
    if frozen.targets is not None and len(frozen.targets) != len(frozen.tested):
        raise UsageError(f"{len(frozen.targets)} targets were given for {len(frozen.tested)} entries to be tested")
    return frozen


def certify(
    frozen: FrozenLadder,
    calibration: CalibrationRecords,
    *,
    delta: float,
    wanted_epsilon: float | None = None,
    population: str = POPULATION,
    earlier_uses: int = 0,
) -> Certificate:
    """Look at the calibration rows, once, and bound the loss of every entry.

    `delta` comes from the ledger of the rows (`certify_file` does both), where `earlier_uses` counts other ladders.
    `wanted_epsilon` only asks how many rows it would take.

    Raises:
        UsageError: the records are of another family, of other models, not calibration records, or grouped while the
            frozen method needs independent rows.

    """
    _check_fit(frozen, calibration)
    tested = frozen.tested
    bonferroni = frozen.targets is None
    delta_each = delta / max(1, len(tested)) if bonferroni else delta
    counts = {entry.name: _count(frozen, entry, calibration) for entry in frozen.ladder}
    epsilons: dict[str, float] = {e.name: 0.0 for e in frozen.ladder if frozen.is_reference(e)}
    for position, entry in enumerate(tested):
        epsilon = counts[entry.name].bound(delta_each, 1.0)
        if frozen.targets is not None:
            if epsilon > frozen.targets[position]:
                break
            epsilon = frozen.targets[position]
        epsilons[entry.name] = epsilon
    entries = tuple(
        CertifiedEntry(
            name=entry.name,
            epsilon=None if entry.name in frozen.degraded else epsilons.get(entry.name),
            harm=counts[entry.name].harm,
            repairs=counts[entry.name].repairs,
            accuracy=counts[entry.name].right / len(calibration),
            rows_needed=None
            if wanted_epsilon is None or entry not in tested
            else counts[entry.name].rows_needed(wanted_epsilon, delta_each),
        )
        for entry in frozen.ladder
    )
    reference = calibration.models[frozen.reference_model].label
    return Certificate(
        family=frozen.family,
        reference_model=frozen.reference_model,
        reference_accuracy=float(np.mean(reference == calibration.truth)),
        ladder_digest=frozen.digest,
        records_digest=calibration.digest(),
        method=frozen.method,
        correction="bonferroni" if bonferroni else "fixed_sequence",
        repair_share=frozen.repair_share,
        delta=delta,
        delta_each=delta_each,
        rows=len(calibration),
        groups=_num_groups(calibration),
        entries=entries,
        max_epsilon=_largest(entries),
        wanted_epsilon=wanted_epsilon,
        assumptions=_assumptions(frozen, population, earlier_uses),
    )


def certify_file(
    frozen: FrozenLadder,
    path: Path,
    *,
    delta: float,
    spend: bool = False,
    wanted_epsilon: float | None = None,
    population: str = POPULATION,
) -> Certificate:
    """Certify on a calibration file, with what its ledger leaves of `delta`; the use is written down first.

    Raises:
        InvalidArtefact: the file.
        UsageError: as in `certify`, or its rows are used up (`planner.records_files` has the rule).

    """
    calibration = read_calibration(path)
    _check_fit(frozen, calibration)
    available = claim_delta(path, delta, frozen.digest, spend=spend)
    earlier = [use.ladder_digest for use in read_ledger(path).uses].index(frozen.digest)
    certificate = certify(
        frozen, calibration, delta=available, wanted_epsilon=wanted_epsilon, population=population, earlier_uses=earlier
    )
    return msgspec.structs.replace(certificate, probes=read_probes(path))


def gaps(frozen: FrozenLadder, records: SearchRecords | HeldOutRecords) -> dict[str, float]:
    """Accuracy of the reference model minus that of each entry on these rows: to see if a certificate came true."""
    reference = float(np.mean(records.models[frozen.reference_model].label == records.truth))
    right = {entry.name: cascade_answers(entry, records).label == records.truth for entry in frozen.ladder}
    return {name: reference - float(np.mean(rows)) for name, rows in right.items()}


class _Counts(NamedTuple):
    """What one pass over the calibration rows found of one entry."""

    harm: int
    repairs: int
    right: int
    # upper bound on the gap at a delta, if every row had been seen `copies` times
    bound: Callable[[float, float], float]
    rows: int

    def rows_needed(self, epsilon: float, delta: float) -> int | None:
        """Rows at which the bound reaches epsilon if all rates stay; None if it never does, or beyond 10^9 rows."""
        if (self.harm - self.repairs) / self.rows >= epsilon:
            return None
        low, high = 0, self.rows
        while self.bound(delta, high / self.rows) > epsilon:
            low, high = high, 2 * high
            if high > _MOST_ROWS:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            enough = self.bound(delta, middle / self.rows) <= epsilon
            low, high = (low, middle) if enough else (middle, high)
        return high


def _count(frozen: FrozenLadder, entry: LadderEntry, records: CalibrationRecords) -> _Counts:
    label = cascade_answers(entry, records).label
    reference = records.models[frozen.reference_model].label
    harmed, repaired = harms(label, reference, records.truth), repairs(label, reference, records.truth)
    harm, repair, rows = int(harmed.sum()), int(repaired.sum()), len(records)

    def independent(delta: float, copies: float) -> float:
        return gap_upper(harm * copies, repair * copies, rows * copies, delta, repair_share=frozen.repair_share)

    def grouped(delta: float, copies: float) -> float:
        group_of = np.unique(records.group_id, return_inverse=True)[1]
        net_harm = np.bincount(group_of, weights=harmed.astype(np.int64) - repaired).astype(np.int64)
        return grouped_gap_upper(net_harm, np.bincount(group_of), delta, largest=frozen.largest_group, copies=copies)

    right = int(np.sum(label == records.truth))
    bound = independent if frozen.method == "clopper_pearson" else grouped
    return _Counts(harm=harm, repairs=repair, right=right, bound=bound, rows=rows)


def _check_fit(frozen: FrozenLadder, calibration: CalibrationRecords) -> None:
    # by type for mypy, and here for callers that are not checked
    if not isinstance(calibration, CalibrationRecords):
        raise UsageError(
            "only calibration records certify; the other splits were looked at before the ladder was fixed"
        )
    if calibration.family != frozen.family:
        raise UsageError(f"the ladder is of family {frozen.family!r}, the records of {calibration.family!r}")
    models = {stage.model for entry in frozen.ladder for stage in entry.stages} | {frozen.reference_model}
    if missing := models - calibration.models.keys():
        raise UsageError(f"the calibration records hold no model {', '.join(sorted(missing))}")
    for model, digest in frozen.model_digests.items():
        if calibration.models[model].provenance.digest not in {"", digest}:
            raise UsageError(
                f"model {model!r} changed between the search and the calibration records; record both anew"
            )
    if frozen.method == "clopper_pearson" and _num_groups(calibration) != len(calibration):
        raise UsageError("calibration rows come in groups, so freeze the ladder with the method 'betting'")


def _assumptions(frozen: FrozenLadder, population: str, earlier_uses: int) -> tuple[str, ...]:
    if frozen.method == "clopper_pearson":
        drawn = f"The calibration rows were drawn independently of each other from the population: {population}."
    elif frozen.largest_group is None:
        drawn = (
            f"Groups of rows were drawn independently of each other from the population: {population}; the loss is per "
            "row under the mix of group sizes of the calibration rows."
        )
    else:
        drawn = (
            f"Groups of rows were drawn independently of each other from the population: {population}; none of its "
            f"groups has more than {frozen.largest_group} rows."
        )
    later = f"The rows served {earlier_uses} other ladder(s) before; this one was not chosen in view of the results."
    return (
        drawn,
        "What rows look like does not depend on the load.",
        "Models, preprocessing and thresholds are those that were recorded, and answers do not depend on batch mates.",
        "Rows refused or cut short by a deadline are not covered; overload refuses hard rows first and easy ones last.",
        *([later] if earlier_uses else []),
    )


def _num_groups(records: Records) -> int:
    return len(np.unique(records.group_id))


def _largest(entries: Sequence[CertifiedEntry]) -> float | None:
    return max((entry.epsilon for entry in entries if entry.epsilon is not None), default=None)


def _hex(value: float | None) -> str | None:
    # -0.0 and 0.0 are one threshold, so they are one text
    return None if value is None else (value + 0.0).hex()
