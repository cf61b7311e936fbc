"""The choice of a kernel for 2:4 weights, and which of its algorithms runs.

On CUDA cuSPARSELt multiplies the compressed matrix on sparse tensor cores, through torch's operators; a few
rows are multiplied by a kernel that reads the library's form (`harness.kernels.sparse_rows`). The library has
some tens of algorithms for a product and no good guess which is the fastest: `tune` times them once for each
shape, outside a capture, and remembers the choice for the process. Elsewhere the weight is decompressed,
which is exact, and multiplied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from harness.kernels import sparse_rows
from harness.kernels.capturing import replay_us
from harness.kernels.constants import constant_when_compiled
from harness.kernels.weight_only import has_triton

__all__ = [
    "ALIGNMENT",
    "FALLBACK",
    "Algorithm",
    "algorithm_for",
    "apply_scales",
    "choose",
    "compress",
    "decompress",
    "fastest",
    "forget_algorithms",
    "is_available",
    "linear",
    "linear_8_bit",
    "name_of",
    "product",
    "product_8_bit",
    "reads_rows",
    "tune",
]

FALLBACK = "decompress+matmul"
KERNEL = "cusparselt 2:4"
ALIGNMENT = {torch.bfloat16: 16, torch.float16: 16, torch.int8: 32, torch.float8_e4m3fn: 32}
"""What both sizes of a compressed matrix must be divisible by."""

_ROWS = {torch.bfloat16: 8, torch.float16: 8, torch.int8: 16, torch.float8_e4m3fn: 16}
_OLDEST = (8, 0)  # compute capability; 8.9 for float8
_MOST_TUNED = 32  # numbers of rows for a matrix: a search takes tens of milliseconds
_UNIT_ROWS = 1024
_MOST_ALGORITHMS = 64  # the library of torch 2.11 has 21 for a product of 16 bits
_TIMED_CALLS, _TIMINGS = 4, 4


@dataclass(frozen=True, slots=True)
class Algorithm:
    """What cuSPARSELt runs: its number, and into how many parts the sum is split and how."""

    number: int = 0
    split_k: int = 1
    split_k_mode: int = -1


@dataclass(frozen=True, slots=True)
class _Problem:
    device: int | None
    dtype: torch.dtype
    out_features: int
    in_features: int
    has_bias: bool
    out_dtype: torch.dtype | None


_tuned: dict[_Problem, dict[int, Algorithm]] = {}  # by the rows


def forget_algorithms() -> None:
    """Tune anew from here on."""
    _tuned.clear()


@constant_when_compiled
def choose(device: torch.device, dtype: torch.dtype) -> str:
    """The name of the kernel that `linear` runs on this device for weights and activations of this type and
    any number of rows."""
    return KERNEL if dtype in (torch.bfloat16, torch.float16) and is_available(device, dtype) else FALLBACK


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether cuSPARSELt multiplies 2:4 matrices of this type on this device."""
    if device.type != "cuda" or dtype not in ALIGNMENT or not torch.backends.cusparselt.is_available():
        return False
    oldest = (8, 9) if dtype == torch.float8_e4m3fn else _OLDEST
    return torch.cuda.get_device_capability(device) >= oldest


def compress(weight: torch.Tensor) -> torch.Tensor:
    """cuSPARSELt's own form of a 2:4 matrix [out, in]: values and metadata in one tensor of its type."""
    return torch._cslt_compress(weight.contiguous())


def decompress(packed: torch.Tensor, out_features: int, in_features: int) -> torch.Tensor:
    """The matrix [out, in] again, in its type.

    How the library lays out the metadata is its own affair, so it is asked: the product with the identity
    adds one weight and zeros, which is exact (codes of 8 bits in bfloat16 as well).
    """
    out_dtype = torch.bfloat16 if packed.dtype.itemsize == 1 else None
    weight = packed.new_empty(out_features, in_features)
    for start in range(0, in_features, _UNIT_ROWS):
        stop = min(start + _UNIT_ROWS, in_features)
        unit = torch.zeros(stop - start, in_features, dtype=torch.float16, device=packed.device)
        unit[:, start:stop].fill_diagonal_(1)
        weight[:, start:stop] = product(packed, unit.to(packed.dtype), out_features, out_dtype=out_dtype).t()
    return weight


