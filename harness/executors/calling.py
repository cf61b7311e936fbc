"""Calling one function in a fresh process from the fork server, and getting its result back.

For what must not run in the parent: anything that touches CUDA.
"""

from __future__ import annotations

import pickle
import select
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from harness.errors import HarnessError
from harness.executors.link import Link
from harness.executors.server import shared_server

__all__ = ["Answer", "answer", "call_in_worker"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a function gave, pickled, or what went wrong."""

    value: bytes
    problem: str | None


def call_in_worker(function: Callable[..., T], *arguments: Any, timeout_s: float) -> T:
    """``function(*arguments)`` in a process of its own; function, arguments and result are pickled.

    Raises:
        HarnessError: it raised something, died, or took longer than `timeout_s`; says which.
    """
    link = Link(shared_server(), (function, arguments), target="harness.executors.calling:answer")
    deadline = time.monotonic() + timeout_s
    try:
        while link.ended is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise HarnessError(f"took longer than {timeout_s:g} s")
            select.select([link], [link] if link.wants_to_write else [], [], left)
            for message in link.pump():
                if isinstance(message, Answer):
                    if message.problem is not None:
                        raise HarnessError(message.problem)
                    # Only the harness's own functions are called like this, so their values are trusted.
                    result: T = pickle.loads(message.value)
                    return result
    finally:
        link.stop()
    raise HarnessError(f"the process ended with exit code {link.ended.exit_code}")


def answer(call: tuple[Callable[..., Any], tuple[Any, ...]], send: Callable[[Any], None]) -> int:
    """The worker's side."""
    function, arguments = call
    try:
        send(Answer(pickle.dumps(function(*arguments)), None))
    except (HarnessError, RuntimeError, OSError) as error:
        text = " ".join(str(error).split())[:500]
        send(Answer(b"", f"{type(error).__name__}: {text}".rstrip(": ")))
    return 0
