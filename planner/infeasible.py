"""The error of a goal that no plan keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from cascadeserve.errors import UsageError

if TYPE_CHECKING:
    from planner.certificate import Certificate

Constraint = Literal["accuracy", "latency", "rate", "memory"]


class Infeasible(UsageError):  # noqa: N818 - named by what happened
    """No plan keeps the goal; `constraint` is what binds. `planner.relief` finds what would lift it."""

    def __init__(self, message: str, constraint: Constraint) -> None:
        """`message` says what was asked for and what there is."""
        super().__init__(message)
        self.constraint: Constraint = constraint


def certify_by(certificate: Certificate | None) -> str:
    """What would certify one of the entries that a certificate left out."""
    needed = [entry.rows_needed for entry in certificate.entries if entry.rows_needed] if certificate else []
    if not needed:
        return "allow a larger max_epsilon, or relax the SLO"
    return f"about {min(needed)} calibration rows may certify one, {certificate.rows if certificate else 0} were given"
