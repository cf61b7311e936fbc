"""The harness's own tasks, offered through the same hook as anyone's."""

from __future__ import annotations

from harness.evaluate.index import BUNDLED_DIR
from harness.evaluate.task import TaskSource
from harness.hookspecs import hookimpl

__all__ = ["register_tasks"]


@hookimpl
def register_tasks() -> list[TaskSource]:
    return [TaskSource(BUNDLED_DIR, "offline tasks: held-out King James text, minimal pairs")]
