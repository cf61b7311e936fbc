"""Products of a few rows with 2:4 weights in cuSPARSELt's own form: where they run, and what that form is.

The library pads one row to eight, and takes for it nearly twice the time of a dense product. For up to
`MOST_ROWS` rows a kernel of the project's own (`harness.kernels.gluon_sparse_rows`) reads the same bytes;
they are not stored twice. Matrices that read the same x may share a launch.

The form is not documented. What is known of it was found by compressing matrices on compute capability 9.0:

- First the values [out, in / 2], in their order.
- Then a nibble for each group of four: its two places, ascending, the first in the low bits. They lie in
  blocks of 64 rows, and in these in blocks of 32 columns, 256 bytes each (16-bit types), or of 64 columns,
  512 bytes (8-bit types). What of row and group makes up the place of a nibble is in `_ORDER`.

Another version of the library, or another device, may have another one. So nothing is read that has not been
decoded and compared first, when the matrix was compressed (`is_readable`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from harness.kernels.selection import MOST_MATRICES
from harness.kernels.weight_only import has_triton, runs_vector

if TYPE_CHECKING:
    from harness.kernels.triton_weight_only import Call

__all__ = [
    "MOST_ROWS",
    "NAME",
    "SparseLaunch",
    "is_available",
    "is_readable",
    "launch_for",
    "multiply",
    "multiply_8_bit",
    "multiply_several",
    "multiply_several_8_bit",
    "places",
    "prepare",
    "prepare_several",
    "unpack",
]

NAME = "triton 2:4 few"
MOST_ROWS = 8
"""What an instruction multiplies at once; the library pads to as many."""

_MANY_ROWS, _MOST_ROWS = 8192, 16384  # of the matrices: from here on each program needs less on its way
_BLOCK_ROWS = 64  # what the metadata is in blocks of
_UNIT_WORDS = 32  # of a row of x, 128 bytes: what a warp reads at once
_KINDS = {torch.bfloat16: "bf16", torch.float16: "f16", torch.int8: "s8", torch.float8_e4m3fn: "e4m3"}
_OLDEST_FLOAT8 = (8, 9)  # compute capability
_CHUNK = 1024  # rows that are decoded at once, so that a check takes little memory

# By the bytes of a type: what the place of a nibble is made up of, the slowest first. A row is the `row`-th
# of the `rows8`-th eight of the `rows16`-th 16 of a block of 64, and a group alike.
_ORDER = {
    2: ("rows64", "block", "rows16", "row", "groups2", "group", "groups4", "rows8"),
    1: ("rows64", "block", "rows16", "row", "groups4", "groups2", "groups8", "rows8", "group"),
}
_SIZES = {"rows16": 4, "rows8": 2, "row": 8, "groups8": 2, "groups4": 2, "groups2": 2, "group": 2}
_ROWS = ("rows64", "rows16", "rows8", "row")
_GROUPS = {
    2: ("block", "groups4", "groups2", "group"),
    1: ("block", "groups8", "groups4", "groups2", "group"),
}


@dataclass(frozen=True, slots=True)
class SparseLaunch:
    """One way to launch the kernel.

    Args:
        blocks: of 16 rows of the matrix, for each program; 1, 2 or 4.
        warps: of a program; a power of two.
        stages: times 128 bytes of a row of x, and the weights for them, that a warp has on their way.
        wide: x is read 16 bytes at once, of which a thread needs half.
    """

    blocks: int
    warps: int
    stages: int
    wide: bool = False


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel runs on this device, for weights and activations of this type."""
    if dtype not in _KINDS or not has_triton(device) or not runs_vector(device):
        return False
    return dtype != torch.float8_e4m3fn or torch.cuda.get_device_capability(device) >= _OLDEST_FLOAT8


def launch_for(rows: int, out_features: int, dtype: torch.dtype) -> SparseLaunch:
    """How so many rows are multiplied with matrices of so many in all, both of this type.

    Where few programs run, each has more on its way; where many do, two blocks share what is read of x.
    """
    many = out_features >= _MANY_ROWS
    if dtype.itemsize == 1:
        # float8 also has to take x apart: its products are float16's.
        if many and (rows > 1 or dtype == torch.float8_e4m3fn):
            return SparseLaunch(blocks=2, warps=4, stages=1)
        alone = rows == 1 and not many and dtype == torch.int8
        return SparseLaunch(blocks=1, warps=4, stages=4 if alone else 2)
    if out_features >= _MOST_ROWS:
        return SparseLaunch(blocks=2, warps=4, stages=1)
    if rows == 1:
        return SparseLaunch(blocks=1, warps=4, stages=2 if many else 4)
    if many:
        return SparseLaunch(blocks=2, warps=4, stages=2)
    return SparseLaunch(blocks=1, warps=4, stages=4, wide=True)


