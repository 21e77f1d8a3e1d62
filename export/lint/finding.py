"""What a lint rule says about one field of a config, and how rules name fields and values."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a config.

    `field` is the path into it, such as `instance_group[0].count`; empty where the whole file is meant. An *error* is
    refused or not read by the native server, or cannot be served by the orchestrator; a *warning* works at a cost.
    """

    field: str
    problem: str
    severity: Literal["error", "warning"]

    def __str__(self) -> str:
        where = f"{self.field}: " if self.field else ""
        return f"{self.severity}: {where}{self.problem}"


def error(field: str, problem: str) -> Finding:
    """Return a finding that must be put right."""
    return Finding(field, problem, "error")


def warning(field: str, problem: str) -> Finding:
    """Return a finding that should be looked at."""
    return Finding(field, problem, "warning")


def enum_name(message: Any, field: str) -> str:  # noqa: ANN401 - protobuf messages carry no types here
    """Name of the value of an enum field; a number that the schema lacks is given as it is."""
    number = getattr(message, field)
    value = message.DESCRIPTOR.fields_by_name[field].enum_type.values_by_number.get(number)
    return str(value.name if value else number)


def set_fields(message: Any) -> list[str]:  # noqa: ANN401
    """Names of the fields that differ from their default."""
    return [descriptor.name for descriptor, _ in message.ListFields()]


def meant(name: str, known: Iterable[str]) -> str:
    """Half a sentence that offers the known name closest to a wrong one; empty if none is close."""
    close = get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
