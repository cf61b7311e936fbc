"""The Typer application and the border at which errors become one line and an exit code.

Exit codes: 0 all well; 1 some cells failed; 2 usage or bad input; 3 a gate of ``compare`` tripped or
could not be judged; 130 and 143 interrupted by SIGINT and SIGTERM.
"""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

import typer
import typer.main

from harness.cli import (
    catalog,
    choose,
    compare,
    dashboard,
    doctor,
    exchange,
    export,
    new,
    report,
    reproduce,
    results,
    scaling,
    sweep,
    why,
)
from harness.cli.output import clean, discard_output, say
from harness.errors import HarnessError

__all__ = ["app", "run"]

LONGEST_MESSAGE = 1500  # an argument of megabytes must not come back as an error of megabytes

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
_results = typer.Typer(rich_markup_mode=None)
_results.callback(invoke_without_command=True)(results.results)
_results.command("export")(exchange.export)
_results.command("import")(exchange.import_)
app.add_typer(_results, name="results")
app.command("choose")(choose.choose)
app.command("compare")(compare.compare)
app.command("scaling")(scaling.scaling)
app.command("why")(why.why)
app.command("report")(report.report)
app.command("reproduce")(reproduce.reproduce)
app.command("dashboard")(dashboard.dashboard)
app.command("export")(export.export)
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


@functools.cache
def _command() -> Any:
    """What Typer makes of the signatures of all commands: once, and not for each line that a process runs."""
    return typer.main.get_command(app)


def run(arguments: Sequence[str]) -> int:
    """Run the command line with these arguments and return the exit code.

    Never raises: what is wrong with the input or the machine is one line on standard error.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        # Names and stored texts may hold what the terminal's encoding has not.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    streams = sys.stdout, sys.stderr
    try:
        code = _command()(list(arguments), prog_name="harness", standalone_mode=False)
        sys.stdout.flush()  # here, where a reader that is gone is no error
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
    except BrokenPipeError:  # `harness results | head`
        discard_output()
        return 0
    except SystemExit as stop:
        if (sys.stdout, sys.stderr) == streams:
            return stop.code if isinstance(stop.code, int) else 1
        sys.stdout, sys.stderr = streams  # Typer wraps them where their reader is gone, and exits with 1
        discard_output()
        return 0
    except OSError as error:
        # What the operating system refuses (a name that is too long, a folder that may not be read) says
        # itself what is wrong.
        where = "" if error.filename is None else f": {error.filename}"
        _say(f"{error.strerror or error}{where}")
        return 2
    return code if isinstance(code, int) else 0


def _open_closed_streams() -> None:
    """Write to nowhere what nobody can read (`>&-`, some services): Python has no streams then."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _say(message: str) -> None:
    line = clean(" ".join(message.split()))
    if len(line) > LONGEST_MESSAGE:
        # What is wrong stands at the end, what it is about at the beginning.
        line = f"{line[: LONGEST_MESSAGE // 2]} … {line[-LONGEST_MESSAGE // 2 :]}"
    say(f"error: {line}", err=True)
