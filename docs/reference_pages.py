"""Makes the reference pages from the code when the site is built, so that they cannot be out of date.

{{ cli }}      in reference/cli.md: every command with its options
{{ schema X }} in reference/files.md: the JSON Schema of a file
{{ metrics }}  in reference/metrics.md: every metric of the orchestrator
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import click
import msgspec

from cascadeserve.cli import root
from cascadeserve.cluster import Cluster
from cascadeserve.gear_plan import GearPlan
from export.family_file import FamilyFile
from orchestrator.metrics import Metrics
from planner.goal import Goal
from planner.profile import Profile

if TYPE_CHECKING:
    from collections.abc import Iterator

_SCHEMAS: dict[str, Any] = {
    "plan": GearPlan,
    "profile": Profile,
    "cluster": Cluster,
    "goal": Goal,
    "family": FamilyFile,
}
_PLACE = re.compile(r"^\{\{ (\w+)(?: (\w+))? \}\}$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Fill in what stands between double braces on a line of its own (an event of mkdocs)."""
    return _PLACE.sub(lambda found: _make(found[1], found[2]), markdown)


def _make(what: str, argument: str | None) -> str:
    if what == "cli":
        return "\n".join(_commands())
    if what == "metrics":
        return "\n".join(_metrics())
    if what == "schema" and argument in _SCHEMAS:
        schema = json.dumps(msgspec.json.schema(_SCHEMAS[argument]), indent=2)
        return f'??? note "JSON Schema"\n\n    ```json\n{_indent(schema)}\n    ```\n'
    raise ValueError(f"no page part is named {what} {argument or ''}")


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _commands() -> Iterator[str]:
    context = click.Context(root, info_name="cascadeserve")
    for name in root.list_commands(context):
        command = root.get_command(context, name)
        if command is None:
            raise ValueError(f"the command {name} is listed and is not there")
        inner = click.Context(command, info_name=name, parent=context)
        yield f"## {name}\n"
        yield f"```text\n{command.get_usage(inner)}\n```\n"
        yield f"{_text(command.help or '')}\n"
        options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
        if options:
            yield "| option | |"
            yield "|---|---|"
            yield from (_option(option, inner) for option in options if not option.hidden)
            yield ""


def _option(option: click.Option, context: click.Context) -> str:
    record = option.get_help_record(context)
    if record is None:
        raise ValueError(f"{option.name} has no line of help")
    flags, text = (_text(part).replace("|", r"\|") for part in record)
    return f"| `{flags}` | {text} |"


def _text(text: str) -> str:
    """Click's paragraphs as Markdown: without the mark of those that are not to be wrapped, and without tags."""
    parts = text.replace("\b\n", "").strip().split("`")
    # every other part stands between backticks, where Markdown escapes by itself
    return "`".join(part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(parts))


def _metrics() -> Iterator[str]:
    yield "| metric | kind | labels | |"
    yield "|---|---|---|---|"
    collectors = {id(found): found for found in Metrics().registry._names_to_collectors.values()}  # noqa: SLF001
    for collector in collectors.values():
        (metric,) = collector.describe()
        name = metric.name + "_total" if metric.type == "counter" else metric.name
        labels = ", ".join(f"`{label}`" for label in collector._labelnames)  # noqa: SLF001
        yield f"| `{name}` | {metric.type} | {labels} | {metric.documentation} |"
