"""SIGINT, SIGTERM and SIGHUP: stop at a safe point, then sooner, then at once."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["Interrupted", "Interrupts"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
log = logging.getLogger("harness.interrupts")


class Interrupted(KeyboardInterrupt):
    """The user or the system asked to stop; what was finished is stored.

    Like `KeyboardInterrupt` no `Exception`, so that no plugin that is being loaded swallows it.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


class Interrupts:
    """Handles the signals while it is open; a context manager.

    The first signal raises `Interrupted` where the program happens to be, but inside `deferred()` only
    at the next `check()`, so that what is being stored is stored whole. The second always raises; the
    third ends the process at once (workers notice, and the store takes it like `kill -9`).

    Outside the main thread nothing is handled. A SIGHUP that is ignored (``nohup``) stays ignored.
    """

    def __init__(self) -> None:
        self._count = 0
        self._requested: int | None = None
        self._deferred = False
        self._previous: dict[int, Any] = {}
        self._waking, self._woken = socket.socketpair()
        for end in (self._waking, self._woken):
            end.setblocking(False)

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:
                log.debug("not in the main thread: signals keep their handlers")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._waking.close()
        self._woken.close()

    def fileno(self) -> int:
        """Becomes readable when a signal comes."""
        return self._waking.fileno()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal takes effect at `check()`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def check(self) -> None:
        """Raise `Interrupted` if a signal has come."""
        if self._requested is not None:
            raise Interrupted(self._requested)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._count += 1
        if self._count > 2:
            os._exit(128 + number)
        if self._requested is None:
            self._requested = number
        with suppress(OSError):
            self._woken.send(b"s")
        if not self._deferred or self._count > 1:
            raise Interrupted(self._requested)