def reads_rows(packed: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `linear` and `linear_8_bit` may multiply a few rows with this compressed matrix by the
    project's own kernel: it runs here, and finds in these bytes what the 2:4 matrix [out, in] has.

    Waits for the device.
    """
    return sparse_rows.is_available(packed.device, packed.dtype) and sparse_rows.is_readable(packed, weight)


def name_of(rows: int, reads_rows: bool) -> str:
    """The name of the kernel that `linear` and `linear_8_bit` run for so many rows."""
    return sparse_rows.NAME if _is_few(rows, reads_rows) else KERNEL


def _is_few(rows: int, reads_rows: bool) -> bool:
    return reads_rows and rows <= sparse_rows.MOST_ROWS


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    tuned: bool,
    reads_rows: bool = False,
) -> torch.Tensor:
    """``x @ W^T + bias`` for x [rows, in] and a matrix that `compress` made; no gradients.

    Args:
        tuned: search for the fastest algorithm where this number of rows is new and nothing is captured.
        reads_rows: what the function `reads_rows` found for this matrix.

    For torch.compile the whole is one operator, ``torch.ops.harness.semi_structured_linear``.
    """
    run = _operator if torch.compiler.is_compiling() else _linear
    return run(x, packed, bias, out_features, tuned, reads_rows)


def _linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    tuned: bool,
    reads_rows: bool,
) -> torch.Tensor:
    if _is_few(x.shape[0], reads_rows):
        return sparse_rows.multiply(x, packed, bias, out_features)
    return product(packed, x, out_features, bias=bias, tuned=tuned)


_operator = torch.library.custom_op("harness::semi_structured_linear", _linear, mutates_args=())


@_operator.register_fake
def _(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    tuned: bool,
    reads_rows: bool,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], out_features)


def product_8_bit(codes: torch.Tensor, packed: torch.Tensor, out_features: int, tuned: bool) -> torch.Tensor:
    """The product of 8-bit codes [rows, in] with those of a compressed matrix, bfloat16 [rows, out]: the
    library adds up in 32 bits and writes 16.

    For torch.compile the whole is one operator, ``torch.ops.harness.semi_structured_8_bit``.
    """
    run = _operator_8_bit if torch.compiler.is_compiling() else _product_8_bit
    return run(codes, packed, out_features, tuned)


def _product_8_bit(codes: torch.Tensor, packed: torch.Tensor, out_features: int, tuned: bool) -> torch.Tensor:
    return product(packed, codes, out_features, out_dtype=torch.bfloat16, tuned=tuned)


_operator_8_bit = torch.library.custom_op("harness::semi_structured_8_bit", _product_8_bit, mutates_args=())


@_operator_8_bit.register_fake
def _(codes: torch.Tensor, packed: torch.Tensor, out_features: int, tuned: bool) -> torch.Tensor:
    return codes.new_empty(codes.shape[0], out_features, dtype=torch.bfloat16)


def linear_8_bit(
    codes: torch.Tensor,
    packed: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    tuned: bool,
    reads_rows: bool,
) -> torch.Tensor:
    """``(codes @ W^T) * rows * columns + bias`` [rows, out] in `dtype` for 8-bit codes [rows, in]; no
    gradients.

    Args:
        rows: float32 [rows, 1]. columns: float32 [out]. bias: [out].
        tuned, reads_rows: as of `linear`.

    The library rounds sums to bfloat16 before they are scaled; a few rows are rounded once.
    """
    if _is_few(codes.shape[0], reads_rows):
        run = _operator_few_8_bit if torch.compiler.is_compiling() else sparse_rows.multiply_8_bit
        return run(codes, packed, rows, columns, bias, dtype)
    sums = product_8_bit(codes, packed, columns.shape[0], tuned)
    return apply_scales(sums, rows, columns, bias, dtype)


@torch.library.custom_op("harness::semi_structured_few_8_bit", mutates_args=())
def _operator_few_8_bit(
    codes: torch.Tensor,
    packed: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return sparse_rows.multiply_8_bit(codes, packed, rows, columns, bias, dtype)


@_operator_few_8_bit.register_fake
def _(
    codes: torch.Tensor,
    packed: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return codes.new_empty(codes.shape[0], columns.shape[0], dtype=dtype)


def apply_scales(
    sums: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``sums * rows * columns + bias`` in float32, rounded to `dtype` once.

    The library takes such scales only where the host knows them, or one for each output row. Compilers fuse
    plain torch; called eagerly, it would write float32 three times over.

    Args:
        sums: [rows, out]. rows: float32 [rows, 1]. columns: float32 [out]. bias: [out].
    """
    if not torch.compiler.is_compiling() and sums.numel() and has_triton(sums.device):
        from harness.kernels import triton_scales

        return triton_scales.apply_scales(sums, rows, columns, bias, dtype)
    y = sums * rows * columns
    return (y if bias is None else y + bias).to(dtype)


def product(
    packed: torch.Tensor,
    x: torch.Tensor,
    out_features: int,
    *,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    tuned: bool = False,
) -> torch.Tensor:
    """``x @ W^T + bias`` [rows, out] for x [rows, in] of the type of the compressed matrix.

    Args:
        out_dtype: for 8-bit types; by default x's.
    """
    rows = x.shape[0]
    x = _padded(x)
    if tuned:
        tune(packed, x, out_features, bias=bias, out_dtype=out_dtype)
        chosen = algorithm_for(packed, x, out_features, bias=bias, out_dtype=out_dtype)
    else:  # the library's first, whatever was found for another matrix of this shape
        chosen = Algorithm()
    return _run(packed, x, bias, out_dtype, chosen)[:rows]


def algorithm_for(
    packed: torch.Tensor,
    x: torch.Tensor,
    out_features: int,
    *,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Algorithm:
    """What `product` runs for x [rows, in]: the tuned algorithm, or the library's default."""
    problem = _problem(packed, x, out_features, bias, out_dtype)
    return _tuned.get(problem, {}).get(_padded_rows(x), Algorithm())


def tune(
    packed: torch.Tensor,
    x: torch.Tensor,
    out_features: int,
    *,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> None:
    """Time the library's algorithms for x [rows, in] and keep the fastest for all matrices of this shape.

    Does nothing where that is known already, while a CUDA graph is captured (a search waits for the
    device), and once so many numbers of rows are known that searching would take longer than it saves.
    """
    known = _tuned.setdefault(_problem(packed, x, out_features, bias, out_dtype), {})
    rows = _padded_rows(x)
    if rows in known or len(known) >= _MOST_TUNED or torch.cuda.is_current_stream_capturing():
        return
    known[rows] = _search(packed, _padded(x), bias, out_dtype)


def _search(
    packed: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype | None
) -> Algorithm:
    """The fastest algorithm that does not split the sum.

    The library has a search of its own, which splits as well. On an H200 (cuSPARSELt of torch 2.11) it ended
    the process's context with an illegal instruction for float16, 4096 x 4096 and 32 rows, where each of the
    algorithms alone is right; so they are timed here.
    """
    return fastest(functools.partial(_run, packed, x, bias, out_dtype), _microseconds)


def fastest(
    run: Callable[[Algorithm], object], microseconds: Callable[[Callable[[], object]], float]
) -> Algorithm:
    """The first of the quickest algorithms by their numbers; they end where the library refuses one.

    Args:
        run: multiplies with an algorithm, or raises RuntimeError.
        microseconds: how long a call takes.
    """
    times: dict[Algorithm, float] = {}
    for number in range(_MOST_ALGORITHMS):
        algorithm = Algorithm(number)
        try:
            run(algorithm)
            times[algorithm] = microseconds(functools.partial(run, algorithm))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            break
    return min(times, key=lambda algorithm: times[algorithm], default=Algorithm())


def _run(
    packed: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    algorithm: Algorithm,
) -> torch.Tensor:
    y: torch.Tensor = torch._cslt_sparse_mm(
        packed,
        x.t(),
        bias=bias,
        out_dtype=out_dtype,
        transpose_result=True,
        alg_id=algorithm.number,
        split_k=algorithm.split_k,
        split_k_mode=algorithm.split_k_mode,
    )
    return y


def _microseconds(run: Callable[[], object]) -> float:
    """The time of a call on the device. The library begins slowly, so calls are captured and replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):  # not `torch.cuda.graph`, which collects garbage every time
        graph.capture_begin()
        for _ in range(_TIMED_CALLS):
            run()
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return min(replay_us(graph, _TIMED_CALLS) for _ in range(_TIMINGS))


def _problem(
    packed: torch.Tensor,
    x: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype | None,
) -> _Problem:
    return _Problem(packed.device.index, packed.dtype, out_features, x.shape[1], bias is not None, out_dtype)


def _padded_rows(x: torch.Tensor) -> int:
    return x.shape[0] + -x.shape[0] % _ROWS[x.dtype]


def _padded(x: torch.Tensor) -> torch.Tensor:
    """x with rows of zeros up to what the library takes, contiguous."""
    missing = _padded_rows(x) - x.shape[0]
    if not missing:
        return x.contiguous()
    padded = x.new_zeros(x.shape[0] + missing, x.shape[1])  # float8 has no `pad`
    padded[: x.shape[0]] = x
    return padded
