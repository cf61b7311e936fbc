"""``harness report``: one file with everything that matters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.cli.output import say
from harness.errors import ConfigError

__all__ = ["report"]


def report(
    html: Annotated[Path | None, typer.Option(help="Write one self-contained HTML file.")] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(help="Write Markdown, for a pull request; - for standard output."),
    ] = None,
    db: Annotated[str | None, typer.Option(help="The results store (or HARNESS_DB).")] = None,
    sweep: Annotated[
        str | None,
        typer.Option(help="Only this sweep: its number, or last. Default: the newest of each cell."),
    ] = None,
    models: Annotated[str | None, typer.Option(help="Only these models.")] = None,
    methods: Annotated[str | None, typer.Option(help="Only these methods, as written.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Only these tasks.")] = None,
) -> None:
    """Write the results as one document: tables, quality against cost, verdicts, failures, machines.

    Host names, paths and passwords stay behind.
    """
    if html is None and markdown is None:
        raise ConfigError("say what to write: --html FILE or --markdown FILE (- for standard output)")
    from harness.chain import split_optional
    from harness.cli.results import sweep_number
    from harness.cli.sweep import database
    from harness.report.content import make_report
    from harness.report.markdown import to_markdown
    from harness.report.page import to_html
    from harness.store.selection import require_known
    from harness.store.store import Store

    wanted = {
        "models": split_optional(models),
        "methods": split_optional(methods),
        "tasks": split_optional(tasks),
    }
    with Store.open_readonly(database(db)) as store:
        with store.reading() as connection:
            require_known(connection, **wanted)
        found = make_report(store, sweep=sweep_number(sweep), **wanted)
    if html is not None:
        _write(html, to_html(found))
    if markdown is not None:
        text = to_markdown(found)
        if str(markdown) == "-":
            typer.echo(text, nl=False)
        else:
            _write(markdown, text)


def _write(file: Path, text: str) -> None:
    """All or nothing: what was there stays where writing fails.

    Raises:
        ConfigError: the file cannot be written, or is a results store.
    """
    from harness.folders import replacing
    from harness.store.exchange_text import is_store

    written = text.encode()
    try:
        if file.is_file() and is_store(file):
            raise ConfigError(f"{file} is a results store; name another file for the report")
        with replacing(file) as opened:
            opened.write(written)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror or error}") from None
    say(f"{file}: {len(written) / 1e3:,.0f} kB", err=True)
