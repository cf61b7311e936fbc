"""Methods that harm their process in every way that was thought of, for tests."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import nn

from harness import Method, Options, hookimpl
from harness.nn.surgery import block_linears, replace_module
from harness.records import CellResult, Record, Status

MIB = 1 << 20
ENOUGH_MIB = 3072  # an eater stops here, should the limit that is tested fail


class _Empty(Options):
    pass


class _Scale(Options):
    factor: float = Field(0.5, gt=0)


@torch.no_grad()
def scale(model, options, context):
    for _, linear in block_linears(model):
        linear.weight.mul_(getattr(options, "factor", 0.5))
    return model


# --- ends of the process --------------------------------------------------------------------------------


def exits_with_zero(model, options, context):
    os._exit(0)


def calls_sys_exit(model, options, context):
    sys.exit()


def presses_ctrl_c(model, options, context):
    raise KeyboardInterrupt


class _Unprintable(Exception):
    def __str__(self):
        raise AttributeError("no text")


def raises_unprintable(model, options, context):
    raise _Unprintable


def raises_a_book(model, options, context):
    raise ValueError("first words " + "x" * (8 * MIB) + " last words")


def segfaults(model, options, context):
    ctypes.string_at(0)


def hangs(model, options, context):
    _note("hangs")
    time.sleep(600)


def kills_itself(model, options, context):
    Path("kills").open("a").write("x")  # noqa: SIM115
    os.kill(os.getpid(), signal.SIGKILL)


def hangs_with_family(model, options, context):
    """Children of every kind, and then a hang that no signal but SIGKILL ends."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _leave_family_behind()
    time.sleep(600)


# --- processes left behind ------------------------------------------------------------------------------


def leaves_family(model, options, context):
    _leave_family_behind()
    return scale(model, options, context)


def _leave_family_behind():
    """A child, a child of another program, and a daemon with a session and no parent of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # threads and fork
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(1000)
            os._exit(0)
        subprocess.Popen(["sleep", "1000"])
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                for descriptor in range(1024):
                    with contextlib.suppress(OSError):
                        os.close(descriptor)
                time.sleep(1000)
            os._exit(0)
    os.wait()


def goes_on_in_two_processes(model, options, context):
    """A fork whose child does not stop: both go on to measure, and to report."""
    os.fork()
    return scale(model, options, context)


# --- output ---------------------------------------------------------------------------------------------


def floods(model, options, context):
    print("first words")
    chunk = b"x" * (1 << 20)
    for _ in range(int(os.environ.get("FLOOD_MIB", "256"))):
        os.write(1, chunk)
    os.write(2, b"last words\n")
    raise ValueError("flooded")


def closes_output(model, options, context):
    sys.stdout.close()
    sys.stderr.close()
    for descriptor in (0, 1, 2):
        os.close(descriptor)
    return scale(model, options, context)


class _Broken:
    def write(self, text):
        raise OSError("no")

    flush = write


# --- global state ---------------------------------------------------------------------------------------


def changes_everything(model, options, context):
    """Everything that a fresh process protects the next variant from. It deletes nothing: a directory
    that is looked up in a process whose environment is changed may be anybody's."""
    nn.Linear.forward = lambda self, x: torch.full((*x.shape[:-1], self.out_features), 7.0)
    torch.Tensor.__add__ = torch.Tensor.__sub__
    nn.Module.__call__ = lambda self, *args, **kwargs: None
    torch.set_default_dtype(torch.float16)
    torch.set_num_threads(7)
    torch.manual_seed = lambda seed: None
    time.perf_counter = lambda: 0.0
    sys.stdout = sys.stderr = _Broken()
    os.environ.clear()
    os.environ["HARNESS_CACHE"] = "/nowhere"
    os.chdir("/")
    atexit.register(time.sleep, 600)
    threading.Thread(target=time.sleep, args=(600,)).start()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 0)
    import multiprocessing.connection

    multiprocessing.connection.Connection.send = None
    import harness.executors.starting
    import harness.records

    harness.executors.starting.dump_message = None
    sys.setrecursionlimit(100_000)
    gc.disable()
    raise ValueError("changed everything")


def leaves_defaults(model, options, context):
    """What a notebook begins with, and a method may leave behind."""
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float16)
    torch.set_num_threads(3)
    return scale(model, options, context)


# --- memory ---------------------------------------------------------------------------------------------


