"""The fork server: imports everything heavy once, then forks a keeper for every channel that it is handed.

It never runs a method's code, starts no thread and never touches CUDA, so its children start clean. Where an
import has touched CUDA all the same (an installed package may ask for devices while it is imported), the
server begins anew without imports, and every worker imports for itself, which takes it some seconds. It ends
when the parent does, which closes the control socket.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from typing import NoReturn

from harness.executors import cuda_driver
from harness.executors.keeper import keep
from harness.executors.processes import adopt_orphans, descendants, name_process, reap
from harness.executors.scratch import remove_scratch_of
from harness.executors.server import SCRIPT

__all__ = ["main", "serve"]


def main(control: int, *, imports: bool = True) -> None:
    """The server as a process of its own: import, then serve."""
    if imports:
        os.environ.update(cuda_driver.QUIET_CHECKS)
        import harness.executors.preload  # noqa: F401

        if cuda_driver.is_started():
            _begin_anew(control)
    serve(socket.socket(fileno=control))
    os._exit(0)


def _begin_anew(control: int) -> NoReturn:
    """Be a server that has imported nothing: the driver stays started for as long as a process lives."""
    print("an import has touched CUDA: workers import for themselves", file=sys.stderr, flush=True)
    os.set_inheritable(control, True)
    script = SCRIPT.format(path=sys.path, control=control, imports=False)
    os.execv(sys.executable, [sys.executable, "-c", script])


def serve(control: socket.socket) -> None:
    """Fork a keeper for each channel that comes through `control`, until its other end is closed."""
    name_process("harness-server")
    adopt_orphans()
    # Collecting garbage touches every object, and so would copy all pages in every child.
    gc.collect()
    gc.freeze()
    waking, woken = socket.socketpair()
    for end in (waking, woken):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    keepers: set[int] = set()
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(waking, select.POLLIN)
    while True:
        ready = {number for number, _ in poll.poll()}
        if waking.fileno() in ready:
            with suppress(BlockingIOError):
                waking.recv(4096)
            _bury(keepers)
        if control.fileno() in ready:
            try:
                data, descriptors, _, _ = socket.recv_fds(control, 1, 1)
            except OSError:
                return
            if not data:
                return
            for descriptor in descriptors:
                _fork_keeper(descriptor, keepers, (control, waking, woken))


def _fork_keeper(descriptor: int, keepers: set[int], private: tuple[socket.socket, ...]) -> None:
    try:
        pid = os.fork()
    except OSError as error:  # no memory or no process ids: the parent sees the channel close
        print(f"no worker can be forked: {error}", file=sys.stderr, flush=True)
        os.close(descriptor)
        return
    if pid == 0:
        signal.set_wakeup_fd(-1)
        for each in private:
            each.close()
        keep(socket.socket(fileno=descriptor))
    os.close(descriptor)
    keepers.add(pid)


def _bury(keepers: set[int]) -> None:
    """Collect ended children; what a keeper that was killed left behind has come here, and is killed."""
    while ended := reap():
        for pid, code in ended.items():
            is_keeper, was_killed = pid in keepers, code < 0
            keepers.discard(pid)
            if was_killed or not is_keeper:
                _kill_strays(keepers)
            if was_killed and is_keeper:
                remove_scratch_of(pid)


def _kill_strays(keepers: set[int]) -> None:
    # One look, at what is not below a keeper: of two looks the second would find the worker that a keeper
    # has forked since the first, and take it for a stray.
    for pid in descendants(os.getpid(), sparing=keepers):
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
