"""The parent's end of one worker: what it sends, what comes back, and its end."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import select
import signal
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from harness.executors.server import ForkServer
from harness.executors.wire import BrokenStream, Frames, Kind, frame, load_message

__all__ = ["WORKER", "Ended", "Link"]

WORKER = "harness.worker:run_worker"
END_LIMIT_S = 30.0
_CHUNK = 1 << 18


@dataclass(frozen=True, slots=True)
class Ended:
    """How a worker ended.

    `exit_code` is negative for a signal and None where nobody was left to say; `problem` is ``memory``
    where it was killed for using too much and ``garbage`` where it sent no message, `detail` in words.
    """

    started: bool
    exit_code: int | None = None
    problem: str | None = None
    detail: str = ""


class Link:
    """A worker that has been asked for.

    Args:
        server: what forks it.
        job: what it runs; pickled.
        target: ``module:function`` that is called with the job and a function that sends messages, and
            returns the exit code.
        memory_limit_bytes: for the worker and all its descendants together.
        limit_address_space: whether allocations beyond that fail, besides the watch over what is in use;
            impossible with CUDA, which reserves more than the machine has.

    Raises:
        HarnessError: there is no server, and none can be started.
    """

    def __init__(
        self,
        server: ForkServer,
        job: Any,
        *,
        target: str = WORKER,
        memory_limit_bytes: int | None = None,
        limit_address_space: bool = False,
    ) -> None:
        setup = {
            "target": target,
            "directory": _directory(),
            "sys_path": [path or _directory() for path in sys.path],
            "argv": sys.argv,
            "environment": dict(os.environ),
            "memory_limit_bytes": memory_limit_bytes,
            "limit_address_space": limit_address_space,
        }
        self._outgoing = memoryview(
            frame(Kind.SETUP, json.dumps(setup).encode()) + frame(Kind.JOB, pickle.dumps(job))
        )
        self._frames = Frames()
        self._pids: dict[str, int] = {}
        self._garbage: str | None = None
        self.log_tail: str | None = None
        self.ended: Ended | None = None
        self._channel = server.new_channel()
        self._channel.setblocking(False)

    @property
    def started(self) -> bool:
        """Whether the worker's process is known to have been forked."""
        return bool(self._pids)

    @property
    def wants_to_write(self) -> bool:
        return bool(self._outgoing)

    @property
    def has_more(self) -> bool:
        """Whether more can be read at once, or a part of something has come."""
        waiting = select.poll()
        waiting.register(self._channel, select.POLLIN)
        return self._frames.has_part or bool(waiting.poll(0))

    def fileno(self) -> int:
        return self._channel.fileno()

    def pump(self) -> list[Any]:
        """Send and receive what can be at once: the messages that came. At its end `ended` is set."""
        messages: deque[Any] = deque()
        try:
            while self._outgoing:
                self._outgoing = self._outgoing[self._channel.send(self._outgoing[:_CHUNK]) :]
        except BlockingIOError:
            pass
        except OSError:
            self._outgoing = memoryview(b"")  # reading says what happened
        try:
            data = self._channel.recv(_CHUNK)
            if not data:
                self._end(Ended(self.started))
            for kind, payload in self._frames.feed(data):
                self._take(kind, payload, messages)
        except BlockingIOError:
            pass
        except OSError:
            self._end(Ended(self.started))
        except BrokenStream as broken:
            # The keeper still has to clean up behind this worker.
            self._garbage = self._garbage or str(broken)
            self.hang_up()
        return list(messages)

    def stop(self) -> None:
        """Have the worker and all its descendants killed, and wait until they are gone.

        Messages that are still on their way are lost.
        """
        self.hang_up()
        deadline = time.monotonic() + END_LIMIT_S
        while self.ended is None and time.monotonic() < deadline:
            select.select([self._channel], [], [], max(0.0, deadline - time.monotonic()))
            self.pump()
        self._end(Ended(self.started))

    def hang_up(self) -> None:
        """Tell the keeper that nothing more is wanted; it kills the worker."""
        self._outgoing = memoryview(b"")
        if self.ended is None:
            with contextlib.suppress(OSError):
                self._channel.shutdown(socket.SHUT_WR)

    def _take(self, kind: Kind, payload: bytes, messages: deque[Any]) -> None:
        if kind is Kind.STARTED:
            self._pids = json.loads(payload)
        elif kind is Kind.LOG:
            self.log_tail = payload.decode().strip() or None
        elif kind is Kind.MESSAGE and self._garbage is None:
            messages.append(load_message(payload))
        elif kind is Kind.ENDED:
            self._pids = {}  # they may be other processes' numbers from now on
            self._end(Ended(True, **json.loads(payload)))

    def _end(self, ended: Ended) -> None:
        """Settle it once; a keeper that has not said goodbye is killed, and its worker."""
        if self.ended is not None:
            return
        if self._garbage is not None:
            ended = Ended(True, ended.exit_code, "garbage", self._garbage)
        self.ended = ended
        self._channel.close()
        for pid in self._pids.values():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def _directory() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was deleted
        return "/"
