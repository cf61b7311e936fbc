"""The Typer application and the border at which errors become one line and an exit code.

Exit codes: 0 all well; 1 some cells failed; 2 usage or bad input; 3 a gate of ``compare`` tripped;
130 and 143 interrupted by SIGINT and SIGTERM.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from harness.cli import catalog, compare, dashboard, doctor, new, results, sweep
from harness.errors import HarnessError

__all__ = ["app", "run"]

# Newer releases of Typer carry their own copy of click, so its errors are found through Typer.
CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="harness",
    help="Measure latency, memory and accuracy of every way to make a Transformer cheaper.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    # Both --batch-sizes and --batch_sizes.
    context_settings={
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
)
app.command("sweep")(sweep.sweep)
app.command("methods")(catalog.methods)
app.command("models")(catalog.models)
app.command("tasks")(catalog.tasks)
app.command("plugins")(catalog.plugins)
app.command("results")(results.results)
app.command("compare")(compare.compare)
app.command("dashboard")(dashboard.dashboard)
app.command("new")(new.new)
app.command("doctor")(doctor.doctor)


def _show_version(value: bool) -> None:
    if value:
        import harness

        typer.echo(f"harness {harness.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    del version


def run(arguments: Sequence[str]) -> int:
    """Run the command line with these arguments and return the exit code."""
    try:
        code = app(list(arguments), prog_name="harness", standalone_mode=False)
    except HarnessError as error:
        _say(str(error))
        return 2
    except typer.Abort:
        return 130
    except CommandLineError as error:
        _say(str(getattr(error, "format_message", error.__str__)()))
        context = getattr(error, "ctx", None)
        if context is not None:
            typer.echo(f"see: {context.command_path} --help", err=True)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output is gone (`harness results | head`): that is no error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code if isinstance(code, int) else 0


def _say(message: str) -> None:
    typer.echo("error: " + " ".join(message.split()), err=True)
