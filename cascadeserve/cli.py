"""The `cascadeserve` command: subcommands are imported only when they run.

Exit codes: 0 done, 1 failed, 2 called in a wrong way (also: a file that was handed over is wrong).
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any

import click

from cascadeserve import __version__
from cascadeserve.errors import CascadeServeError

# command -> (module, attribute, one line of help); the help stands here so that --help imports nothing
_COMMANDS = {
    "init": ("export.init", "init", "Write a start for a family of your own: family, cluster and goal file."),
    "export": ("export.cli", "export", "Export a family of models, ONNX or PyTorch, to a Triton model repository."),
    "verify": ("export.verify_cli", "verify", "Hold a repository on a real Triton against its source."),
    "triton": ("cascadeserve.local_triton.cli", "triton", "Run a real tritonserver on this machine."),
    "prepare": (
        "cascadeserve.local_triton.cli",
        "prepare",
        "Write the repository that Tritons elsewhere read.",
    ),
    "serve": ("orchestrator.cli", "serve", "Serve the cascades of a gear plan in front of Triton."),
    "up": ("cascadeserve.up", "up", "Run local Tritons and the orchestrator together."),
    "replay": ("cascadeserve.replay.cli", "replay", "Send load to a server and keep the ledger of what came back."),
    "record": ("planner.cli", "record", "Record what every model answers to labelled rows."),
    "import-records": ("planner.cli_import", "import_command", "Make records of predictions that exist already."),
    "profile": ("planner.cli", "profile", "Measure how long the device is busy with batches of every model."),
    "plan": ("planner.cli_plan", "plan", "Choose cascades, triggers and gears for a goal, and certify them."),
    "explain": ("planner.cli_plan", "explain", "Say what a gear plan does and what is certain about it."),
    "simulate": ("planner.cli_simulate", "simulate", "Simulate what a gear plan does under a load."),
    "demo": ("cascadeserve.demo.cli", "demo", "From rows to a certified plan on a real Triton, and its worth."),
}

# package -> extra that brings it, where it is not the command that tells
_EXTRA_OF = {"numba": "planner", "matplotlib": "planner", "jinja2": "examples", "sklearn": "examples"}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        module, attribute, _ = _COMMANDS[cmd_name]
        try:
            command: click.Command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] in (
                "cascadeserve",
                "export",
                "orchestrator",
                "planner",
            ):
                raise
            extra = _EXTRA_OF.get(error.name or "", "export" if module.startswith("export.") else "local")
            message = f"`{cmd_name}` needs the package {error.name!r}: pip install 'cascadeserve[{extra}]'"
            raise click.ClickException(message) from error
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in _COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="cascadeserve")
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True
)
def root(log_level: str) -> None:
    """Serve a family of models as a cascade on NVIDIA Triton."""
    logging.basicConfig(
        level=log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )


def main(arguments: list[str] | None = None) -> Any:  # noqa: ANN401
    """Entry point of the console script."""
    try:
        root.main(args=arguments, prog_name="cascadeserve", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA_OF:
            raise
        message = f"this needs the package {error.name!r}: pip install 'cascadeserve[{_EXTRA_OF[error.name]}]'"
        click.echo(f"Error: {message}", err=True)
        sys.exit(1)
    except OSError as error:
        what = ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
        click.echo(f"Error: {what}", err=True)
        sys.exit(1)
    except CascadeServeError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
