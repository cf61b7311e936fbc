"""Run variants on this machine: one fresh process each, forked from a preloaded server.

The server (multiprocessing's own) imports torch, transformers and lm-eval once; a worker then starts
in milliseconds with a clean CUDA state. The parent watches every worker's pipe and clock: a worker that
dies or overruns costs the cell in flight, and its other cells are given to a new worker.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from harness.executors.server import fork_context
from harness.job import CellJob, Message, Phase, VariantJob
from harness.records import CellResult, Status
from harness.worker import run_worker, tail_of

__all__ = ["LocalExecutor"]

TRANSFORM = "transform"


@dataclass
class _Running:
    """A worker with the cells that it still owes."""

    job: VariantJob
    slot: int
    process: Any
    connection: Connection
    deadline: float
    phase: str = TRANSFORM
    phase_started: float = field(default_factory=time.monotonic)
    started_at: str = ""
    owed: dict[str, CellJob] = field(default_factory=dict)


class LocalExecutor:
    """Runs jobs, at most `slots` at a time, each with a limit for every phase.

    Args:
        slots: workers at a time.
        timeout_s: the limit for making the variant, and for each cell, in seconds.
        devices: one device for each slot (``cuda:0``, ``cuda:1``), or empty to keep the job's own.
    """

    def __init__(self, slots: int, timeout_s: float, devices: tuple[str, ...] = ()) -> None:
        self.slots, self.timeout_s, self.devices = slots, timeout_s, devices

    def run(self, jobs: Iterable[VariantJob], on_message: Callable[[VariantJob, Message], None]) -> None:
        """Run all jobs; every cell of every job reaches `on_message` as exactly one `CellResult`.

        An exception (KeyboardInterrupt included) kills the workers and is passed on.
        """
        queue = deque(jobs)
        running: list[_Running] = []
        with tempfile.TemporaryDirectory(prefix="harness-logs-") as logs:
            try:
                while queue or running:
                    free = set(range(self.slots)) - {worker.slot for worker in running}
                    while queue and free:
                        running.append(self._start(queue.popleft(), free.pop(), Path(logs)))
                    for worker, message in self._messages(running):
                        self._handle(worker, message, queue, running, on_message)
            finally:
                for worker in running:
                    _kill(worker)

    # --- one worker -----------------------------------------------------------------------------

    def _start(self, job: VariantJob, slot: int, logs: Path) -> _Running:
        context = fork_context()
        handle, name = tempfile.mkstemp(dir=logs, suffix=".log")
        os.close(handle)
        device = self.devices[slot] if self.devices else job.device
        job = replace(job, device=device, log_path=Path(name))
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=run_worker, args=(job, theirs), name=job.label)
        try:
            process.start()
        except (ConnectionError, EOFError):
            # The fork server was killed between two jobs; starting again brings up a new one.
            process = context.Process(target=run_worker, args=(job, theirs), name=job.label)
            process.start()
        theirs.close()
        return _Running(
            job=job,
            slot=slot,
            process=process,
            connection=ours,
            deadline=time.monotonic() + self.timeout_s,
            started_at=_now(),
            owed={cell.key: cell for cell in job.cells},
        )

    def _messages(self, running: list[_Running]) -> Iterator[tuple[_Running, Message | None]]:
        """Wait for the next news; None as a message means that the worker is gone or overdue."""
        nearest = min(worker.deadline for worker in running)
        ready = wait(
            [worker.connection for worker in running],
            timeout=max(0.0, nearest - time.monotonic()),
        )
        now = time.monotonic()
        for worker in list(running):
            if worker.connection in ready:
                try:
                    yield worker, worker.connection.recv()
                except (EOFError, OSError):
                    yield worker, None
            elif now >= worker.deadline:
                yield worker, None

    def _handle(
        self,
        worker: _Running,
        message: Message | None,
        queue: deque[VariantJob],
        running: list[_Running],
        on_message: Callable[[VariantJob, Message], None],
    ) -> None:
        if message is None:
            running.remove(worker)
            for result in self._end(worker, queue):
                on_message(worker.job, result)
            return
        if isinstance(message, Phase):
            worker.phase, worker.phase_started = message.name, time.monotonic()
            worker.started_at = _now()
            worker.deadline = time.monotonic() + self.timeout_s
        elif isinstance(message, CellResult):
            worker.owed.pop(message.key, None)
        on_message(worker.job, message)

    def _end(self, worker: _Running, queue: deque[VariantJob]) -> list[CellResult]:
        """Settle a worker that is done, dead or overdue: results for what it cannot give any more."""
        overdue = time.monotonic() >= worker.deadline and worker.process.is_alive()
        if overdue:
            worker.process.kill()
        _join(worker)
        log_tail = tail_of(worker.job.log_path)
        if not worker.owed:
            return []
        if overdue:
            status, reason = Status.TIMEOUT, f"took longer than {self.timeout_s:g} s"
        else:
            status, reason = Status.CRASHED, _how_it_died(worker.process.exitcode)
        if worker.phase == TRANSFORM:
            lost = list(worker.owed)
            reason = f"while making the variant: {reason}"
        else:
            # The cell that was running, or none where the worker died between two cells.
            lost = [worker.phase] if worker.phase in worker.owed else list(worker.owed)[:1]
        results = [
            CellResult(
                key=key,
                variant_key=worker.job.variant_key,
                status=status,
                reason=reason,
                log_tail=log_tail,
                started_at=worker.started_at,
                seconds=time.monotonic() - worker.phase_started,
            )
            for key in lost
        ]
        left = tuple(cell for key, cell in worker.owed.items() if key not in lost)
        if left:
            queue.appendleft(replace(worker.job, cells=left))
        return results


def _kill(worker: _Running) -> None:
    worker.process.kill()
    _join(worker)


def _join(worker: _Running) -> None:
    """Wait for a worker that closed its pipe or was killed; it may need a moment to end."""
    worker.process.join(timeout=10)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join(timeout=10)
    worker.connection.close()


def _how_it_died(exit_code: int | None) -> str:
    if exit_code is None:
        return "the worker process is gone"
    if exit_code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-exit_code).name
            hint = " (the system may have run out of memory)" if name == "SIGKILL" else ""
            return f"the worker process was killed by {name}{hint}"
    return f"the worker process ended with exit code {exit_code}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