def is_readable(packed: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel reads the compressed form of this 2:4 matrix [out, in] as the matrix: the rows are
    a multiple of 64, a row is one of 128 bytes, and the bytes decode to exactly this.

    Waits for the device.
    """
    out_features, in_features = weight.shape
    size = weight.element_size()
    held = weight.numel() * size // 2 + weight.numel() // 8
    fits = not (out_features % _BLOCK_ROWS or in_features * size % (4 * _UNIT_WORDS))
    if not fits or packed.numel() * size != held:
        return False
    found = places(packed, out_features, in_features)
    # What the instruction is promised: two places, the lower one first.
    if not bool((found % 4 < found // 4).all()):
        return False
    values = _values(packed, out_features, in_features)
    chunks = zip(*(each.split(_CHUNK) for each in (values, found, weight)), strict=True)
    # In float32, which holds every type exactly: float8 does not compare.
    return all(torch.equal(_dense(*chunk[:2]).float(), chunk[2].float()) for chunk in chunks)


def unpack(packed: torch.Tensor, out_features: int, in_features: int) -> torch.Tensor:
    """The matrix [out, in] in its type.

    Args:
        packed: of a 16- or 8-bit type, as `harness.kernels.semi_structured.compress` makes it; both sizes
            multiples of 64.
    """
    return _dense(_values(packed, out_features, in_features), places(packed, out_features, in_features))


def places(packed: torch.Tensor, out_features: int, in_features: int) -> torch.Tensor:
    """The places of the two values of each group, uint8 [out, in / 4]: the first in the lower two bits.

    Args:
        packed: as of `unpack`.
    """
    size = packed.element_size()
    held = packed.reshape(-1).view(torch.uint8)[out_features * in_features // 2 * size :]
    nibbles = torch.stack([held % 16, held // 16], -1)
    order = _ORDER[size]
    sizes = {**_SIZES, "rows64": out_features // 64, "block": in_features * size // 64}
    wanted = (*_ROWS, *_GROUPS[size])
    apart = nibbles.view([sizes[name] for name in order])
    return apart.permute([order.index(name) for name in wanted]).reshape(out_features, in_features // 4)


def _values(packed: torch.Tensor, out_features: int, in_features: int) -> torch.Tensor:
    """[out, in / 2]"""
    half = in_features // 2
    return packed.reshape(-1)[: out_features * half].view(out_features, half)


def _dense(values: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """The matrix of values [rows, in / 2] at such places [rows, in / 4]."""
    rows, groups = found.shape
    at = torch.stack([found % 4, found // 4], -1).long()
    plain = values.view(torch.int8) if values.element_size() == 1 else values  # float8 does not scatter
    dense = plain.new_zeros(rows, groups, 4).scatter_(-1, at, plain.reshape(rows, groups, 2))
    return dense.view(rows, 4 * groups).view(values.dtype)


def multiply(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, out_features: int
) -> torch.Tensor:
    """``x @ W^T + bias`` [rows, out] for x [rows, in] of the type of a matrix that `is_readable`; at most
    `MOST_ROWS` rows. Sums are float32."""
    return prepare(x, packed, bias, out_features, launch_for(x.shape[0], out_features, x.dtype)).run()


def multiply_8_bit(
    codes: torch.Tensor,
    packed: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``(codes @ W^T) * rows * columns + bias`` [rows, out] in `dtype`, for codes [rows, in] of the type of a
    matrix that `is_readable`; at most `MOST_ROWS` rows. Sums are int32 or float32, and rounded once.

    Args:
        rows: float32 [rows, 1]. columns: float32 [out].
    """
    out_features = columns.shape[0]
    launch = launch_for(codes.shape[0], out_features, codes.dtype)
    return prepare(codes, packed, bias, out_features, launch, scales=(rows, columns), dtype=dtype).run()


@torch.library.custom_op("harness::semi_structured_linears", mutates_args=())
def multiply_several(
    x: torch.Tensor,
    packed: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    out_features: Sequence[int],
) -> list[torch.Tensor]:
    """`multiply` of the same rows x [rows, in] for each matrix, in one launch where it takes so many.

    That is the launch for as many rows as all matrices have; another one adds up in another order.

    Args:
        packed, out_features: of each matrix. biases: of each, or none at all.
    """
    return _several(x, packed, biases, out_features)


@multiply_several.register_fake
def _(
    x: torch.Tensor,
    packed: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    out_features: Sequence[int],
) -> list[torch.Tensor]:
    return [x.new_empty(x.shape[0], out) for out in out_features]


@torch.library.custom_op("harness::semi_structured_few_8_bit_several", mutates_args=())
def multiply_several_8_bit(
    codes: torch.Tensor,
    packed: Sequence[torch.Tensor],
    rows: torch.Tensor,
    columns: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """`multiply_8_bit` of the same codes [rows, in] for each matrix, as `multiply_several`.

    Args:
        rows: float32 [rows, 1].
        packed, columns: of each matrix, columns float32 [out]. biases: of each and all of one type, or none.
    """
    out_features = [each.shape[0] for each in columns]
    return _several(codes, packed, biases, out_features, scales=(rows, columns), dtype=dtype)


@multiply_several_8_bit.register_fake
def _(
    codes: torch.Tensor,
    packed: Sequence[torch.Tensor],
    rows: torch.Tensor,
    columns: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    return [codes.new_empty(codes.shape[0], each.shape[0], dtype=dtype) for each in columns]


def _several(
    x: torch.Tensor,
    packed: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    out_features: Sequence[int],
    *,
    scales: tuple[torch.Tensor, Sequence[torch.Tensor]] | None = None,
    dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    if len(packed) <= MOST_MATRICES:
        launch = launch_for(x.shape[0], sum(out_features), x.dtype)
        call, outputs = prepare_several(x, packed, biases, out_features, launch, scales=scales, dtype=dtype)
        call.run()
        return outputs
    given: Sequence[torch.Tensor | None] = biases or [None] * len(packed)
    if scales is None:
        return [multiply(x, *each) for each in zip(packed, given, out_features, strict=True)]
    row_scales, columns = scales
    assert dtype is not None
    return [
        multiply_8_bit(x, matrix, row_scales, of_columns, bias, dtype)
        for matrix, of_columns, bias in zip(packed, columns, given, strict=True)
    ]


def prepare(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    launch: SparseLaunch,
    *,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Call:
    """The launch of `multiply`, or with scales of `multiply_8_bit` (rows, columns); here up to 16 rows."""
    biases = [] if bias is None else [bias]
    own = None if scales is None else (scales[0], [scales[1]])
    return prepare_several(x, [packed], biases, [out_features], launch, scales=own, dtype=dtype)[0]


def prepare_several(
    x: torch.Tensor,
    packed: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    out_features: Sequence[int],
    launch: SparseLaunch,
    *,
    scales: tuple[torch.Tensor, Sequence[torch.Tensor]] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Call, list[torch.Tensor]]:
    """One launch for up to `MOST_MATRICES` matrices, and where its results are; up to 16 rows.

    Args:
        biases: one for each matrix and all of one type, or none at all.
        scales: of the rows, float32 [rows, 1], and of each matrix, float32 [out].
        dtype: of the results; by default x's.
    """
    from harness.kernels.gluon_sparse_rows import sparse_few_kernel
    from harness.kernels.triton_weight_only import Call

    rows = x.shape[0]
    outputs = [torch.empty(rows, out, dtype=dtype or x.dtype, device=x.device) for out in out_features]
    words = [each.reshape(-1).view(torch.int32) for each in packed]
    absent = words[0]  # of its own type, and not read
    row_scales, columns = (absent, None) if scales is None else (scales[0].contiguous(), scales[1])
    matrices: list[tuple[Any, ...]] = []
    for place in range(MOST_MATRICES):
        index = place if place < len(packed) else 0  # an absent matrix is another one, which is not read
        own_scales = absent if columns is None else columns[index].contiguous()
        bias = biases[index].contiguous() if biases else absent
        matrices.append((words[index], bias, own_scales, outputs[index], out_features[index]))
    (first, bias, own_scales, output, out), *others = matrices
    x_words = _in_words(x)
    arguments = (
        x_words, first, bias, row_scales, own_scales, output,
        rows, out, x_words.stride(0), x_words.shape[1] // _UNIT_WORDS, *itertools.chain(*others),
    )  # fmt: skip
    constants = {
        "MATRICES": len(packed),
        "KIND": _KINDS[x.dtype],
        "BLOCKS": launch.blocks,
        "COUNT": 8 if rows <= 8 else 16,
        "STAGES": launch.stages,
        "WIDE": launch.wide,
        "HAS_BIAS": bool(biases),
        "num_warps": launch.warps,
    }
    grid = (max(out_features) // (16 * launch.blocks), len(packed))
    return Call(sparse_few_kernel, grid, arguments, constants, outputs[0]), outputs


def _in_words(x: torch.Tensor) -> torch.Tensor:
    """x [rows, in] as int32 words, which is what a thread reads."""
    each = 4 // x.element_size()
    fits = x.stride(1) == 1 and x.stride(0) % each == 0 and x.storage_offset() % each == 0
    return (x if fits else x.clone(memory_format=torch.contiguous_format)).view(torch.int32)
