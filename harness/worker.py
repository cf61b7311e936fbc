"""The worker: makes one variant in a fresh process and measures all its cells.

The same in-memory object is timed, weighed and scored. Whatever goes wrong becomes the status and the
reason of a cell; only the death of the process itself is left to the parent to notice.
"""

from __future__ import annotations

import errno
import gc
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from harness.errors import DiskFull, HarnessError, NotApplicable
from harness.job import CellJob, Message, OutOfDisk, Phase, Progress, VariantJob
from harness.records import CellKind, CellResult, KernelUse, Record, Scenario, Status, VariantReport

if TYPE_CHECKING:
    from pluggy import PluginManager

    from harness.plugins import LoadedPlugins
    from harness.scoring import VariantScorer
    from harness.transforming import MadeVariant

__all__ = ["EXIT_CONTEXT_BROKEN", "run_worker"]

Send = Callable[[Message], None]
EXIT_CONTEXT_BROKEN = 75  # after a CUDA error that stays: the cells that are left need a new process
LONGEST_REASON, LONGEST_TRACEBACK = 1000, 40_000  # characters
log = logging.getLogger("harness.worker")


def run_worker(job: VariantJob, send: Send) -> int:
    """What a fresh process runs: the whole job, streaming messages; returns the exit code."""
    import torch

    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, force=True)
    torch.set_num_threads(max(1, job.threads))
    send(Phase("transform"))
    started, clock = _now(), time.perf_counter()
    try:
        variant = _Variant.make(job, send)
        send(variant.report)
    except BaseException as error:  # the border to methods' code, which may also call sys.exit()
        failure = _failure(error, job, "while making the variant")
        _say_if_out_of_disk(error, send)
        seconds = time.perf_counter() - clock
        for cell in job.cells:
            send(replace(failure, key=cell.key, started_at=started, seconds=seconds))
        return 0
    # What a method left changed must not decide how it is timed and scored.
    torch.set_num_threads(max(1, job.threads))
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    together: dict[str, float] | None = None
    for cell in job.cells:
        if cell.task is not None and together is None:
            together = variant.score_together(send)
            if not _context_works():
                return EXIT_CONTEXT_BROKEN
        started, clock = _now(), time.perf_counter()
        send(Phase(cell.key))
        context_broken = False
        try:
            result = variant.measure(cell)
        except BaseException as error:  # the border to methods' code
            _say_if_out_of_disk(error, send)
            result = replace(_failure(error, job, _place(cell, job)), key=cell.key)
            context_broken = _is_cuda_error(error)
        seconds = time.perf_counter() - clock + (together or {}).get(cell.key, 0.0)
        result = replace(result, started_at=started, seconds=seconds)
        variant.observe(result)
        _send_result(result, job, send)
        _free_memory()
        if context_broken or not _context_works():
            return EXIT_CONTEXT_BROKEN
    return 0


def _send_result(result: CellResult, job: VariantJob, send: Send) -> None:
    """Send a result; one that cannot be sent, because of what a plugin put into it, is a failure."""
    try:
        send(result)
    except OSError:
        raise  # the keeper is gone, and nothing can be said any more
    except Exception as error:
        failure = _failure(error, job, "what was measured cannot be stored")
        send(replace(failure, key=result.key, started_at=result.started_at, seconds=result.seconds))


def _say_if_out_of_disk(error: BaseException, send: Send) -> None:
    if isinstance(error, DiskFull):
        send(OutOfDisk(" ".join(str(error).split())))


# --- the variant --------------------------------------------------------------------------------------


