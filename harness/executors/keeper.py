"""The keeper: a small process around each worker that never runs a method's code.

::

    parent ──socket── keeper ──pipe── worker (session of its own; runs methods)
                        │ └───pipe── what the worker and its children print
                        └─ adopts every orphan below it

It passes messages on, keeps the beginning and the end of what is printed, watches the memory of the worker
and all its descendants, and when the worker ends, or the parent hangs up (or dies), kills whatever is left
below it, daemons included. If the keeper itself is killed, the kernel kills the worker, and the fork server
adopts and kills the rest and removes the worker's temporary files.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

from harness.executors.processes import (
    adopt_orphans,
    descendants,
    fair_bytes,
    kill_children,
    name_process,
    private_bytes,
    reap,
)
from harness.executors.scratch import make_scratch, remove_scratch
from harness.executors.starting import become_worker
from harness.executors.wire import BrokenStream, Frames, Kind, frame

__all__ = ["PrintedText", "keep"]

_TICK_S = 0.1  # how often the worker's memory is looked at
_CENSUS_S = 1.0  # how often its descendants are looked for
_CHUNK = 1 << 18
_ENOUGH_WAITING = 16 << 20  # bytes for the parent; beyond this the worker has to wait
_FAREWELL_S = 30.0
_F_SETPIPE_SZ = 1031


class PrintedText:
    """The beginning and the end of a text of any length, in little memory.

    >>> text = PrintedText(head_bytes=2, tail_bytes=3)
    >>> text.add(b"abcdefgh")
    >>> text.excerpt()
    'ab\\n[... 3 bytes left out ...]\\nfgh'
    """

    def __init__(self, head_bytes: int = 1000, tail_bytes: int = 3000) -> None:
        self._head_bytes, self._tail_bytes = head_bytes, tail_bytes
        self._head, self._tail = bytearray(), bytearray()
        self.total_bytes = 0

    def add(self, data: bytes) -> None:
        self.total_bytes += len(data)
        room = self._head_bytes - len(self._head)
        self._head += data[:room]
        self._tail += data[room:][-self._tail_bytes :]
        del self._tail[: -self._tail_bytes]

    def excerpt(self) -> str:
        left_out = self.total_bytes - len(self._head) - len(self._tail)
        head, tail = (part.decode(errors="replace") for part in (self._head, self._tail))
        return f"{head}\n[... {left_out:,} bytes left out ...]\n{tail}" if left_out else head + tail


def keep(channel: socket.socket) -> NoReturn:
    """Be the keeper of one worker until it has ended; the process ends here."""
    code = 1
    try:
        _keep(channel)
        code = 0
    except BaseException:  # the parent sees the end of the channel; say why to the server's log
        sys.excepthook(*sys.exc_info())
    finally:
        kill_children()
        os._exit(code)


def _keep(channel: socket.socket) -> None:
    os.setsid()
    name_process("harness-keeper")
    adopt_orphans()
    waking, woken = socket.socketpair()
    for end in (waking, woken):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    order = _receive_order(channel)
    if order is None:
        return
    setup, job = order
    scratch = make_scratch()
    try:
        message_r, message_w = os.pipe()
        log_r, log_w = os.pipe()
        for pipe in (log_r, message_r):
            with suppress(OSError):
                fcntl.fcntl(pipe, _F_SETPIPE_SZ, 1 << 20)
            os.set_blocking(pipe, False)
        start_bytes = private_bytes(os.getpid())
        pid = os.fork()
        if pid == 0:
            private = [channel.detach(), waking.detach(), woken.detach(), message_r, log_r]
            become_worker(setup, job, message_w, log_w, private, scratch)
        os.close(message_w)
        os.close(log_w)
        watch = _Watch(channel, waking, message_r, log_r, pid, setup["memory_limit_bytes"], start_bytes)
        watch.send(Kind.STARTED, {"keeper": os.getpid(), "worker": pid})
        watch.run()
    finally:
        remove_scratch(scratch)


def _receive_order(channel: socket.socket) -> tuple[dict[str, Any], bytes] | None:
    """The set-up and the job; None where the parent has gone."""
    frames, parts = Frames(), list[tuple[Kind, bytes]]()
    while len(parts) < 2:
        data = channel.recv(_CHUNK)
        if not data:
            return None
        parts += frames.feed(data)
    return json.loads(parts[0][1]), parts[1][1]


@dataclass
class _Watch:
    """One worker, from its start to the end of all that it left behind."""

    channel: socket.socket
    waking: socket.socket
    message_r: int
    log_r: int
    pid: int
    memory_limit_bytes: int | None
    start_bytes: int
    printed: PrintedText = field(default_factory=PrintedText)
    exit_code: int | None = None
    problem: str | None = None  # "memory" or "garbage", with `detail` in words
    detail: str = ""
    stopped: bool = False

    def __post_init__(self) -> None:
        self._outgoing = bytearray()
        self._frames = Frames()
        self._excerpt_sent_at = 0
        self._family: list[int] = [self.pid]
        self._family_at = self._confirmed_at = time.monotonic()
        self.channel.setblocking(False)

    def send(self, kind: Kind, payload: dict[str, Any] | bytes) -> None:
        self._outgoing += frame(kind, payload if isinstance(payload, bytes) else json.dumps(payload).encode())
        self._flush()

    def run(self) -> None:
        while self.exit_code is None and self.problem is None and not self.stopped:
            self._wait()
            self._settle(reap())
            self._watch_memory()
        self._settle(kill_children())
        # What was sent or printed before the end is still in the pipes.
        self._read_log(whole=True)
        self._read_messages(whole=True)
        self._send_excerpt()
        ended = {"exit_code": self.exit_code, "problem": self.problem, "detail": self.detail}
        self.send(Kind.ENDED, ended)
        deadline = time.monotonic() + _FAREWELL_S
        while self._outgoing and not self.stopped and time.monotonic() < deadline:
            select.select([], [self.channel], [], 1.0)
            self._flush()

    def _settle(self, ended: dict[int, int]) -> None:
        self.exit_code = ended.get(self.pid, self.exit_code)

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self.channel, select.POLLIN | (select.POLLOUT if self._outgoing else 0))
        poll.register(self.waking, select.POLLIN)
        poll.register(self.log_r, select.POLLIN)
        if len(self._outgoing) < _ENOUGH_WAITING:
            poll.register(self.message_r, select.POLLIN)
        ready = {number for number, _ in poll.poll(_TICK_S * 1000)}
        if self.waking.fileno() in ready:
            with suppress(BlockingIOError):
                self.waking.recv(_CHUNK)
        if self.channel.fileno() in ready:
            self._hear()
            self._flush()
        if self.log_r in ready:
            self._read_log()
        if self.message_r in ready:
            self._read_log(whole=True)  # what was printed before the message comes before it
            self._read_messages()

    def _hear(self) -> None:
        """The parent says nothing more; that the channel ends means: end the worker."""
        try:
            self.stopped = self.stopped or not self.channel.recv(_CHUNK)
        except BlockingIOError:
            pass
        except OSError:
            self.stopped = True

    def _flush(self) -> None:
        try:
            while self._outgoing:
                sent = self.channel.send(self._outgoing[:_CHUNK])
                del self._outgoing[:sent]
        except BlockingIOError:
            pass
        except OSError:  # the parent is gone
            self.stopped = True
            self._outgoing.clear()

    def _read_log(self, *, whole: bool = False) -> None:
        # A worker that prints faster than this reads must not keep the rest waiting.
        for _ in range(16 if whole else 1):
            data = _read(self.log_r)
            if not data:
                return
            self.printed.add(data)

    def _read_messages(self, *, whole: bool = False) -> None:
        while self.problem is None and (data := _read(self.message_r)):
            try:
                for kind, payload in self._frames.feed(data):
                    if kind is not Kind.MESSAGE:
                        raise BrokenStream("something that is no message")
                    self._send_excerpt()
                    self.send(Kind.MESSAGE, payload)
            except BrokenStream as broken:
                self.problem, self.detail = "garbage", str(broken)
            if not whole:
                return

    def _send_excerpt(self) -> None:
        if self.printed.total_bytes != self._excerpt_sent_at:
            self._excerpt_sent_at = self.printed.total_bytes
            self.send(Kind.LOG, self.printed.excerpt().encode())

    def _watch_memory(self) -> None:
        if self.memory_limit_bytes is None or self.exit_code is not None:
            return
        now = time.monotonic()
        if now - self._family_at > _CENSUS_S:
            self._family, self._family_at = [self.pid, *descendants(self.pid)], now
        used = sum(map(private_bytes, self._family)) - self.start_bytes
        if used <= self.memory_limit_bytes or now - self._confirmed_at < _TICK_S / 2:
            return
        if len(self._family) > 1:
            # Children share pages with the worker, which were counted once for each.
            self._confirmed_at = now
            used = sum(map(fair_bytes, self._family)) - self.start_bytes
        if used > self.memory_limit_bytes:
            self.problem, self.detail = "memory", f"{used / 2**30:.2f} GiB"


def _read(pipe: int) -> bytes:
    try:
        return os.read(pipe, _CHUNK)
    except BlockingIOError:
        return b""
