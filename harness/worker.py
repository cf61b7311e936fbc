"""The worker: makes one variant in a fresh process and measures all its cells.

The same in-memory object is timed, weighed and scored. Whatever goes wrong becomes the status and the
reason of a cell; only the death of the process itself is left to the parent to notice.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import HarnessError, NotApplicable
from harness.job import CellJob, Message, Phase, Progress, VariantJob
from harness.records import CellKind, CellResult, Record, Scenario, Status, VariantReport

if TYPE_CHECKING:
    from harness.plugins import LoadedPlugins
    from harness.transforming import MadeVariant

__all__ = ["run_worker"]

Send = Callable[[Message], None]
LOG_TAIL_BYTES = 4000
log = logging.getLogger("harness.worker")


def run_worker(job: VariantJob, connection: Any) -> None:
    """The entry point of the process: run the job and stream messages into `connection`."""
    _die_with_parent()
    _log_to(job.log_path)
    try:
        _run(job, connection.send)
    finally:
        connection.close()


def _run(job: VariantJob, send: Send) -> None:
    import torch

    _limit_memory(job.device)
    torch.set_num_threads(max(1, job.threads))
    send(Phase("transform"))
    started, clock = _now(), time.perf_counter()
    try:
        variant = _Variant.make(job, send)
    except Exception as error:  # the border to methods' code
        failure = _failure(error, job)
        seconds = time.perf_counter() - clock
        for cell in job.cells:
            send(replace(failure, key=cell.key, started_at=started, seconds=seconds))
        return
    send(variant.report)
    for cell in job.cells:
        started, clock = _now(), time.perf_counter()
        send(Phase(cell.key))
        try:
            result = variant.measure(cell)
        except Exception as error:  # the border to methods' code
            result = replace(_failure(error, job), key=cell.key)
        result = replace(result, started_at=started, seconds=time.perf_counter() - clock)
        variant.observe(result)
        send(result)
        gc.collect()


# --- the variant --------------------------------------------------------------------------------------


@dataclass
class _Variant:
    """The transformed model with what is needed to measure it."""

    job: VariantJob
    plugins: LoadedPlugins
    made: MadeVariant

    @classmethod
    def make(cls, job: VariantJob, send: Send) -> _Variant:
        from harness.plugins import load_plugins
        from harness.transforming import make_variant

        plugins = load_plugins(job.plugins)
        _observed(
            plugins.manager.hook.variant_started,
            label=job.label,
            model=job.model.info.label,
            options={name: dict(options) for name, options in job.chain},
        )

        def report(what: str, done: int, total: int) -> None:
            send(Progress(what, done, total))

        return cls(job, plugins, make_variant(job, plugins, report))

    @property
    def report(self) -> VariantReport:
        effect = self.made.effect
        return VariantReport(self.job.variant_key, effect.effects, effect.simulated)

    def measure(self, cell: CellJob) -> CellResult:
        result = CellResult(key=cell.key, variant_key=self.job.variant_key, status=Status.OK)
        records = self.made.records if cell.kind is CellKind.TRANSFORM else ()
        if self.made.no_effect is not None:
            reason = self.made.no_effect
            return replace(result, status=Status.NO_EFFECT, reason=reason, records=records)
        if cell.scenario is not None:
            return replace(result, records=self._timed(cell.scenario))
        if cell.task is not None:
            from harness.scoring import score

            evaluation = score(self.made, self.job, self.plugins, cell.task)
            return replace(result, records=evaluation.records, items=evaluation.items)
        return replace(result, records=records)

    def _timed(self, scenario: Scenario) -> tuple[Record, ...]:
        from harness.measure.meter import Measured
        from harness.measure.scenario import measure_scenario

        measured = Measured(
            model=self.made.model,
            info=self.made.info,
            scenario=scenario,
            device=self.made.device,
            dtype=self.made.dtype,
            seed=self.job.seed,
            shared={},
        )
        records = measure_scenario(measured, self.plugins.meters)
        if self.made.effect.simulated:
            return tuple(_marked_simulated(record) for record in records)
        return records

    def observe(self, result: CellResult) -> None:
        _observed(self.plugins.manager.hook.cell_finished, result=result)


def _marked_simulated(record: Record) -> Record:
    mode = "simulated" if record.mode is None else f"{record.mode}, simulated"
    return replace(record, mode=mode)


def _observed(hook: Callable[..., Any], **arguments: Any) -> None:
    try:
        hook(**arguments)
    except Exception:  # an observer must not decide a cell
        log.exception("an observing plugin failed")


# --- what goes wrong ----------------------------------------------------------------------------------


def _failure(error: Exception, job: VariantJob) -> CellResult:
    """The status and the reason for an exception; the traceback is kept for what is not our own."""
    status = _status_of(error)
    expected = isinstance(error, HarnessError)
    text = " ".join(str(error).split())
    reason = text if expected else f"{type(error).__name__}: {text}".rstrip(": ")
    return CellResult(
        key="",
        variant_key=job.variant_key,
        status=status,
        reason=reason[:1000],
        traceback=None if status is Status.NOT_APPLICABLE else traceback.format_exc(),
        log_tail=tail_of(job.log_path),
    )


def _status_of(error: BaseException) -> Status:
    import torch

    if isinstance(error, NotApplicable):
        return Status.NOT_APPLICABLE
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return Status.OOM
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
        return Status.OOM  # how torch's CPU allocator says it
    return Status.FAILED


def tail_of(path: Path) -> str | None:
    """The end of a worker's log; None where it is empty or gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - LOG_TAIL_BYTES))
            return file.read().decode(errors="replace").strip() or None
    except OSError:
        return None


# --- the process --------------------------------------------------------------------------------------


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _die_with_parent() -> None:
    """End this process when the parent is gone, even in the middle of a long computation."""
    import multiprocessing

    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="parent-watch").start()


def _log_to(path: Path) -> None:
    """Send everything that is printed, also by libraries in C, to the variant's log."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, force=True)


def _limit_memory(device: str) -> None:
    """Let a runaway allocation fail in this process instead of taking the machine down.

    Only on the CPU: a CUDA context reserves more address space than the machine has memory.
    """
    if device != "cpu":
        return
    import resource

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = int(total * 0.95)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
