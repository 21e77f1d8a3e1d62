"""The error of a goal that no plan keeps."""

from __future__ import annotations

from typing import Literal

from cascadeserve.errors import UsageError

Constraint = Literal["accuracy", "latency", "rate", "memory"]


class Infeasible(UsageError):  # noqa: N818 - named by what happened
    """No plan keeps the goal; `constraint` is what binds. `planner.relief` finds what would lift it."""

    def __init__(self, message: str, constraint: Constraint) -> None:
        """`message` says what was asked for and what there is."""
        super().__init__(message)
        self.constraint: Constraint = constraint
