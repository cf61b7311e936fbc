"""The parent's end of the fork server. Imports nothing heavy, so that it can be started first of all."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import IO

from harness.errors import HarnessError

__all__ = ["SCRIPT", "ForkServer", "Launched", "shared_server", "start_fork_server"]

SCRIPT = (
    "import sys; sys.path[:] = {path!r}; "
    "from harness.executors.serving import main; main({control}, imports={imports})"
)
"""What the process of a server runs."""
_END_LIMIT_S = 10.0


class Launched:
    """A running server: the socket that gives it orders, and its process where it is a child of ours."""

    def __init__(
        self, control: socket.socket, process: subprocess.Popen[bytes] | None, log: IO[bytes]
    ) -> None:
        self.control, self._process, self._log = control, process, log
        self.was_asked = False  # for a worker: then it may have something to clean up

    def close(self) -> None:
        """Hang up, upon which it ends."""
        self.control.close()
        if self._process is not None:
            if not self.was_asked:
                self._process.kill()  # its imports, which it may be at still, are for nobody
            try:
                self._process.wait(_END_LIMIT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()

    def last_words(self) -> str:
        """The last line that it printed."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""


def launch() -> Launched:
    """Start a server as a process of its own, in a session of its own: Ctrl-C does not reach it."""
    ours, theirs = socket.socketpair()
    log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the server
    path = [each or os.getcwd() for each in sys.path]
    script = SCRIPT.format(path=path, control=theirs.fileno(), imports=True)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return Launched(ours, process, log)


class ForkServer:
    """Starts the server, and starts it again where it was killed.

    Args:
        launcher: what starts one.
    """

    def __init__(self, launcher: Callable[[], Launched] = launch) -> None:
        self._launcher = launcher
        self._launched: Launched | None = None

    def ensure_running(self) -> None:
        """Start it unless one was started; whether that one still lives shows when it is needed."""
        if self._launched is None:
            try:
                self._launched = self._launcher()
            except OSError as error:
                raise HarnessError(f"the process that starts workers cannot be started: {error}") from error

    def new_channel(self) -> socket.socket:
        """Our end of the channel to a new keeper, of which only the channel will say whether it lives.

        Raises:
            HarnessError: no server can be started.
        """
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as kept_open:
            kept_open.enter_context(ours)
            for _ in range(2):
                self.ensure_running()
                assert self._launched is not None
                try:
                    socket.send_fds(self._launched.control, [b"f"], [theirs.fileno()])
                    self._launched.was_asked = True
                except OSError:  # it was killed
                    self.close()
                else:
                    kept_open.pop_all()
                    return ours
        raise HarnessError("the process that starts workers ends at once")

    def last_words(self) -> str:
        """What the running server printed last; it may say why no worker starts."""
        return "" if self._launched is None else self._launched.last_words()

    def close(self) -> None:
        """End the server; workers that were started stay."""
        launched, self._launched = self._launched, None
        if launched is not None:
            with contextlib.suppress(OSError):
                launched.close()


@functools.cache
def shared_server() -> ForkServer:
    """The one server of this process, ended with it."""
    server = ForkServer()
    atexit.register(server.close)
    return server


def start_fork_server() -> None:
    """Start the server now, so that its imports run beside the parent's own work."""
    shared_server().ensure_running()
