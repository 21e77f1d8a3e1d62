"""What a request asks for beside its answer: Triton's `timeout` and `priority`, and parameters of our own.

Other parameters are ignored, as Triton ignores them, unless their names begin like ours: those are misspelt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cascadeserve.errors import InvalidRequest
from cascadeserve.policy.batching import DEFAULT_PRIORITY

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cascadeserve.gear_plan import LadderEntry
    from orchestrator.wire.tensors import Parameter

_PREFIX = "cascade_"
_REFERENCE = "cascade_reference"
_MAX_STAGE = "cascade_max_stage"
_MIN_CERTAINTY = "cascade_min_certainty"
_WORK = "work"
# of one request: beyond that sums of the work that waits would forget what is small
_MOST_WORK = 1_000_000
# of a row, unless clients are trusted with more: what is claimed is waited for, and counts as load
MAX_WORK = 1.0
_OURS = (_REFERENCE, _MAX_STAGE, _MIN_CERTAINTY)


@dataclass(frozen=True, slots=True, eq=False)
class RequestOptions:
    """Read request parameters; the defaults are those of a request without any."""

    # seconds that the request may take; None: the default deadline
    timeout_s: float | None = None
    # as Triton has it: 0 is the default, 1 the most important
    priority: int = 0
    # ask the reference model alone
    reference: bool = False
    # the last stage, from 0, that its rows may go to
    max_stage: int | None = None
    # an answer of less than this is taken from the last stage only
    min_certainty: float | None = None
    # known amount of work of one of its rows, the mean where they differ; an ordinary row is 1
    work_per_row: float = 1.0

    @property
    def important(self) -> bool:
        """Whether its rows overtake those of requests without a priority."""
        return 0 < self.priority < DEFAULT_PRIORITY

    def changes(self, entry: LadderEntry) -> bool:
        """Whether its rows go through this cascade otherwise than the certificate has it tested."""
        if self.max_stage is not None and self.max_stage < len(entry.stages) - 1:
            return True
        least = self.min_certainty
        return least is not None and any(
            stage.threshold is not None and stage.threshold < least for stage in entry.stages
        )


NO_OPTIONS = RequestOptions()


def read_options(parameters: Mapping[str, Parameter], rows: int, *, max_work: float = MAX_WORK) -> RequestOptions:
    """Read the parameters of a request of `rows` rows, of which each may claim `max_work`.

    Raises:
        InvalidRequest: a value cannot be, or a name begins like ours and is none of them.

    """
    if not parameters:
        return NO_OPTIONS
    for name in parameters:
        if name.startswith(_PREFIX) and name not in _OURS:
            raise InvalidRequest(f"there is no request parameter '{name}'; there are {', '.join(_OURS)}")
    options = RequestOptions(
        timeout_s=_timeout_s(parameters.get("timeout", 0)),
        priority=_priority(parameters.get("priority", 0)),
        reference=_flag(parameters.get(_REFERENCE, False), _REFERENCE),
        max_stage=_max_stage(parameters.get(_MAX_STAGE)),
        min_certainty=_min_certainty(parameters.get(_MIN_CERTAINTY)),
        work_per_row=_work_per_row(parameters.get(_WORK, 1.0), rows, max_work),
    )
    if options.reference and (options.max_stage is not None or options.min_certainty is not None):
        raise InvalidRequest(
            f"'{_REFERENCE}' asks one model alone, so '{_MAX_STAGE}' and '{_MIN_CERTAINTY}' cannot go with it"
        )
    return options


def _timeout_s(value: Parameter) -> float | None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidRequest("parameter 'timeout' must be a whole number of microseconds, 0 or more")
    return value / 1e6 if value else None


def _priority(value: Parameter) -> int:
    # Triton's sentences: the first is that of its HTTP interface but for what its JSON library adds, the second gRPC's
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequest("Unable to parse 'priority': it must be a whole number, 0 or more")
    if value < 0:
        raise InvalidRequest("invalid value for 'priority', expected value >= 0.")
    return value


def _flag(value: Parameter, name: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(f"parameter '{name}' must be true or false")
    return value


def _max_stage(value: Parameter | None) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise InvalidRequest(f"parameter '{_MAX_STAGE}' must be the number of a stage, 0 for the first")
    return value


def _min_certainty(value: Parameter | None) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool | str) or not math.isfinite(value):
        raise InvalidRequest(f"parameter '{_MIN_CERTAINTY}' must be a number")
    return float(value)


def _work_per_row(value: Parameter, rows: int, max_work: float) -> float:
    """One number for all rows, or a string with one for each: parameters are no lists, neither here nor in Triton."""
    wrong = InvalidRequest(
        f"parameter '{_WORK}' must be a number above 0, or a string of {rows} of them with commas between, "
        f"one for each row, and {_MOST_WORK:,} at most for all rows together"
    )
    if isinstance(value, bool):
        raise wrong
    # counted first: a string may hold any number of commas
    if isinstance(value, str) and value.count(",") != rows - 1:
        raise wrong
    try:
        amounts = [float(item) for item in value.split(",")] if isinstance(value, str) else [float(value)]
    except (ValueError, OverflowError):
        raise wrong from None
    # what is NaN is no such number either
    if not all(0.0 < amount <= _MOST_WORK for amount in amounts):
        raise wrong
    if max(amounts) > max_work:
        raise InvalidRequest(
            f"parameter '{_WORK}' is {max(amounts):g}, but no row may claim more than {max_work:g}; "
            "start the server with a higher --max-work if its clients are to be trusted with that"
        )
    mean = sum(amounts) / len(amounts)
    if mean * rows > _MOST_WORK:
        raise wrong
    return mean
