"""``harness dashboard``: the web page on a results store."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["dashboard"]


def dashboard(
    db: Annotated[str | None, typer.Option(help="The results store (or HARNESS_DB).")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 8501,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> int:
    """Serve the dashboard on 127.0.0.1; the store is opened read-only."""
    from harness_dashboard.launch import serve

    from harness.cli.sweep import database

    return int(serve(database(db), port=port, open_browser=open_browser))
