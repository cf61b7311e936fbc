"""The fork server, started early. Imports nothing heavy, so that it can be the first thing."""

from __future__ import annotations

import multiprocessing
from typing import Any

__all__ = ["fork_context", "start_fork_server"]


def fork_context() -> Any:
    """The multiprocessing context whose server has torch, transformers and lm-eval imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["harness.executors.preload"])
    return context


def start_fork_server() -> None:
    """Start the server now, so that its imports run beside the parent's own work."""
    fork_context()
    from multiprocessing import forkserver

    forkserver.ensure_running()