def eats_bytes(model, options, context):
    eaten = []
    for _ in range(ENOUGH_MIB // 64):
        eaten.append(bytearray(64 * MIB))


def eats_numpy(model, options, context):
    eaten = []
    for _ in range(ENOUGH_MIB // 64):
        eaten.append(np.ones(8 * MIB))


def eats_torch(model, options, context):
    eaten = []
    for _ in range(ENOUGH_MIB // 64):
        eaten.append(torch.ones(16 * MIB))


def eats_mapped(model, options, context):
    return mmap.mmap(-1, 1 << 42, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def eats_wrapped(model, options, context):
    try:
        bytearray(1 << 50)
    except MemoryError:
        raise RuntimeError("the library failed") from None


def eats_shared(model, options, context):
    """Shared memory, which no limit of the process's own counts."""
    eaten = []
    for _ in range(ENOUGH_MIB // 64):
        mapped = mmap.mmap(-1, 64 * MIB)
        mapped.write(b"\1" * (64 * MIB))
        eaten.append(mapped)


def eats_in_children(model, options, context):
    """Each child stays below the limit; together they do not."""
    for _ in range(8):
        if os.fork() == 0:
            eaten = bytearray(b"\1") * (300 * MIB)
            time.sleep(600)
            os._exit(len(eaten))
    time.sleep(600)


# --- the device -----------------------------------------------------------------------------------------


class _FailsAt(nn.Module):
    """Fails for batches of one size as CUDA would."""

    def __init__(self, linear, batch, error):
        super().__init__()
        self.linear, self.batch, self.error = linear, batch, error

    def forward(self, x):
        if x.shape[0] == self.batch:
            raise self.error
        return self.linear(x) * 0.5


def _failing(error):
    def transform(model, options, context):
        _note("transform")
        name, linear = next(iter(block_linears(model)))
        replace_module(model, name, _FailsAt(linear, 3, error))
        return model

    return transform


def _note(what):
    """Which process did what: into a file in the sweep's folder."""
    with Path("processes").open("a") as file:
        file.write(f"{what} {os.getpid()}\n")


# --- results --------------------------------------------------------------------------------------------


class _NoNumber:
    def __repr__(self):
        return "no number"


def records_an_object(model, options, context):
    context.records.append(Record("odd", _NoNumber(), "1"))
    return scale(model, options, context)


def records_numpy(model, options, context):
    context.records.append(Record("odd", np.float32(1.5), "1"))
    context.records.append(Record("odder", torch.tensor(2.5), "1"))
    return scale(model, options, context)


def records_a_lambda(model, options, context):
    context.records.append(Record("odd", 1.0, lambda: "unit"))
    return scale(model, options, context)


def _outbox():
    from harness.executors.starting import Outbox

    return next(each for each in gc.get_objects() if isinstance(each, Outbox))


def forges(model, options, context):
    """Reports results for cells that are not its own: the keys are in a file."""
    for line in Path("foreign").read_text().splitlines():
        key, variant = line.split()
        _outbox()(CellResult(key, variant, Status.OK, records=(Record("acc", 1.0, "fraction"),)))
    return scale(model, options, context)


class _Exploit:
    def __reduce__(self):
        return (Path("exploited").write_text, ("x",))


def sends_code(model, options, context):
    """A pickle that runs something where it is read."""
    import pickle

    from harness.executors.wire import Kind, frame

    os.write(_outbox()._pipe, frame(Kind.MESSAGE, pickle.dumps(_Exploit())))
    time.sleep(600)


def writes_everywhere(model, options, context):
    """Nonsense into every descriptor that is open."""
    for descriptor in range(3, 64):
        with contextlib.suppress(OSError):
            os.write(descriptor, b"nonsense" * 100)
    time.sleep(600)


def closes_everything(model, options, context):
    os.closerange(0, 4096)
    return scale(model, options, context)


def caches(model, options, context):
    context.cache({"name": "ones"}, lambda: torch.ones(1 << 18))
    return scale(model, options, context)


METHODS = {
    "caches": caches,
    "exits-with-zero": exits_with_zero,
    "calls-sys-exit": calls_sys_exit,
    "presses-ctrl-c": presses_ctrl_c,
    "raises-unprintable": raises_unprintable,
    "raises-a-book": raises_a_book,
    "segfaults": segfaults,
    "hangs": hangs,
    "kills-itself": kills_itself,
    "hangs-with-family": hangs_with_family,
    "leaves-family": leaves_family,
    "goes-on-in-two-processes": goes_on_in_two_processes,
    "floods": floods,
    "closes-output": closes_output,
    "changes-everything": changes_everything,
    "leaves-defaults": leaves_defaults,
    "eats-bytes": eats_bytes,
    "eats-numpy": eats_numpy,
    "eats-torch": eats_torch,
    "eats-mapped": eats_mapped,
    "eats-wrapped": eats_wrapped,
    "eats-shared": eats_shared,
    "eats-in-children": eats_in_children,
    "device-oom": _failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
    "device-lost": _failing(RuntimeError("CUDA error: device-side assert triggered")),
    "records-an-object": records_an_object,
    "records-numpy": records_numpy,
    "records-a-lambda": records_a_lambda,
    "forges": forges,
    "sends-code": sends_code,
    "writes-everywhere": writes_everywhere,
    "closes-everything": closes_everything,
}


@hookimpl
def cell_finished(result):
    _note(str(result.status))


@hookimpl
def register_methods():
    methods = [Method(name=name, options=_Empty, transform=function) for name, function in METHODS.items()]
    return [*methods, Method(name="scale", options=_Scale, transform=scale)]
