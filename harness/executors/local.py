"""Run variants on this machine: one fresh process each, forked from a preloaded server.

The server imports torch, transformers and lm-eval once; a worker then starts in milliseconds with a clean
CUDA state. The parent watches every worker's channel and clock: a worker that dies or overruns costs the
cell in flight, and its other cells are given to a new worker.
"""

from __future__ import annotations

import selectors
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from harness.errors import DiskFull, HarnessError
from harness.executors.conforming import conforming
from harness.executors.limits import default_limit_bytes, oom_kills
from harness.executors.link import WORKER, Ended, Link
from harness.executors.server import ForkServer, shared_server
from harness.interrupts import Interrupts
from harness.job import CellJob, Message, OutOfDisk, Phase, Progress, VariantJob
from harness.records import CellResult, Status, VariantReport
from harness.worker import EXIT_CONTEXT_BROKEN

__all__ = ["LocalExecutor"]

TRANSFORM = "transform"
START_LIMIT_S = 300.0  # for a worker to start, imports of the fork server included
FAREWELL_S = 10.0  # for a worker to end when it has given everything it owes
_STARTS = 5  # times in a row that workers may die before they start, where a killed server takes all at once
_LONGEST_WAIT_S = 1e6  # the operating system's waits overflow at twenty-five days
_FROM_OUTSIDE = frozenset({-signal.SIGKILL, -signal.SIGTERM})


@dataclass
class _Running:
    """A worker with the cells that it still owes."""

    job: VariantJob
    slot: int
    link: Link
    deadline: float
    owed: dict[str, CellJob]
    oom_kills: int
    phase: str | None = None  # None until the worker says that it begins
    phase_cells: int = 1  # how many cells it serves
    phase_started: float = field(default_factory=time.monotonic)
    started_at: str = field(default_factory=lambda: _now())
    has_given: bool = False
    is_late: bool = False  # its time was up while what it had sent was still to be read
    overdue: bool = False


