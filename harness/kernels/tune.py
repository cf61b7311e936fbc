"""Find the fastest launches on this device: ``python -m harness.kernels.tune``.

For every scheme, shape and number of rows a bounded list of launches is tried: each result is compared with
the plain-torch product of the same weights, then timed as in `harness.kernels.bench` (a CUDA graph over
copies of the weight that exceed the cache), beside bfloat16, beside writing the matrix out first, and beside
PyTorch's own 4-bit product. Nothing is changed: the table and the JSON file say what
`RULES` and `WRITING` of `harness.kernels.selection` should hold.

All launches are first compiled by several processes at once. Then one worker goes through the parts. A
launch that does not compile, does not fit or is wrong is one line; a worker that dies or is silent for too
long is replaced, and the rest of what it was at is left out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from harness.errors import ConfigError
from harness.kernels.tune_worker import SCHEMES, Part, Trial, compile_part, work

__all__ = ["ROWS", "SHAPES", "best_of", "compile_parts", "main", "run_parts", "summary"]

SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096))
"""(in, out) of Llama-7B's projections."""
ROWS = (1, 2, 16, 64, 128, 256, 512, 2048)

_PEERS = ("bf16", "tinygemm")
_SILENCE_S = 45.0
"""A worker that reports nothing for so long is replaced: starting, compiling or a launch that hangs."""


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The fastest of ours that ran; None without any."""
    ours = [trial for trial in trials if trial.us is not None and trial.name not in _PEERS]
    return min(ours, key=lambda trial: trial.us or 0.0, default=None)


def summary(trials: Sequence[Trial]) -> str:
    """A line for each scheme, shape and number of rows: the best way, and its peers' time over its own."""
    cases: dict[Part, list[Trial]] = {}
    for trial in trials:
        cases.setdefault(trial.part, []).append(trial)
    lines = [f"{'scheme':18} {'in':>6} {'out':>6} {'rows':>5} {'us':>8} {'of bf16':>8} {'of tiny':>8}  best"]
    for part, found in cases.items():
        best = best_of(found)
        us = None if best is None else best.us
        peers = {trial.name: trial.us for trial in found if trial.name in _PEERS}
        numbers: list[float | None] = [us]
        for name in _PEERS:
            peer = peers.get(name)
            numbers.append(peer / us if us and peer else None)
        cells = [f"{'-':>8}" if number is None else f"{number:8.2f}" for number in numbers]
        where = f"{part.scheme:18} {part.in_features:6} {part.out_features:6} {part.rows:5}"
        lines.append(f"{where} {' '.join(cells)}  {'nothing ran' if best is None else best.name}")
    return "\n".join(lines)


def compile_parts(
    parts: Sequence[Part],
    processors: int,
    *,
    seconds: float,
    processes: int,
    compile_one: Callable[[Part, int], None] = compile_part,
) -> int:
    """Compile the launches of all parts, for at most so many seconds; returns how many parts are done."""
    if not processes or not parts:
        return 0
    end, done = time.monotonic() + seconds, 0
    pool = mp.get_context("spawn").Pool(min(processes, len(parts)), maxtasksperchild=None)
    try:
        waiting = [pool.apply_async(compile_one, (part, processors)) for part in parts]
        for each in waiting:
            each.wait(max(0.0, end - time.monotonic()))
            done += each.ready()
    finally:
        pool.terminate()
        pool.join()
    return done


