"""Time the quantized and sparse linear layers beside bfloat16 and the libraries' own kernels.

``python -m harness.kernels.bench`` prints a block for each shape and, at the end, where a peer (PyTorch's own
kernels or torchao's) is ahead of ours.

One CUDA graph runs a layer over enough copies of its weight that together they exceed the cache
several times over (a single copy would stay in it and look too fast); the time of a replay divided by
the copies is the time of one layer, launch gaps included and host overhead excluded. Before timing,
each layer is compared with the plain-torch form of the same numbers; those whose numbers only a library can
read, with the product of the weights that they were made of, pruned or rounded in the same way.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import functools
import gc
import importlib.metadata
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.errors import ConfigError, HarnessError, NotApplicable
from harness.kernels import bench_layers
from harness.kernels.bench_layers import SCHEMES, one_line, parse_schemes
from harness.kernels.capturing import NotCaptured, no_waiting, replay_us

__all__ = ["SCHEMES", "SHAPES", "Case", "Comparison", "Shape", "Timing", "main", "time_linear"]

Shape = tuple[int, int, int]
"""(rows, in, out)"""

SHAPES: tuple[Shape, ...] = (
    (1, 4096, 4096), (1, 4096, 11008), (1, 11008, 4096), (2, 4096, 11008), (8, 4096, 11008),
    (16, 4096, 4096), (16, 4096, 11008), (32, 4096, 11008), (64, 4096, 11008), (128, 4096, 11008),
    (512, 4096, 4096), (512, 4096, 11008), (2048, 4096, 11008), (2048, 11008, 4096),
    (8192, 4096, 11008), (8192, 11008, 4096),
)  # fmt: skip
"""Of Llama-7B's projections."""

LEFT_OUT = "left out: the time was over"
COLUMNS = ("scheme", "rows", "in", "out", "median_us", "p10_us", "p90_us", "speed_up", "kernel", "peer_of")
"""Of the comma-separated table."""

_MIN_ROTATION_BYTES = 256 << 20
_REPLAYS = 30


@dataclass(frozen=True, slots=True)
class Timing:
    """One layer: microseconds per call (median, 10th and 90th percentile) and its kernel."""

    median_us: float
    low_us: float
    high_us: float
    kernel: str


@dataclass(frozen=True, slots=True)
class Case:
    """A scheme at a shape: its timing, or the problem, one line. `failed`: it should have run here."""

    scheme: str
    shape: Shape
    timing: Timing | None = None
    problem: str | None = None
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Comparison:
    """A peer beside the scheme of ours that it is measured against, in microseconds."""

    peer: str
    ours: str
    shape: Shape
    peer_us: float
    ours_us: float

    @property
    def ratio(self) -> float:
        """The peer's time over ours: below 1 the peer is ahead."""
        return self.peer_us / self.ours_us


class DeviceLost(HarnessError):
    """The device no longer works in this process: nothing that comes after could be timed."""


def parse_shapes(shapes: str, rows: str = "") -> list[Shape]:
    """The shapes of ``ROWSxINxOUT,...``, by default `SHAPES`; with `rows` only those of so many rows.

    Raises:
        ConfigError: what is no shape or no number, and where none is left.
    """
    try:
        wanted = {int(each) for each in rows.split(",") if each.strip()}
        found = [tuple(map(int, each.split("x"))) for each in shapes.split(",") if each.strip()] or SHAPES
        chosen = [(m, k, n) for m, k, n in found if m in wanted or not wanted]
    except ValueError:
        raise ConfigError(f"shapes are ROWSxINxOUT and rows numbers, not {shapes!r}, {rows!r}") from None
    if not chosen or min(map(min, chosen)) < 1:
        raise ConfigError(f"no shape is left, or one has a size below 1: {shapes!r}, rows {rows!r}")
    return chosen


def times_of(cases: Iterable[Case]) -> dict[tuple[str, Shape], float]:
    """Microseconds of every case that has them."""
    return {(case.scheme, case.shape): case.timing.median_us for case in cases if case.timing}


def comparisons(cases: Iterable[Case]) -> list[Comparison]:
    """Every peer that has a time beside its counterpart's at the same shape."""
    times = times_of(cases)
    return [
        Comparison(scheme, ours, shape, us, times[ours, shape])
        for (scheme, shape), us in times.items()
        if (ours := SCHEMES[scheme].peer_of) and (ours, shape) in times
    ]


def text_line(case: Case, dense_us: float | None, ours_us: float | None) -> str:
    """Scheme, microseconds, speed-up over bfloat16, kernel and, after a peer, the ratio; or the problem."""
    if case.timing is None:
        return f"{case.scheme:33} {case.problem}"
    speed_up = f" ({dense_us / case.timing.median_us:.2f}x)" if dense_us and case.scheme != "bf16" else ""
    line = f"{case.scheme:33} {case.timing.median_us:9.1f}{speed_up:8}  {case.timing.kernel}"
    scheme = SCHEMES[case.scheme]
    if scheme.peer_of and ours_us:
        line += f"; {case.timing.median_us / ours_us:.2f} of the time of {scheme.peer_of}"
    return line + (f" (without {scheme.lacks})" if scheme.lacks else "")


