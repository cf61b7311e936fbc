"""Time the launches of the 8-bit kernels on a CUDA device: ``python -m harness.kernels.tune_int8``.

Each case is a part (a kernel), a number of rows and a shape. For each, a bounded list of launches runs: every
result is compared with plain torch before it is timed, what does not compile or is wrong is reported and left
out, and a case stops at its share of time. The table says what was fastest, what runs by default
(`harness.kernels.int8_launches`, whose constants this decides), and both beside bfloat16 and the libraries.

Times are those of `harness.kernels.bench`: a CUDA graph over copies of the weights that no cache holds,
rounding of the activations included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from harness.errors import ConfigError, HarnessError
from harness.kernels.capturing import no_waiting, replay_us
from harness.kernels.int8_launches import Launch

__all__ = ["Candidate", "Case", "Result", "launches", "main", "packed_launches", "run_case", "summary"]

Call = Callable[[int], torch.Tensor]
"""A run of the kernel with copy `i` of the weights."""
Clock = Callable[[Call, float], float]
"""Microseconds of a call, found in about so many seconds."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run a case.

    Args:
        kind: ``ours``, ``default`` (what runs unless told otherwise), ``bf16`` or ``peer``.
        tolerance: the relative error that is allowed; 0: the very bits.
        checked: False where the result is another one by its nature (the integer product alone).
    """

    label: str
    kind: str
    call: Call
    launch: Launch | None = None
    tolerance: float = 0.0
    checked: bool = True


@dataclass(frozen=True, slots=True)
class Case:
    """What is timed: candidates that all compute `expected`."""

    part: str
    rows: int
    in_features: int
    out_features: int
    expected: torch.Tensor
    candidates: Sequence[Candidate]


@dataclass(frozen=True, slots=True)
class Result:
    """One candidate: its median in microseconds, or what was wrong with it."""

    part: str
    rows: int
    in_features: int
    out_features: int
    label: str
    kind: str
    us: float | None
    problem: str = ""
    launch: Launch | None = None


def launches(rows: int, columns: int) -> list[Launch]:
    """The launches of a W8A8 product that are worth a try at so many rows, the likeliest first."""
    if rows == 1:
        found = [
            Launch("gemv", 1, n, k, warps, 1)
            for n, k, warps in (
                (8, 2048, 8), (4, 4096, 8), (8, 1024, 4), (16, 1024, 8), (4, 2048, 4), (16, 2048, 8),
                (8, 4096, 8), (4, 1024, 4), (2, 4096, 4), (16, 1024, 4), (32, 1024, 8),
            )
        ]  # fmt: skip
        return found if columns % 16 == 0 else []
    few = min(64, max(16, 1 << (rows - 1).bit_length()))
    if rows <= 64:
        return [
            Launch("dot", few, n, k, warps, stages, split=split)
            for n, k, warps, stages, split in (
                (32, 256, 4, 5, 1), (64, 256, 4, 4, 1), (64, 128, 4, 5, 1), (32, 128, 4, 6, 1),
                (32, 512, 4, 3, 1), (64, 256, 4, 4, 2), (32, 256, 2, 5, 1), (64, 128, 4, 5, 4),
                (128, 128, 4, 4, 1), (128, 128, 8, 4, 2),
            )
        ]  # fmt: skip
    found = [
        Launch(kind, m, n, k, warps, stages, split=split, group=group)  # type: ignore[arg-type]
        for kind, m, n, k, warps, stages, split, group in (
            ("dot", 128, 256, 128, 8, 3, 1, 8), ("tma", 128, 256, 128, 8, 3, 1, 8),
            ("tma", 128, 256, 128, 8, 4, 1, 8), ("dot", 128, 128, 128, 8, 3, 1, 8),
            ("tma", 128, 128, 128, 4, 4, 1, 8), ("tma", 128, 128, 128, 8, 4, 1, 8),
            ("tma", 128, 256, 64, 8, 4, 1, 8), ("tma", 128, 256, 128, 8, 3, 1, 16),
            ("dot", 128, 256, 128, 8, 4, 1, 8), ("dot", 128, 256, 64, 8, 4, 1, 8),
            ("dot", 128, 128, 128, 4, 4, 1, 8), ("dot", 64, 128, 128, 4, 4, 1, 8),
            ("dot", 64, 64, 128, 4, 4, 1, 8), ("dot", 256, 128, 128, 8, 3, 1, 8),
            ("dot", 64, 256, 128, 8, 3, 1, 8), ("tma", 256, 128, 128, 8, 3, 1, 8),
        )
    ]  # fmt: skip
    if rows <= 512:
        found[:0] = [
            Launch("dot", 64, 64, 128, 4, 4),
            Launch("dot", 64, 128, 128, 4, 4),
            Launch("dot", 64, 64, 128, 4, 4, split=2),
            Launch("dot", 128, 128, 128, 8, 3, split=2),
            Launch("dot", 128, 128, 128, 8, 3, split=4),
            Launch("dot", 64, 64, 256, 4, 3),
        ]
    return [launch for launch in dict.fromkeys(found) if launch.kind != "tma" or columns % 16 == 0]


def packed_launches(rows: int) -> list[Launch]:
    """The launches of a product with packed weights that are worth a try; none beyond some hundred rows."""
    if rows == 1:
        return [
            Launch("gemv", 1, n, k, warps, 1)
            for n, k, warps in (
                (32, 1024, 4), (16, 1024, 4), (64, 1024, 8), (16, 2048, 4), (32, 512, 4), (8, 2048, 4),
                (64, 512, 4), (16, 512, 2),
            )
        ]  # fmt: skip
    if rows > 256:
        return []
    m = min(64, max(16, 1 << (rows - 1).bit_length()))
    return [
        Launch("dot", m, n, 256, warps, stages)
        for n, warps, stages in (
            (64, 4, 3), (32, 4, 4), (64, 4, 4), (128, 4, 3), (32, 2, 4), (64, 8, 3), (64, 4, 2),
        )
    ]  # fmt: skip


def run_case(case: Case, clock: Clock, seconds: float) -> Iterator[Result]:
    """Check and time the candidates of a case in their order, for about so many seconds.

    What comes after that is reported as not tried. Yields each result as it is known.
    """
    start = time.monotonic()
    about = Result(case.part, case.rows, case.in_features, case.out_features, "", "", None)
    share = min(0.2, seconds / max(1, 3 * len(case.candidates)))
    for candidate in case.candidates:
        result = replace(about, label=candidate.label, kind=candidate.kind, launch=candidate.launch)
        if time.monotonic() - start > seconds:
            yield replace(result, problem="not tried: out of time")
            continue
        try:
            problem = _problem(candidate, case.expected)
            us = None if problem else clock(candidate.call, share)
        except _failures() as error:
            first_line = str(error).partition("\n")[0]
            problem, us = f"{type(error).__name__}: {first_line[:120]}", None
        yield replace(result, us=us, problem=problem)


def _failures() -> tuple[type[Exception], ...]:
    """What a launch that does not fit this device or compiler raises."""
    known: tuple[type[Exception], ...] = (
        AssertionError, AttributeError, HarnessError, KeyError, NotImplementedError, RuntimeError, TypeError,
        ValueError,
    )  # fmt: skip
    try:
        from triton.errors import TritonError
    except ImportError:
        return known
    return (*known, TritonError)


def _problem(candidate: Candidate, expected: torch.Tensor) -> str:
    y = candidate.call(0)
    if not candidate.checked:
        return ""
    if y.shape != expected.shape:
        return f"wrong: shape {tuple(y.shape)}"
    if candidate.tolerance == 0:
        different = int((y.float() != expected.float()).sum())
        return f"wrong: {different} of {y.numel()} values" if different else ""
    error = float((y.float() - expected.float()).norm() / expected.float().norm())
    return "" if error <= candidate.tolerance else f"wrong: relative error {error:.2e}"


def summary(results: Sequence[Result]) -> list[str]:
    """A table, one line a case: the default, the best of ours and the best peer, beside bfloat16."""
    lines = [
        f"{'part':9} {'rows':>5} {'in':>6} {'out':>6} {'bf16':>8} {'default':>16} {'best':>16}  "
        "launch | best peer"
    ]
    for key in dict.fromkeys(_case_of(each) for each in results):
        mine = [each for each in results if _case_of(each) == key]
        fastest = {
            kind: min((each for each in mine if each.kind == kind and each.us), key=_us, default=None)
            for kind in ("bf16", "default", "ours", "peer")
        }
        dense = fastest["bf16"]

        def figure(result: Result | None, dense: Result | None = dense) -> str:
            if result is None or result.us is None:
                return "-"
            ratio = f" ({dense.us / result.us:.2f}x)" if dense is not None and dense.us else ""
            return f"{result.us:.1f}{ratio}"

        best, peer = fastest["ours"], fastest["peer"]
        bf16 = "-" if dense is None or dense.us is None else f"{dense.us:.1f}"
        part, rows, in_features, out_features = key
        lines.append(
            f"{part:9} {rows:5} {in_features:6} {out_features:6} {bf16:>8} {figure(fastest['default']):>16} "
            f"{figure(best):>16}  {'-' if best is None else best.label} | "
            f"{'-' if peer is None else f'{peer.label} {figure(peer)}'}"
        )
        failed = [each for each in mine if each.problem]
        lines += [f"{'':9} {each.label}: {each.problem}" for each in failed if each.problem[:3] != "not"]
        if untried := sum(each.problem[:3] == "not" for each in failed):
            lines.append(f"{'':9} {untried} not tried")
    return lines


def _case_of(result: Result) -> tuple[str, int, int, int]:
    return result.part, result.rows, result.in_features, result.out_features


def _us(result: Result) -> float:
    return float("inf") if result.us is None else result.us


def cuda_clock(copies: int) -> Clock:
    """A clock that replays a CUDA graph of one call for each of `copies` copies of the weights."""

    def clock(call: Call, seconds: float) -> float:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call(0)
            with no_waiting():
                call(0)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for copy in range(copies):
                call(copy)
        graph.replay()
        samples: list[float] = []
        until = time.monotonic() + seconds
        while len(samples) < 5 or (time.monotonic() < until and len(samples) < 100):
            samples.append(replay_us(graph, copies))
        return statistics.median(samples)

    return clock


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cases, print the table as it grows and write every result as JSON."""
    from harness.kernels import _int8_cases as cases

    parser = argparse.ArgumentParser(prog="python -m harness.kernels.tune_int8", description=__doc__)
    parser.add_argument("--parts", default=",".join(cases.PARTS), help="comma-separated, of: %(default)s")
    parser.add_argument("--rows", default="8192,1,16,32,64,128,512,2048", help="comma-separated")
    parser.add_argument("--shapes", default="4096x11008,11008x4096", help="IN x OUT, comma-separated")
    parser.add_argument("--bits", type=int, default=4, help="of the packed weights (part w4a8)")
    parser.add_argument("--seconds-per-shape", type=float, default=20.0, help="of one case")
    parser.add_argument("--seconds", type=float, default=440.0, help="of all; later cases are left out")
    parser.add_argument("--json", type=Path, default=Path("tune_int8.json"), help="where results are written")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts.split(",")) - set(cases.PARTS):
        raise ConfigError(f"unknown parts {sorted(unknown)}; known: {', '.join(cases.PARTS)}")
    rows = [int(each) for each in options.rows.split(",")]
    shapes = [tuple(int(size) for size in each.split("x")) for each in options.shapes.split(",")]
    if not torch.cuda.is_available():
        raise SystemExit("tuning needs a CUDA device")
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "options": vars(options)}
    print(f"{about['device']}, torch {torch.__version__}; microseconds (speed-up over bf16)", flush=True)
    results: list[Result] = []
    start = time.monotonic()
    planned = [
        (part, count, *shape) for part in options.parts.split(",") for count in rows for shape in shapes
    ]
    for place, (part, count, in_features, out_features) in enumerate(planned):
        if time.monotonic() - start > options.seconds:
            print(f"{len(planned) - place} cases left out: out of time")
            break
        with torch.inference_mode():
            case, copies = cases.PARTS[part](count, in_features, out_features, options.bits)
            found = list(run_case(case, cuda_clock(copies), options.seconds_per_shape))
        results += found
        print("\n".join(summary(found)[0 if len(results) == len(found) else 1 :]), flush=True)
        written = [{**asdict(each), "launch": each.launch and asdict(each.launch)} for each in results]
        options.json.write_text(json.dumps({**about, "results": written}, indent=1, default=str))
        del case
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:  # a kernel has broken the device's context: nothing after it counts
            raise SystemExit(f"stopped after {part} at {count} rows: {error}") from error
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
