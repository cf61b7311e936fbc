"""``harness dashboard``: the web page on a results store."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["dashboard"]


def dashboard(
    db: Annotated[str | None, typer.Option(help="The results store (or HARNESS_DB).")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 8501,
    host: Annotated[
        str, typer.Option(help="The address to listen on; another than this machine's own needs a token.")
    ] = "127.0.0.1",
    token: Annotated[
        str | None,
        typer.Option(
            help="What the sign-in asks for (or HARNESS_DASHBOARD_TOKEN, which other users of the machine "
            "cannot read); 16 characters at least."
        ),
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> int:
    """Serve the dashboard on 127.0.0.1; the store is opened read-only."""
    import os

    from harness_dashboard.access import TOKEN_VARIABLE
    from harness_dashboard.launch import serve

    from harness.cli.sweep import database

    token = token if token is not None else os.environ.get(TOKEN_VARIABLE) or None
    return int(serve(database(db), host, port, token=token, open_browser=open_browser))