def record(case: Case, dense_us: float | None) -> dict[str, Any]:
    """A case as it is written: `COLUMNS` and `problem`; None for what there is not."""
    timing = case.timing
    sizes = dict(zip(("rows", "in", "out"), case.shape, strict=True))
    return {
        "scheme": case.scheme,
        **sizes,
        "median_us": timing and timing.median_us,
        "p10_us": timing and timing.low_us,
        "p90_us": timing and timing.high_us,
        "speed_up": dense_us / timing.median_us if timing and dense_us else None,
        "kernel": timing and timing.kernel,
        "peer_of": SCHEMES[case.scheme].peer_of,
        "problem": case.problem,
    }


def csv_line(written: dict[str, Any]) -> str:
    """`COLUMNS` of a record, quoted where a kernel's name has a comma; nothing for None."""
    cells = [written[name] for name in COLUMNS]
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(f"{x:.2f}" if isinstance(x, float) else x for x in cells)
    return text.getvalue()


def summary(cases: Sequence[Case]) -> list[str]:
    """Lines for the end: what was left out, what of ours failed, and where a peer is ahead."""
    lines = [f"Failed: {case.scheme} at {case.shape}: {case.problem}" for case in failures(cases)]
    left_out = [case for case in cases if case.problem == LEFT_OUT]
    for shape in dict.fromkeys(case.shape for case in left_out):
        lines.append(f"{LEFT_OUT}: {shape} {', '.join(c.scheme for c in left_out if c.shape == shape)}")
    found = comparisons(cases)
    ahead = sorted((each for each in found if each.ratio < 1), key=lambda each: each.ratio)
    if not found:
        return [*lines, "No peer was compared with ours."]
    if not ahead:
        return [*lines, f"A peer is ahead of ours: in none of {len(found)} comparisons."]
    lines.append(f"A peer is ahead of ours in {len(ahead)} of {len(found)} comparisons (microseconds):")
    for each in ahead:
        lacks = SCHEMES[each.peer].lacks
        lines.append(
            f"  {each.peer:33} {each.shape!s:20} {each.peer_us:9.1f}, {each.ours} {each.ours_us:.1f}, "
            f"ratio {each.ratio:.2f}" + (f" (without {lacks})" if lacks else "")
        )
    return lines


def failures(cases: Iterable[Case]) -> list[Case]:
    """Those of ours, bfloat16 among them, that should have run and did not."""
    return [case for case in cases if case.failed and SCHEMES[case.scheme].peer_of is None]


def time_linear(scheme: str, rows: int, in_features: int, out_features: int, device: torch.device) -> Timing:
    """Time one scheme at one shape on a CUDA device.

    Raises:
        NumericalFailure: the layer's result is not that of the weights it stores.
        NotApplicable: the device has no kernel for it.
        NotCaptured: it waits for the device, or its capture failed.
    """
    chosen = SCHEMES[scheme]
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(out_features, in_features, device=device, generator=generator) / in_features**0.5
    with torch.no_grad():
        layer = chosen.make(weight)
        dense = chosen.reference(layer, weight)
        del weight
        x = bench_layers.make_input(chosen, rows, in_features, device, generator)
        bench_layers.check(scheme, layer, x, dense)
        del dense
        more = -(-_MIN_ROTATION_BYTES // bench_layers.held_bytes(layer))
        copies = [layer, *(copy.deepcopy(layer) for _ in range(more))]
        inputs = bench_layers.arguments(layer, x)
        graph = _capture(copies, inputs, guarded=chosen.peer_of is not None)
    samples = _replay(graph, len(copies))
    low, *_, high = statistics.quantiles(samples, n=10)
    kernel = "cuBLAS" if isinstance(layer, nn.Linear) else layer.kernel_for(rows, x.dtype)  # type: ignore[operator]
    return Timing(statistics.median(samples), low, high, kernel)


def _capture(
    layers: Sequence[nn.Module], inputs: tuple[torch.Tensor, ...], *, guarded: bool
) -> torch.cuda.CUDAGraph:
    """A graph of one call of each layer.

    Args:
        guarded: refuse beforehand what would make the capture fail by waiting for the device.
    """
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):  # compiles kernels and fills the library's work space
        for layer in layers:
            layer(*inputs)
        if guarded:
            with no_waiting():
                layers[0](*inputs)
    before.wait_stream(stream)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            for layer in layers:
                layer(*inputs)
    except Exception as error:
        # What the context manager leaves when the end of the capture fails as well.
        torch.cuda.set_stream(before)
        with contextlib.suppress(Exception):  # the allocator may have ended it already
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise NotCaptured(f"not captured: {one_line(error.__context__ or error)}") from error
    return graph


