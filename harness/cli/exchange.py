"""``harness results export`` and ``harness results import``: results as text files."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cli.output import say

if TYPE_CHECKING:
    from harness.store.exchange_export import Wanted
    from harness.store.exchange_import import Imported
    from harness.store.store import Store

__all__ = ["Layout", "export", "import_"]


class Layout(StrEnum):
    """What `--layout` takes."""

    JSONL = "jsonl"
    LM_EVAL = "lm-eval"


def export(
    file: Annotated[
        Path,
        typer.Argument(
            help="The file to write (JSON Lines), gzipped if it ends in .gz; with --layout lm-eval a folder."
        ),
    ],
    db: Annotated[str | None, typer.Option(help="The results store (or HARNESS_DB).")] = None,
    sweep: Annotated[
        str | None,
        typer.Option(help="Only this sweep: its number, or last. Default: the newest of each cell."),
    ] = None,
    models: Annotated[str | None, typer.Option(help="Only these models.")] = None,
    methods: Annotated[str | None, typer.Option(help="Only these methods, as written.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Only these tasks.")] = None,
    scenarios: Annotated[str | None, typer.Option(help="Only these shapes, such as b1-p512-g64.")] = None,
    status: Annotated[str | None, typer.Option(help="Only cells with these statuses.")] = None,
    layout: Annotated[
        Layout,
        typer.Option(help="jsonl, all there is; or lm-eval, the scores as lm-eval writes them."),
    ] = Layout.JSONL,
    no_samples: Annotated[bool, typer.Option("--no-samples", help="Leave out the raw readings.")] = False,
    no_items: Annotated[
        bool, typer.Option("--no-items", help="Leave out the outcomes of single items.")
    ] = False,
    no_effects: Annotated[
        bool, typer.Option("--no-effects", help="Leave out what was done to each module.")
    ] = False,
    no_kernels: Annotated[bool, typer.Option("--no-kernels", help="Leave out the kernels that ran.")] = False,
    with_host: Annotated[
        bool,
        typer.Option("--with-host", help="Keep host names, commands, paths, tracebacks and logs."),
    ] = False,
) -> None:
    """Write results to a file, or in lm-eval's form to a folder, that `harness results import` reads.

    The file is small and in a fixed order. Passwords never leave the store; host names, absolute
    paths, tracebacks and logs only with --with-host.
    """
    from harness.chain import split_optional
    from harness.cli.results import statuses_of, sweep_number
    from harness.cli.sweep import database
    from harness.store.exchange_export import Wanted, export_results
    from harness.store.selection import require_known
    from harness.store.store import Store

    wanted = Wanted(
        sweep=sweep_number(sweep),
        models=split_optional(models),
        methods=split_optional(methods),
        tasks=split_optional(tasks),
        scenarios=split_optional(scenarios),
        statuses=statuses_of(status),
    )
    left_out = {
        "samples": no_samples,
        "items": no_items,
        "effects": no_effects,
        "kernels": no_kernels,
    }
    leave_out = [name for name, given in left_out.items() if given]
    with Store.open_readonly(database(db)) as store:
        with store.reading() as connection:
            require_known(connection, models=wanted.models, methods=wanted.methods, tasks=wanted.tasks)
        if layout is Layout.LM_EVAL:
            _export_lm_eval(store, file, wanted, leave_out, with_host)
            return
        written = export_results(store, file, wanted, leave_out=leave_out, with_host=with_host)
    counts = [
        _counted(written.rows.get(f"{name}s", 0), name) for name in ("sweep", "variant", "cell", "record")
    ]
    say(f"{file}: {', '.join(counts)} ({_size(written.file_bytes)})")


def _export_lm_eval(
    store: Store, folder: Path, wanted: Wanted, leave_out: list[str], with_host: bool
) -> None:
    from harness.store.lm_eval_write import export_lm_eval

    done = export_lm_eval(store, folder, wanted, leave_out=leave_out, with_host=with_host)
    counts = [
        _counted(done.files, "results file"),
        _counted(done.tasks, "task"),
        _counted(done.samples, "sample"),
    ]
    say(f"{folder}: {', '.join(counts)}")
    if done.left_out:
        say(f"note: {_counted(done.left_out, 'cell')} without scores left out (times, failures)", err=True)


def import_(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Files that `harness results export` wrote, other stores (a path or a URL), or what lm-eval "
            "wrote (its output folder, or a results_*.json with the samples beside it)."
        ),
    ],
    db: Annotated[str | None, typer.Option(help="The results store (or HARNESS_DB).")] = None,
    origin: Annotated[
        str | None, typer.Option(help="What to call where the rows came from. Default: the file's name.")
    ] = None,
) -> None:
    """Add results from files, other stores or lm-eval to a store, all or nothing.

    Importing a file again adds nothing. Imported rows keep their origin, replace nothing, and no
    sweep takes them for its own.
    """
    from harness.cli.sweep import database
    from harness.store.exchange_import import import_results
    from harness.store.exchange_sources import read_source
    from harness.store.store import Store

    # Before a store is made for nothing.
    read = [contents for source in dict.fromkeys(sources) for contents in read_source(source)]
    with Store.open(database(db)) as store:
        for done in import_results(store, read, origin):
            say(f"{done.file}: {_what_came(done)}")
            _warn_of_versions(done)


def _what_came(done: Imported) -> str:
    new = f"{_counted(done.added, 'cell')} imported, {_counted(done.sweeps, 'new sweep')}"
    parts = [new if done.added or done.sweeps else "nothing new"]
    if done.known:
        parts.append(f"{_counted(done.known, 'cell')} imported before")
    if done.own:
        parts.append(f"{_counted(done.own, 'sweep')} left out that this store measured itself")
    return ", ".join(parts)


def _warn_of_versions(done: Imported) -> None:
    from harness.measure import MEASURING_VERSION

    others = [str(version) for version in done.measuring_versions if version != MEASURING_VERSION]
    if others:
        say(
            f"note: {done.file} was measured with measuring version {' and '.join(others)}, this harness "
            f"measures with {MEASURING_VERSION}: do not compare such rows",
            err=True,
        )


def _counted(number: int, name: str) -> str:
    return f"{number:,} {name}" + ("" if number == 1 else "s")


def _size(number: int) -> str:
    return f"{number / 1e6:,.1f} MB" if number >= 1e6 else f"{number / 1e3:,.1f} kB"
