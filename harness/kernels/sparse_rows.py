"""Products of a few rows with 2:4 weights in cuSPARSELt's own form: where they run, and what that form is.

The library pads one row to eight, and takes for it nearly twice the time of a dense product. For up to
`MOST_ROWS` rows a kernel of the project's own (`harness.kernels.gluon_sparse_rows`) reads the same bytes;
they are not stored twice.

The form is not documented. What is known of it was found by compressing matrices on compute capability 9.0:

- First the values [out, in / 2], in their order.
- Then a nibble for each group of four: its two places, ascending, the first in the low bits. They lie in
  blocks of 64 rows, and in these in blocks of 32 columns, 256 bytes each (16-bit types), or of 64 columns,
  512 bytes (8-bit types). What of row and group makes up the place of a nibble is in `_ORDER`.

Another version of the library, or another device, may have another one. So nothing is read that has not been
decoded and compared first, when the matrix was compressed (`is_readable`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

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
    "places",
    "prepare",
    "unpack",
]

NAME = "triton 2:4 few"
MOST_ROWS = 8
"""What an instruction multiplies at once; the library pads to as many."""

_MANY_ROWS = 8192  # of a matrix: enough programs that each needs less on its way
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
    """How so many rows are multiplied with a matrix of so many, both of this type."""
    many = out_features >= _MANY_ROWS
    if dtype.itemsize == 1:
        # Two blocks share what is read of x, which float8 also has to take apart: its products are float16's.
        if many and (rows > 1 or dtype == torch.float8_e4m3fn):
            return SparseLaunch(blocks=2, warps=4, stages=1)
        return SparseLaunch(blocks=1, warps=4, stages=2)
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
    from harness.kernels.gluon_sparse_rows import sparse_few_kernel
    from harness.kernels.triton_weight_only import Call

    y = torch.empty(x.shape[0], out_features, dtype=dtype or x.dtype, device=x.device)
    words, x_words = packed.reshape(-1).view(torch.int32), _in_words(x)
    absent = words  # of its own type, and not read
    row_scales, column_scales = (absent, absent) if scales is None else (each.contiguous() for each in scales)
    arguments = (
        x_words, words, absent if bias is None else bias, row_scales, column_scales, y,
        x.shape[0], out_features, x_words.stride(0), x_words.shape[1] // _UNIT_WORDS,
    )  # fmt: skip
    constants = {
        "KIND": _KINDS[x.dtype],
        "BLOCKS": launch.blocks,
        "COUNT": 8 if x.shape[0] <= 8 else 16,
        "STAGES": launch.stages,
        "WIDE": launch.wide,
        "HAS_BIAS": bias is not None,
        "num_warps": launch.warps,
    }
    return Call(sparse_few_kernel, (out_features // (16 * launch.blocks),), arguments, constants, y)


def _in_words(x: torch.Tensor) -> torch.Tensor:
    """x [rows, in] as int32 words, which is what a thread reads."""
    each = 4 // x.element_size()
    fits = x.stride(1) == 1 and x.stride(0) % each == 0 and x.storage_offset() % each == 0
    return (x if fits else x.clone(memory_format=torch.contiguous_format)).view(torch.int32)