def run_parts(
    parts: Sequence[Part],
    *,
    deadline: float,
    silence_s: float = _SILENCE_S,
    worker: Callable[[Connection], None] = work,
) -> Iterator[Trial]:
    """What a worker reports for each part, until time.monotonic() is `deadline`.

    A part that cannot be finished ends with a trial named ``left out`` that says why.

    Args:
        worker: says None when it is ready, takes parts from its end of a pipe, sends trials back, and None
            after each part.
    """
    context = mp.get_context("spawn")
    process: Any = None
    pipe: Connection | None = None
    try:
        for part in parts:
            if time.monotonic() >= deadline:
                yield Trial(part, "left out", failure="no time left")
                continue
            failure = None
            if pipe is None:
                pipe, theirs = context.Pipe()
                process = context.Process(target=worker, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                failure = _started(pipe, deadline)
            if failure is None:
                failure = yield from _follow(pipe, part, deadline, silence_s)
            if failure is not None:
                yield Trial(part, "left out", failure=failure)
                _end(process)
                pipe = process = None
    finally:
        _end(process)


def _started(pipe: Connection, deadline: float) -> str | None:
    """Wait until a worker has imported what it needs; why it will not be used, or None."""
    try:
        if not pipe.poll(max(0.0, deadline - time.monotonic())):
            return "no time left"
        pipe.recv()
    except (EOFError, OSError):
        return "the worker died"
    return None


def _follow(
    pipe: Connection, part: Part, deadline: float, silence_s: float
) -> Generator[Trial, None, str | None]:
    """The trials of one part; returns why the worker has to be replaced, or None."""
    try:
        pipe.send(part)
        while True:
            left = deadline - time.monotonic()
            if not pipe.poll(max(0.0, min(silence_s, left))):
                return "no time left" if left < silence_s else f"silent for {silence_s:g} s"
            trial = pipe.recv()
            if trial is None:
                return None
            yield trial
    except (EOFError, OSError):
        return "the worker died"


def _end(process: Any) -> None:
    if process is not None:
        process.kill()
        process.join()


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune, print every trial as it ends and the table at last, and write both as JSON."""
    options = _parser().parse_args(arguments)
    parts = _parts(options)
    if not torch.cuda.is_available():
        raise SystemExit("tuning needs a CUDA device")
    start = time.monotonic()
    # In another process: this one leaves the device alone.
    compile_parts(
        parts, options.processors, seconds=0.4 * options.seconds, processes=max(1, (os.cpu_count() or 1) - 1)
    )
    print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
    trials: list[Trial] = []
    for trial in run_parts(parts, deadline=start + options.seconds):
        trials.append(trial)
        _write(options.json, trials)  # what is known so far survives whatever comes
        if trial.failure or not options.quiet:
            part = trial.part
            where = f"{part.scheme} {part.in_features}x{part.out_features} {part.rows}"
            print(f"{where}: {trial.name}: {trial.failure or f'{trial.us:.1f} us'}", flush=True)
    print(summary(trials))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m harness.kernels.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--schemes", default="w4-g128", help=f"comma-separated, of {', '.join(SCHEMES)}")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="comma-separated")
    parser.add_argument("--shapes", default="", help="comma-separated INxOUT; Llama-7B's by default")
    parser.add_argument("--seconds-per-shape", type=float, default=8.0, help="for one number of rows")
    parser.add_argument("--seconds", type=float, default=420.0, help="for everything, compiling included")
    parser.add_argument("--processors", type=int, default=132, help="multiprocessors of the device")
    parser.add_argument("--json", type=Path, default=Path("tuned.json"), help="where to write the trials")
    parser.add_argument("--quiet", action="store_true", help="print failures and the table alone")
    return parser


def _parts(options: argparse.Namespace) -> list[Part]:
    """What to do."""
    schemes = options.schemes.split(",")
    if unknown := set(schemes) - set(SCHEMES):
        raise ConfigError(f"unknown schemes {sorted(unknown)}; known: {', '.join(SCHEMES)}")
    try:
        rows = [int(each) for each in options.rows.split(",")]
        shapes = [tuple(map(int, each.split("x"))) for each in options.shapes.split(",") if each]
        sizes = [(columns, out) for columns, out in shapes or SHAPES]
    except ValueError:
        raise ConfigError("rows are whole numbers, shapes are INxOUT, both comma-separated") from None
    if min(rows) < 1 or min(map(min, sizes)) < 1 or options.seconds_per_shape <= 0:
        raise ConfigError("rows, sizes and seconds are positive")
    return [
        Part(scheme, *size, each, options.seconds_per_shape)
        for scheme in schemes
        for size in sizes
        for each in rows
    ]


def _write(path: Path, trials: Sequence[Trial]) -> None:
    record = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "trials": [asdict(trial) for trial in trials],
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
