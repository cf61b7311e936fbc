"""The worker of `harness.kernels.tune`: makes a matrix, tries ways to multiply with it, checks, times."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from harness.kernels.candidates import MOST_FUSED_ROWS, WRITINGS, candidates
from harness.kernels.capturing import replay_us
from harness.kernels.selection import WRITING, Launch, Writing
from harness.kernels.stored import StoredMatrix, stored
from harness.nn.codebook import CodebookLinear
from harness.nn.codebook_weight import CodebookWeight, Outliers
from harness.nn.packing import pack_weight
from harness.nn.quantized import QuantizedLinear
from harness.nn.quantizer import quantize_weight

__all__ = ["MOST_ERROR", "SCHEMES", "Part", "Scheme", "Trial", "compile_part", "tune_part", "work"]

MOST_ERROR = 1e-2
"""Relative, against the float32 product: results and unpacked weights are bfloat16."""
ROTATION_BYTES = 256 << 20
"""Copies of a weight are made until they take so much: several times the cache."""

_SAMPLES = 8
_BROKEN_DEVICE = ("CUDA error", "illegal memory access", "misaligned address", "launch failure")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a matrix is stored: on a grid, or (`table`) as places in a table with a share of outliers."""

    bits: int
    group_size: int
    sym: bool = False
    float_zeros: bool = False
    table: bool = False
    outlier_share: float = 0.0

    def make(self, weight: torch.Tensor) -> StoredMatrix:
        """Store a matrix [out, in]; the values of a table and its places are random."""
        if self.table:
            return self._places(weight)
        quantized = quantize_weight(weight, bits=self.bits, group_size=self.group_size, sym=self.sym)
        matrix = stored(pack_weight(quantized))
        if self.float_zeros and matrix.scales is not None:
            free = torch.full(matrix.scales.shape, 2.0 ** (self.bits - 1) + 0.25, dtype=torch.float16)
            matrix = replace(matrix, zeros=free.to(weight.device))
        return matrix

    def empty(self, in_features: int, out_features: int) -> StoredMatrix:
        """The same matrix without values, for the compiler alone."""
        if self.table:
            count = int(self.outlier_share * in_features * out_features)
            layer = CodebookLinear(
                in_features, out_features, bits=self.bits, group_size=self.group_size,
                outliers=count, outlier_dtype=torch.bfloat16, device="meta",
            )  # fmt: skip
            return layer.stored
        packed = QuantizedLinear(
            in_features, out_features, bits=self.bits, group_size=self.group_size, sym=self.sym,
            zero_dtype=torch.float16 if self.float_zeros else torch.uint8,
            scale_dtype=torch.float32 if (self.bits, self.group_size) == (8, -1) else torch.float16,
            device="meta",
        ).packed  # fmt: skip
        return stored(packed)

    def _places(self, weight: torch.Tensor) -> StoredMatrix:
        (out, columns), device = weight.shape, weight.device
        codes = torch.randint(2**self.bits, (out, columns), dtype=torch.uint8, device=device)
        values = torch.linspace(-1, 1, 2**self.bits, device=device)
        scales = kept = None
        if self.group_size != -1:
            scales = torch.rand(columns // self.group_size, out, device=device) + 0.5
        if self.outlier_share:
            count = int(self.outlier_share * weight.numel())
            step = weight.numel() // count
            index = torch.arange(count, device=device) * step + step // 2
            kept = Outliers(index.int(), torch.randn(count, device=device).bfloat16())
        found = CodebookWeight(codes, values, self.bits, columns, scales, self.group_size, kept)
        return CodebookLinear.from_weight(found).stored


SCHEMES = {
    "w4-g128": Scheme(4, 128),
    "w4-g64": Scheme(4, 64),
    "w4-g32": Scheme(4, 32),
    "w4-g64-float-zeros": Scheme(4, 64, float_zeros=True),
    "w4-channel": Scheme(4, -1),
    "w3-g128": Scheme(3, 128),
    "w2-g64": Scheme(2, 64),
    "w8-channel": Scheme(8, -1, sym=True),
    "nf4-g64": Scheme(4, 64, table=True),
    "gobo3": Scheme(3, -1, table=True, outlier_share=1e-3),
}
"""What can be tuned."""


@dataclass(frozen=True, slots=True)
class Part:
    """What a worker does at a time. `seconds`: for all its candidates."""

    scheme: str
    in_features: int
    out_features: int
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Trial:
    """One way to multiply, and how it went.

    Args:
        name: the launch in words, ``dequantize+matmul``, ``bf16``, ``tinygemm``, or ``left out``.
        us: microseconds, the median; None where it failed.
        error: relative error, where it ran.
        failure: why there is no time, in one line.
    """

    part: Part
    name: str
    us: float | None = None
    error: float | None = None
    failure: str | None = None
    launch: dict[str, Any] | None = None


_Way = tuple[str, Launch | None, Callable[[int], torch.Tensor]]
_Timer = Callable[[Callable[[int], torch.Tensor], int], float]


def work(pipe: Connection) -> None:
    """Do parts until the pipe is closed: None to begin with, then every trial, and None after a part.

    A device that no longer works takes the worker with it.
    """
    pipe.send(None)
    while True:
        try:
            part = pipe.recv()
        except EOFError:
            return
        for trial in tune_part(part, torch.device("cuda"), graph_time):
            pipe.send(trial)
            if trial.failure and any(words in trial.failure for words in _BROKEN_DEVICE):
                return
        pipe.send(None)


def compile_part(part: Part, processors: int) -> None:
    """Compile the candidates into Triton's cache, from where the worker takes them."""
    from harness.kernels import triton_weight_only

    matrix = SCHEMES[part.scheme].empty(part.in_features, part.out_features)
    x = torch.empty(part.rows, part.in_features, dtype=torch.bfloat16, device="meta")
    for launch in candidates(matrix.form, part.rows):
        try:
            for call in triton_weight_only.prepare(x, matrix, None, launch, processors):
                call.compile()
        except Exception:  # the worker meets it again and says so
            continue


def tune_part(part: Part, device: torch.device, timer: _Timer) -> Iterator[Trial]:
    """Try bfloat16, what is done for many rows, and then the candidates until the seconds are over."""
    matrix, dense = _matrix(part.scheme, part.in_features, part.out_features, device)
    generator = torch.Generator(device).manual_seed(part.rows)
    x = torch.randn(part.rows, part.in_features, device=device, generator=generator).bfloat16()
    expected = x.float() @ dense.float().T
    copies = [replace(matrix, codes=codes) for codes in _rotation(matrix.codes)]
    weights = _rotation(dense)
    calls = max(len(copies), len(weights))
    start = time.monotonic()
    for name, launch, run in _ways(part, x, copies, weights):
        if launch is not None and time.monotonic() - start > part.seconds:
            return
        yield _tried(part, name, launch, run, expected, calls, timer)


def _ways(
    part: Part, x: torch.Tensor, copies: Sequence[StoredMatrix], weights: Sequence[torch.Tensor]
) -> Iterator[_Way]:
    from harness.kernels import triton_weight_only

    yield "bf16", None, lambda i: x @ weights[i % len(weights)].T
    if part.scheme == "w4-g128" and x.is_cuda:
        yield "tinygemm", None, functools.partial(_tinygemm, x, *weights[0].shape)
    for writing in WRITINGS if part.rows > MOST_FUSED_ROWS // 2 else (WRITING,):

        def written(i: int, writing: Writing = writing) -> torch.Tensor:
            return x @ _dense(copies[i % len(copies)], writing).T

        sizes = f"n={writing.block_n} words={writing.words} warps={writing.warps}"
        yield f"dequantize+matmul {sizes}", None, written
    for launch in candidates(copies[0].form, part.rows):

        def multiplied(i: int, launch: Launch = launch) -> torch.Tensor:
            return triton_weight_only.multiply(x, copies[i % len(copies)], None, launch)

        yield words_of(launch), launch, multiplied


def _tried(
    part: Part,
    name: str,
    launch: Launch | None,
    run: Callable[[int], torch.Tensor],
    expected: torch.Tensor,
    calls: int,
    timer: _Timer,
) -> Trial:
    """Check and time one way; whatever it raises is its failure."""
    us = error = failure = None
    try:
        y = run(0).float()
        error = float((y - expected).norm() / expected.norm())
        # tinygemm has weights of its own: it is timed, not compared.
        if name != "tinygemm" and not error <= MOST_ERROR:
            failure = f"wrong: relative error {error:.2e}"
        else:
            us = timer(run, calls)
    except Exception as problem:
        failure = f"{type(problem).__name__}: {' '.join(str(problem).split())[:160]}"
    return Trial(part, name, us, error, failure, None if launch is None else asdict(launch))


def graph_time(run: Callable[[int], torch.Tensor], calls: int) -> float:
    """Microseconds a call: the median of replays of a graph of `calls` calls."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for i in range(calls):
            run(i)
    graph.replay()
    return statistics.median(replay_us(graph, calls) for _ in range(_SAMPLES))


@functools.lru_cache(maxsize=1)
def _matrix(
    scheme: str, in_features: int, out_features: int, device: torch.device
) -> tuple[StoredMatrix, torch.Tensor]:
    """A stored matrix and its bfloat16 values in plain torch, kept from part to part."""
    generator = torch.Generator(device).manual_seed(0)
    size = (out_features, in_features)
    weight = torch.randn(size, device=device, generator=generator) / in_features**0.5
    matrix = SCHEMES[scheme].make(weight)
    return matrix, _reference(matrix)


def _reference(matrix: StoredMatrix) -> torch.Tensor:
    from harness.kernels import reference

    return reference.stored_matrix(matrix).bfloat16()


def _dense(matrix: StoredMatrix, writing: Writing) -> torch.Tensor:
    from harness.kernels import table

    return table.write(matrix, torch.bfloat16, writing)


def _rotation(tensor: torch.Tensor) -> list[torch.Tensor]:
    held = tensor.numel() * tensor.element_size()
    wanted = -(-ROTATION_BYTES // held) if tensor.is_cuda else 1
    return [tensor, *(tensor.clone() for _ in range(wanted))]


@functools.lru_cache(maxsize=1)
def _for_tinygemm(out: int, columns: int, device: torch.device) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Packed random codes, several times, and their scales and zero points in groups of 128."""
    codes = torch.randint(256, (out, columns // 2), dtype=torch.uint8, device=device)
    packed = _rotation(torch.ops.aten._convert_weight_to_int4pack(codes, 8))
    return packed, torch.ones(columns // 128, out, 2, dtype=torch.bfloat16, device=device)


def _tinygemm(x: torch.Tensor, out: int, columns: int, i: int) -> torch.Tensor:
    """PyTorch's 4-bit product, on weights of its own."""
    packed, scales = _for_tinygemm(out, columns, x.device)
    y: torch.Tensor = torch.ops.aten._weight_int4pack_mm(x, packed[i % len(packed)], 128, scales)
    return y


def words_of(launch: Launch) -> str:
    """A launch in one line."""
    is_gemv = launch.kernel == "gemv"
    sizes = [f"n={launch.block_n}"] if is_gemv else [f"n={launch.block_n}", f"m={launch.block_m}"]
    sizes += [f"words={launch.words}", f"programs={launch.programs}", f"warps={launch.warps}"]
    if not is_gemv:
        sizes += [f"stages={launch.stages}", "sums" if launch.sums else "weights"]
    return " ".join([launch.kernel, *sizes])
