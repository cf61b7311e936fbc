"""What a running sweep shows: a live display in a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import IO, TYPE_CHECKING, Any, Self, cast

from harness.cli.output import clean, format_value
from harness.records import CellKind, CellResult, Status

if TYPE_CHECKING:
    from types import TracebackType

    from harness.grid import CellPlan, VariantPlan
    from harness.job import Progress
    from harness.planning import SweepPlan

__all__ = ["LiveReporter", "PlainReporter", "QuietReporter", "highlights", "make_reporter"]

_SHOWN = {
    CellKind.TRANSFORM: ("weight_bytes", "transform_s"),
    CellKind.SCENARIO: ("prefill_latency", "decode_latency"),
    CellKind.TASK: ("token_perplexity", "bits_per_byte", "acc", "spearman", "mean_kl"),
}


def highlights(cell: CellPlan, result: CellResult) -> str:
    """The few numbers of a cell that say most, or the reason where there are none."""
    if result.status is not Status.OK:
        return clean(result.reason or "")
    by_name = {record.metric: record for record in result.records}
    shown = [by_name[name] for name in _SHOWN[cell.kind] if name in by_name]
    shown = shown or list(result.records[:2])
    return clean("  ".join(f"{r.metric} {format_value(r.value)} {r.unit}".strip() for r in shown))


class QuietReporter:
    """Says nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None: ...
    def started(self, plan: SweepPlan, reused: int) -> None: ...
    def phase(self, variant: VariantPlan, cell: CellPlan | None) -> None: ...
    def progress(self, variant: VariantPlan, progress: Progress) -> None: ...
    def finished(self, variant: VariantPlan, cell: CellPlan, result: CellResult) -> None: ...


class PlainReporter(QuietReporter):
    """One line a cell, for logs and pipes."""

    def __init__(self) -> None:
        self._done = self._total = 0

    def started(self, plan: SweepPlan, reused: int) -> None:
        self._total, self._done = len(plan.grid.cells), reused
        known = f", {reused} of them already measured" if reused else ""
        self._say(f"{len(plan.grid.variants)} variants, {self._total} cells{known}, on {plan.device_name}")

    def finished(self, variant: VariantPlan, cell: CellPlan, result: CellResult) -> None:
        self._done += 1
        self._say(
            f"[{self._done}/{self._total}] {variant.label} · {cell.label}: "
            f"{result.status}  {highlights(cell, result)}".rstrip()
        )

    def _say(self, line: str) -> None:
        # Whoever was reading may be gone (a closed terminal, `2>&1 | head`): the sweep goes on.
        with contextlib.suppress(OSError, ValueError):
            print(clean(line), file=sys.stderr, flush=True)


class LiveReporter(QuietReporter):
    """A progress bar with what runs now, the estimated time left and the last numbers."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self._console = console
        self._bar = RichProgress(
            TextColumn("{task.fields[what]}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, what="", left="")
        self._started = time.monotonic()
        self._measured = 0

    def started(self, plan: SweepPlan, reused: int) -> None:
        self._bar.start()
        self._started = time.monotonic()
        self._bar.update(self._task, total=len(plan.grid.cells), completed=reused, what="starting", left="")

    def phase(self, variant: VariantPlan, cell: CellPlan | None) -> None:
        label = "transform" if cell is None else cell.label
        self._bar.update(self._task, what=clean(f"{variant.label} · {label}"))

    def progress(self, variant: VariantPlan, progress: Progress) -> None:
        what = f"{variant.label} · {progress.what} {progress.done}/{progress.total}"
        self._bar.update(self._task, what=clean(what))

    def finished(self, variant: VariantPlan, cell: CellPlan, result: CellResult) -> None:
        from rich.text import Text

        self._measured += 1
        self._bar.advance(self._task)
        task = self._bar.tasks[0]
        remaining = (task.total or 0) - task.completed
        pace = (time.monotonic() - self._started) / self._measured
        self._bar.update(self._task, left=f"about {_duration(remaining * pace)} left")
        style = "green" if result.status is Status.OK else "yellow"
        style = "red" if result.status.is_failure else style
        line = Text(f"{result.status:<14} ", style=style)
        line.append(clean(f"{variant.label} · {cell.label}  "))
        line.append(highlights(cell, result), style="dim")
        self._console.print(line)

    def close(self) -> None:
        self._bar.stop()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"


def make_reporter(*, quiet: bool) -> QuietReporter:
    """The reporter that fits where standard error goes."""
    if quiet:
        return QuietReporter()
    if not sys.stderr.isatty():
        return PlainReporter()
    from rich.console import Console

    return LiveReporter(Console(stderr=True, file=cast("IO[str]", _Unheard(sys.stderr))))


class _Unheard:
    """A terminal that may be closed while it is written to: the sweep goes on, as with plain lines."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