class LocalExecutor:
    """Runs jobs, at most `slots` at a time, each with a limit for every phase.

    Args:
        slots: workers at a time.
        timeout_s: the limit for making the variant, and for each cell, in seconds.
        devices: one device for each slot (``cuda:0``, ``cuda:1``), or empty to keep the job's own.
        memory_limit_bytes: what a worker and all its children may use besides its imports; by default
            its share of nine tenths of what is available.
        interrupts: whose signals end a run at a safe point.
        server: what forks the workers.
        target: what runs in a worker.
    """

    def __init__(
        self,
        slots: int,
        timeout_s: float,
        devices: tuple[str, ...] = (),
        *,
        memory_limit_bytes: int | None = None,
        interrupts: Interrupts | None = None,
        server: ForkServer | None = None,
        target: str = WORKER,
    ) -> None:
        self.slots, self.timeout_s, self.devices = slots, timeout_s, devices
        self.memory_limit_bytes = memory_limit_bytes or default_limit_bytes(slots)
        self._interrupts, self._target = interrupts, target
        self._server = server or shared_server()
        self._failed_starts = 0
        self._killed: Counter[tuple[str, str]] = Counter()

    def run(self, jobs: Iterable[VariantJob], on_message: Callable[[VariantJob, Message], None]) -> None:
        """Run all jobs; every cell of every job reaches `on_message` as exactly one `CellResult`.

        An exception (that of a signal included) kills the workers and is passed on.

        Raises:
            HarnessError: no worker can be started.
            DiskFull: a worker could not write to the cache.
        """
        queue = deque(jobs)
        running: list[_Running] = []
        with self._interrupts.deferred() if self._interrupts else nullcontext():
            try:
                while queue or running:
                    free = set(range(self.slots)) - {worker.slot for worker in running}
                    while queue and free:
                        running.append(self._start(queue.popleft(), free.pop()))
                    for worker in self._ready(running):
                        for message in worker.link.pump():
                            self._handle(worker, message, on_message)
                        if worker.link.ended is None and _is_overdue(worker):
                            worker.overdue = True
                            worker.link.stop()
                        if worker.link.ended is not None:
                            running.remove(worker)
                            for result in self._settle(worker, worker.link.ended, queue):
                                on_message(worker.job, result)
            finally:
                for worker in running:
                    worker.link.hang_up()
                for worker in running:
                    worker.link.stop()

    def _start(self, job: VariantJob, slot: int) -> _Running:
        job = replace(job, device=self.devices[slot]) if self.devices else job
        link = Link(
            self._server,
            job,
            target=self._target,
            memory_limit_bytes=self.memory_limit_bytes,
            limit_address_space=job.device == "cpu",
        )
        return _Running(
            job=job,
            slot=slot,
            link=link,
            deadline=time.monotonic() + START_LIMIT_S,
            owed={cell.key: cell for cell in job.cells},
            oom_kills=oom_kills(),
        )

    def _ready(self, running: list[_Running]) -> list[_Running]:
        """Wait for news; the workers that have some, or whose time is up."""
        with selectors.DefaultSelector() as selector:
            for worker in running:
                writes = selectors.EVENT_WRITE if worker.link.wants_to_write else 0
                selector.register(worker.link, selectors.EVENT_READ | writes, worker)
            if self._interrupts is not None:
                selector.register(self._interrupts, selectors.EVENT_READ)
            nearest = min(worker.deadline for worker in running)
            left = min(max(0.0, nearest - time.monotonic()), _LONGEST_WAIT_S)
            ready = [key.data for key, _ in selector.select(left)]
        if self._interrupts is not None:
            self._interrupts.check()
        now = time.monotonic()
        return [worker for worker in running if worker in ready or now >= worker.deadline]

    def _handle(
        self, worker: _Running, message: Any, on_message: Callable[[VariantJob, Message], None]
    ) -> None:
        """Take a message, if it is one that this worker may send now."""
        try:
            message = conforming(message)
        except (TypeError, ValueError):
            return  # a worker's own check was tampered with; what it owes is settled at its end
        if isinstance(message, OutOfDisk):
            raise DiskFull(message.reason)
        if isinstance(message, Phase):
            if message.name != TRANSFORM and message.name not in worker.owed:
                return
            self._failed_starts = 0
            worker.phase, worker.phase_started = message.name, time.monotonic()
            worker.phase_cells = min(max(1, message.cells), len(worker.owed))
            worker.started_at, worker.is_late = _now(), False
            worker.deadline = time.monotonic() + self.timeout_s * worker.phase_cells
        elif isinstance(message, CellResult):
            if worker.owed.pop(message.key, None) is None or message.variant_key != worker.job.variant_key:
                return
            worker.has_given = True
            if message.status.is_failure:
                message = replace(message, log_tail=worker.link.log_tail)
            if not worker.owed:
                worker.deadline = time.monotonic() + FAREWELL_S
        elif isinstance(message, VariantReport):
            if message.variant_key != worker.job.variant_key:
                return
        elif not isinstance(message, Progress):
            return
        on_message(worker.job, message)

    def _settle(self, worker: _Running, ended: Ended, queue: deque[VariantJob]) -> list[CellResult]:
        """A worker is gone: results for what it cannot give any more; the rest goes to a new worker."""
        if not worker.owed:
            return []
        if worker.phase is None:
            self._count_failed_start(ended, worker)
            queue.appendleft(self._rest(worker, ()))
            return []
        if ended.exit_code == EXIT_CONTEXT_BROKEN and worker.has_given:
            queue.appendleft(self._rest(worker, ()))
            return []
        if worker.phase_cells > 1:
            # Which of them it was shows when each is measured by itself.
            queue.appendleft(replace(self._rest(worker, ()), together=False))
            return []
        in_flight = worker.phase if worker.phase in worker.owed else next(iter(worker.owed))
        status, reason = self._verdict(worker, ended)
        if status is None:
            # Somebody outside killed it. That says nothing about the method: once more, then it counts.
            place = (worker.job.variant_key, worker.phase if worker.phase == TRANSFORM else in_flight)
            self._killed[place] += 1
            if self._killed[place] == 1:
                queue.appendleft(self._rest(worker, ()))
                return []
            status, reason = Status.CRASHED, f"{reason}, twice"
        if worker.phase == TRANSFORM:
            lost = list(worker.owed)
            reason = f"while making the variant: {reason}"
        else:
            lost = [in_flight]
        if len(lost) < len(worker.owed):
            queue.appendleft(self._rest(worker, lost))
        return [
            CellResult(
                key=key,
                variant_key=worker.job.variant_key,
                status=status,
                reason=reason,
                log_tail=worker.link.log_tail,
                started_at=worker.started_at,
                seconds=time.monotonic() - worker.phase_started,
            )
            for key in lost
        ]

    def _verdict(self, worker: _Running, ended: Ended) -> tuple[Status | None, str]:
        """The status of what was in flight, or None where something outside killed the worker."""
        if worker.overdue:
            return Status.TIMEOUT, f"took longer than {self.timeout_s:g} s"
        if ended.problem == "memory":
            limit = f"{self.memory_limit_bytes / 2**30:.2f} GiB"
            return Status.OOM, f"used {ended.detail} of memory; the limit of a worker is {limit}"
        if ended.problem is not None:
            return Status.CRASHED, f"the worker sent {ended.detail}"
        if ended.exit_code == -signal.SIGKILL and oom_kills() > worker.oom_kills:
            return Status.OOM, "the system ran out of memory and killed the worker"
        if ended.exit_code == -signal.SIGABRT and _ran_out_of_memory(worker.link.log_tail):
            return Status.OOM, "the worker ended itself because no memory could be allocated"
        status = None if ended.exit_code is None or ended.exit_code in _FROM_OUTSIDE else Status.CRASHED
        return status, _how_it_died(ended.exit_code)

    def _count_failed_start(self, ended: Ended, worker: _Running) -> None:
        self._failed_starts += 1
        if worker.overdue or self._failed_starts == _STARTS * self.slots:
            said = worker.link.log_tail or self._server.last_words() or _how_it_died(ended.exit_code)
            raise HarnessError(f"no worker can be started: {said.splitlines()[-1]}")

    def _rest(self, worker: _Running, lost: Iterable[str]) -> VariantJob:
        gone = set(lost)
        return replace(worker.job, cells=tuple(cell for key, cell in worker.owed.items() if key not in gone))


def _is_overdue(worker: _Running) -> bool:
    """Whether its time is up, and nothing of what it sent in time is still to be read.

    While this process was held up (by a locked store, or stopped with Ctrl-Z) the worker went on: what it
    finished counts. It may be more than one look at the channel brings.
    """
    now = time.monotonic()
    if now >= worker.deadline and not worker.is_late and worker.link.has_more:
        worker.is_late, worker.deadline = True, now + FAREWELL_S
    return now >= worker.deadline


def _ran_out_of_memory(printed: str | None) -> bool:
    """How C++ and Rust say so before they abort."""
    return any(words in (printed or "") for words in ("std::bad_alloc", "memory allocation of"))


def _how_it_died(exit_code: int | None) -> str:
    if exit_code is None:
        return "the worker process is gone"
    if exit_code < 0:
        name = str(-exit_code)
        with suppress(ValueError):
            name = signal.Signals(-exit_code).name
        return f"the worker process was killed by {name}"
    return f"the worker process ended with exit code {exit_code} without a result"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