@dataclass
class _Variant:
    """The transformed model with what is needed to measure it."""

    job: VariantJob
    plugins: LoadedPlugins
    made: MadeVariant
    refused: dict[str, BaseException] = field(default_factory=dict)  # by cell: tasks that cannot be scored

    @classmethod
    def make(cls, job: VariantJob, send: Send) -> _Variant:
        from harness.plugins import load_plugins
        from harness.transforming import make_variant

        plugins = load_plugins(job.plugins)
        _observed(
            plugins.manager,
            "variant_started",
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
        from harness.measure.counting import count_records

        result = CellResult(key=cell.key, variant_key=self.job.variant_key, status=Status.OK)
        records = self.made.records if cell.kind is CellKind.TRANSFORM else ()
        if self.made.no_effect is not None:
            reason = self.made.no_effect
            return replace(result, status=Status.NO_EFFECT, reason=reason, records=records)
        if cell.scenario is not None:
            records, kernels = self._timed(cell.scenario)
            return replace(result, records=records, kernels=kernels)
        if cell.task is not None:
            if cell.key in self.refused:
                raise self.refused.pop(cell.key)
            evaluation = self._scorer.score(cell.task)
            # Tasks may be scored in one pass: what was counted is of all text that was scored so far.
            records = (*evaluation.records, *count_records(self.made.model))
            return replace(result, records=records, items=evaluation.items)
        return replace(result, records=records)

    def score_together(self, send: Send) -> dict[str, float]:
        """Answer the requests of all task cells in one pass; what that took for each, in seconds, by key.

        A task that cannot be asked is refused when its cell's turn comes. Where the pass itself fails,
        every cell is scored by itself.
        """
        cells = [cell for cell in self.job.cells if cell.task is not None]
        if not self.job.together or len(cells) < 2 or self.made.no_effect is not None:
            return {}
        send(Phase(cells[0].key, cells=len(cells)))
        seconds = {}
        try:
            for cell in cells:
                assert cell.task is not None
                clock = time.perf_counter()
                try:
                    self._scorer.prepare(cell.task)
                except Exception as error:
                    self.refused[cell.key] = error
                seconds[cell.key] = time.perf_counter() - clock
            clock = time.perf_counter()
            shares = self._scorer.score_prepared()
            pass_s = time.perf_counter() - clock
        except BaseException:  # the border to methods' code
            log.warning("the tasks cannot be scored together, so each is by itself", exc_info=True)
            self.refused.clear()
            self.__dict__.pop("_scorer", None)
            _free_memory()
            return {}
        for cell in cells:
            assert cell.task is not None
            seconds[cell.key] += pass_s * shares.get(cell.task.name, 0.0)
        return seconds

    @cached_property
    def _scorer(self) -> VariantScorer:
        from harness.measure.counting import reset_counters
        from harness.scoring import VariantScorer

        reset_counters(self.made.model)
        return VariantScorer(self.made, self.job, self.plugins)

    def _timed(self, scenario: Scenario) -> tuple[tuple[Record, ...], tuple[KernelUse, ...]]:
        from harness.measure.counting import count_records, reset_counters
        from harness.measure.meter import Measured
        from harness.measure.scenario import measure_scenario

        reset_counters(self.made.model)
        measured = Measured(
            model=self.made.model,
            info=self.made.info,
            scenario=scenario,
            device=self.made.device,
            dtype=self.made.dtype,
            seed=self.job.seed,
            shared={"ceilings": self.job.ceilings},
            baseline=None if self.made.is_baseline else self._original,
            baseline_bytes=self.made.original_bytes,
        )
        records = measure_scenario(measured, self.plugins.meters) + count_records(self.made.model)
        if self.made.effect.simulated:
            records = tuple(_marked_simulated(record) for record in records)
        return records, measured.shared.get("kernels", ())

    def _original(self) -> Any:
        from harness.transforming import load_original

        return load_original(self.job, self.plugins).model

    def observe(self, result: CellResult) -> None:
        _observed(self.plugins.manager, "cell_finished", result=result)


def _marked_simulated(record: Record) -> Record:
    mode = "simulated" if record.mode is None else f"{record.mode}, simulated"
    return replace(record, mode=mode)


def _observed(manager: PluginManager, hook: str, **arguments: Any) -> None:
    """Call an observing hook of each plugin by itself: pluggy would stop at the first that raises."""
    plugins = manager.get_plugins()
    for implementation in reversed(getattr(manager.hook, hook).get_hookimpls()):  # pluggy's order
        observer = manager.subset_hook_caller(hook, plugins - {implementation.plugin})
        try:
            observer(**arguments)
        except (Exception, SystemExit):  # an observer must not decide a cell
            log.exception("the observing plugin %s failed", implementation.plugin_name)


# --- what goes wrong ----------------------------------------------------------------------------------


def _failure(error: BaseException, job: VariantJob, where: str) -> CellResult:
    """The status and the reason for an exception; the traceback is kept for what is not our own."""
    status = _status_of(error)
    expected = isinstance(error, HarnessError)
    text = " ".join(_words_of(error)[: 10 * LONGEST_REASON].split())
    reason = text if expected else f"{type(error).__name__}: {text}".rstrip(": ")
    if status is Status.OOM:
        reason = f"out of memory {where}: {reason}"
    elif isinstance(error, (ValueError, TypeError)) and where.startswith("what"):
        reason = f"{where}: {text}"
    return CellResult(
        key="",
        variant_key=job.variant_key,
        status=status,
        reason=reason[:LONGEST_REASON],
        traceback=None if status is Status.NOT_APPLICABLE else _traceback(error),
    )


def _traceback(error: BaseException) -> str:
    """The traceback, of which every cell of the variant keeps a copy: not the megabytes of a long message."""
    text = "".join(traceback.format_exception(error))
    half = LONGEST_TRACEBACK // 2
    left_out = len(text) - 2 * half
    return text if left_out <= 0 else f"{text[:half]}\n[... {left_out:,} left out ...]\n{text[-half:]}"


def _words_of(error: BaseException) -> str:
    """What an exception says; nothing where it cannot be asked, which is no reason to end the process."""
    try:
        return str(error)
    except Exception:
        return ""


def _place(cell: CellJob, job: VariantJob) -> str:
    """Where a cell ran out of memory: what decides how much it needs."""
    if cell.scenario is not None:
        return f"in {cell.scenario.label} with batch {cell.scenario.batch_size}"
    if cell.task is not None:
        return f"in {cell.task.name} with batch {job.eval_batch_size}"
    return "in the transform cell"


_NO_MEMORY = (
    "can't allocate memory",  # torch's CPU allocator
    "Cannot allocate memory",  # the C library, through Rust and C++ as well
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def _status_of(error: BaseException) -> Status:
    if isinstance(error, NotApplicable):
        return Status.NOT_APPLICABLE
    return Status.OOM if any(map(_says_no_memory, _causes(error))) else Status.FAILED


def _says_no_memory(error: BaseException) -> bool:
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, Exception) and any(words in _words_of(error) for words in _NO_MEMORY)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception, and those that libraries wrapped in it."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


# --- the device after a failure -----------------------------------------------------------------------


def _is_cuda_error(error: BaseException) -> bool:
    """Whether the CUDA context may be lost: after most errors every later call fails as well."""
    return _status_of(error) is not Status.OOM and any(
        "CUDA error" in _words_of(each) for each in _causes(error)
    )


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _context_works() -> bool:
    import torch

    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