def _replay(graph: torch.cuda.CUDAGraph, calls: int) -> list[float]:
    """Microseconds per call, one number per replay."""
    for _ in range(3):
        graph.replay()
    return [replay_us(graph, calls) for _ in range(_REPLAYS)]


def measured(scheme: str, shape: Shape, device: torch.device) -> Case:
    """One case, whatever happens in it.

    Raises:
        DeviceLost: the device no longer works.
    """
    try:
        return Case(scheme, shape, time_linear(scheme, *shape, device))
    except Exception as error:
        case = Case(scheme, shape, None, one_line(error), not isinstance(error, NotApplicable))
    # Outside the handler: what the error's frames held is free by now, once cycles are collected.
    gc.collect()
    if not _works(device):
        raise DeviceLost(f"the device no longer works after {scheme} at {shape}: {case.problem}")
    return case


def _works(device: torch.device) -> bool:
    for _ in range(2):  # the first may still report what failed before
        try:
            torch.cuda.synchronize(device)
            if float(torch.ones(8, device=device).sum()) == 8:
                torch.cuda.empty_cache()
                return True
        except Exception:
            continue
    return False


def run(
    shapes: Iterable[Shape], schemes: Sequence[str], measure: Callable[[str, Shape], Case], seconds: float
) -> Iterator[Case]:
    """Every scheme at every shape, bfloat16 first; once the seconds are over the rest are `LEFT_OUT`."""
    start = time.monotonic()
    for shape in shapes:
        for scheme in dict.fromkeys(("bf16", *schemes)):
            is_over = time.monotonic() - start >= seconds
            yield Case(scheme, shape, problem=LEFT_OUT) if is_over else measure(scheme, shape)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a block for each shape and what peers are ahead; exits with 1 where one of ours failed."""
    parser = argparse.ArgumentParser(prog="python -m harness.kernels.bench", description=__doc__)
    parser.add_argument("--schemes", default="", help=f"comma-separated, of: {', '.join(SCHEMES)}")
    parser.add_argument("--compile", action="store_true", help="torchao's layers under torch.compile as well")
    parser.add_argument("--shapes", default="", help="comma-separated ROWSxINxOUT instead of Llama-7B's")
    parser.add_argument("--rows", default="", help="only shapes with these numbers of rows")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so many")
    parser.add_argument("--csv", action="store_true", help="print comma-separated values with percentiles")
    parser.add_argument("--json", type=Path, help="a file for every timing, rewritten after each")
    options = parser.parse_args(arguments)
    try:
        schemes = parse_schemes(options.schemes, with_compiled=options.compile)
        shapes = parse_shapes(options.shapes, options.rows)
    except ConfigError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        raise SystemExit("the benchmark needs a CUDA device")
    cases: list[Case] = []
    problem, measure = "", functools.partial(measured, device=torch.device("cuda"))
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    facts |= {name: _version(name) for name in ("triton", "torchao")}
    print(", ".join(f"{name} {version}" for name, version in facts.items()))
    print(",".join(COLUMNS) if options.csv else "microseconds (speed-up over bf16)", flush=True)
    if options.json:
        _write(options.json, facts, cases)  # a place that cannot be written to is known at once
    try:
        for case in run(shapes, schemes, measure, options.seconds):
            cases.append(case)
            if options.json:
                _write(options.json, facts, cases)
            _show(case, times_of(cases), as_csv=options.csv, is_wanted=case.scheme in schemes)
    except DeviceLost as error:
        problem = str(error)
    print("\n".join(["", *summary(cases)]), file=sys.stderr if options.csv else sys.stdout, flush=True)
    if problem or failures(cases):
        raise SystemExit(problem or 1)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _show(case: Case, times: dict[tuple[str, Shape], float], *, as_csv: bool, is_wanted: bool) -> None:
    dense_us = times.get(("bf16", case.shape))
    if case.problem == LEFT_OUT:
        return  # the summary has them
    if as_csv and case.timing is None:
        print(f"{case.scheme} at {case.shape}: {case.problem}", file=sys.stderr, flush=True)
    elif as_csv and is_wanted:
        print(csv_line(record(case, dense_us)), flush=True)
    elif not as_csv:
        head = str(case.shape) if case.scheme == "bf16" else ""
        ours_us = times.get((SCHEMES[case.scheme].peer_of or "", case.shape))
        print(f"{head:20} {text_line(case, dense_us, ours_us)}", flush=True)


def _write(path: Path, facts: dict[str, str], cases: Sequence[Case]) -> None:
    times = times_of(cases)
    records = [record(case, times.get(("bf16", case.shape))) for case in cases]
    part = path.with_name(path.name + ".part")  # replaced at once: whoever reads it finds a whole file
    part.write_text(json.dumps({**facts, "cases": records}, indent=1) + "\n")
    part.replace(path)


if __name__ == "__main__":
    main()
