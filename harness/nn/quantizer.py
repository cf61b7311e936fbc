"""Uniform quantizers: the one place where floating-point values become integers.

A symmetric b-bit grid has ``q_max = 2^(b-1) - 1`` and never uses ``-2^(b-1)``; an asymmetric one has an
integer zero point inside its range, so that 0.0 is exact on both. Integers are kept as *codes*,
unsigned in ``[0, 2^b - 1]``: a value is ``scale * (code - zero)``, where a symmetric grid has the zero
``2^(b-1)`` that need not be stored. Rounding is half to even.

Scales are computed in float32 and rounded *up* to the type in which they are stored before any code is
computed: what is stored is what was used, and rounding up keeps the extremes of a group within half a
step of the grid.

Source: Nagel et al. 2021, "A White Paper on Neural Network Quantization" (arXiv:2106.08295), section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from harness.errors import ConfigError, NumericalFailure

__all__ = [
    "CLIP_FACTORS",
    "SMALLEST_SCALE",
    "Grid",
    "QuantizedWeight",
    "find_grid",
    "group_grid",
    "group_scale_dtype",
    "least_error_grid",
    "padded_to_groups",
    "quantize_activation",
    "quantize_row_groups",
    "quantize_weight",
    "round_up",
    "search_grid",
]

SMALLEST_SCALE = 1e-35
"""Activations whose scale would be smaller count as zeros: its reciprocal would overflow."""

_FP16_SMALLEST_NORMAL = 2.0**-14
CLIP_FACTORS = tuple(1 - percent / 100 for percent in range(68))
"""What `search_grid` tries: clipping takes off up to 67 percent of the range."""


@dataclass(frozen=True)
class Grid:
    """The points ``scale * (code - zero)`` that values are rounded to.

    `scale` (in its storage type) and `zero` (uint8, None where symmetric) broadcast against the values.
    """

    bits: int
    scale: torch.Tensor
    zero: torch.Tensor | None

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """The nearest codes, uint8, of values in float32 or float64."""
        steps = torch.round(values / self.scale.to(values.dtype))
        highest = (1 << self.bits) - 1
        if self.zero is None:
            return (steps + (1 << self.bits - 1)).clamp_(1, highest).to(torch.uint8)
        return (steps + self.zero.to(values.dtype)).clamp_(0, highest).to(torch.uint8)

    def decode(self, codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values of codes."""
        zero = 2 ** (self.bits - 1) if self.zero is None else self.zero.to(dtype)
        values: torch.Tensor = (codes.to(dtype) - zero) * self.scale.to(dtype)
        return values

    def round(self, values: torch.Tensor) -> torch.Tensor:
        """The nearest points of the grid, in the type of the values."""
        return self.decode(self.encode(values), values.dtype)


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized matrix [out, in], not yet packed.

    Args:
        codes: uint8 [out, padded in]; padding has the value 0.
        scale: [out, groups], or [1, 1] for one scale per tensor, in its storage type.
        zero: uint8 of the same shape, or None where symmetric; floating-point where zero points need
            not be whole numbers (then 0.0 is not exact).
        group_size: columns per scale, or -1 for one group of all columns.
        order: int32 [in] or None: column `i` of the codes is column ``order[i]`` of the matrix.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bits: int
    group_size: int
    in_features: int
    order: torch.Tensor | None = None

    @property
    def sym(self) -> bool:
        return self.zero is None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [out, in] in its own column order."""
        out, groups = self.codes.shape[0], self.scale.shape[1]
        zero = None if self.zero is None else self.zero[:, :, None]
        grid = Grid(self.bits, self.scale[:, :, None], zero)
        values = grid.decode(self.codes.view(out, groups, -1), dtype).view(out, -1)
        values = values[:, : self.in_features]
        if self.order is None:
            return values
        return values[:, torch.argsort(self.order)]


def round_up(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The smallest numbers of `dtype` that are not below the positive float32 `scale`."""
    stored = scale.to(dtype)
    if dtype not in (torch.float16, torch.bfloat16):
        return stored
    raw = stored.view(torch.int16)  # the next float above a positive one is the next integer
    return torch.where(stored.to(scale.dtype) < scale, raw + 1, raw).view(dtype)


def find_grid(
    values: torch.Tensor,
    *,
    bits: int,
    sym: bool,
    dim: int | tuple[int, ...] | None = -1,
    scale_dtype: torch.dtype | None = torch.float32,
    known_finite: bool = False,
) -> Grid:
    """The grid that just covers the range of `values` along `dim` (None: all of them).

    The scale keeps the reduced dimensions. `scale_dtype` None chooses float16, or bfloat16 where
    float16 cannot hold the scales. A range of zeros gets the scale 1, so it stays zeros.

    Args:
        known_finite: the values were checked before; with a `scale_dtype`, nothing then waits for a GPU.

    Raises:
        ConfigError: `bits` outside 2 to 8.
        NumericalFailure: a value is NaN or infinite.
    """
    if not 2 <= bits <= 8:
        raise ConfigError(f"bits must be from 2 to 8, not {bits}")
    low, high = _range(values.detach().float(), dim)
    if not known_finite and not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise NumericalFailure("values to quantize are NaN or infinite")
    return _covering_grid(low, high, bits, sym, scale_dtype)


def _range(values: torch.Tensor, dim: int | tuple[int, ...] | None = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest value along `dim`, 0 among them."""
    dims = tuple(range(values.ndim)) if dim is None else dim
    return values.amin(dims, keepdim=True).clamp_(max=0), values.amax(dims, keepdim=True).clamp_(min=0)


def _covering_grid(
    low: torch.Tensor, high: torch.Tensor, bits: int, sym: bool, scale_dtype: torch.dtype | None
) -> Grid:
    reach, steps = (torch.maximum(-low, high), 2 ** (bits - 1) - 1) if sym else (high - low, 2**bits - 1)
    # By a tensor: on CUDA torch divides by a Python number through its reciprocal, an ulp off.
    scale = reach / torch.full_like(reach, steps)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    scale = round_up(scale, scale_dtype or group_scale_dtype(scale))
    if sym:
        return Grid(bits, scale, None)
    zero = torch.round(-low / scale.float()).clamp_(0, 2**bits - 1)
    return Grid(bits, scale, zero.to(torch.uint8))


def group_scale_dtype(scale: torch.Tensor) -> torch.dtype:
    """The type in which scales of groups are stored: float16, or bfloat16 where that cannot hold them."""
    fits = scale.numel() == 0 or bool(
        (scale.min() >= _FP16_SMALLEST_NORMAL) & (scale.max() <= torch.finfo(torch.float16).max)
    )
    return torch.float16 if fits else torch.bfloat16


def search_grid(
    values: torch.Tensor,
    importance: torch.Tensor,
    *,
    bits: int,
    sym: bool,
    scale_dtype: torch.dtype | None = torch.float32,
    known_finite: bool = False,
) -> Grid:
    """The grid over the last dimension that rounds with the least error among clipped ranges.

    The range of `find_grid` is shrunk step by step down to a third of it, and each slice keeps the range
    with the smallest ``sum importance * (v - round(v))^2``: at few bits a finer step gains more than
    clipping a few extremes loses.

    Args:
        importance: not negative, broadcasts against `values`.
        known_finite: as of `find_grid`.

    Raises:
        ConfigError, NumericalFailure: as `find_grid`.
    """
    if scale_dtype is None or not known_finite:
        scale_dtype = find_grid(values, bits=bits, sym=sym, scale_dtype=scale_dtype).scale.dtype
    values, importance = values.detach().float(), importance.float()
    from harness.kernels import gptq  # which stands on this module

    return gptq.search_grid(values, importance, CLIP_FACTORS, bits, sym, scale_dtype)


def least_error_grid(
    values: torch.Tensor,
    importance: torch.Tensor,
    factors: Sequence[float],
    bits: int,
    sym: bool,
    scale_dtype: torch.dtype,
) -> Grid:
    """`search_grid` in plain torch, among the ranges [..., 1] times each of `factors`, the first one 1."""
    # The range of clipped values is the clipped range: multiplication keeps their order.
    low, high = _range(values)

    def loss(grid: Grid) -> torch.Tensor:
        return ((grid.round(values) - values).square_() * importance).sum(-1, keepdim=True)

    best = _covering_grid(low, high, bits, sym, scale_dtype)
    least = loss(best)
    for factor in factors[1:]:
        grid = _covering_grid(low * factor, high * factor, bits, sym, scale_dtype)
        found = loss(grid)
        better = found < least
        least = torch.where(better, found, least)
        zero = None
        if best.zero is not None and grid.zero is not None:
            zero = torch.where(better, grid.zero, best.zero)
        best = Grid(bits, torch.where(better, grid.scale, best.scale), zero)
    return best


def padded_to_groups(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """`weight` [out, in] with zero columns appended up to a multiple of the group size."""
    missing = -weight.shape[1] % group_size if group_size > 0 else 0
    return torch.nn.functional.pad(weight, (0, missing)) if missing else weight


def group_grid(
    weight: torch.Tensor,
    *,
    bits: int,
    group_size: int = -1,
    sym: bool,
    per_tensor: bool = False,
    scale_dtype: torch.dtype | None = None,
    importance: torch.Tensor | None = None,
    known_finite: bool = False,
) -> Grid:
    """The grid of a matrix [out, in], scale [out, groups] (or [1, 1] per tensor).

    `importance` [in] of the columns lets each range be clipped for the least error (`search_grid`);
    `known_finite` as of `find_grid`.

    Scales are stored as float32 for 8 bits without groups, else as float16 (bfloat16 where the range
    needs it), unless `scale_dtype` names the type.

    Raises:
        ConfigError: the group size does not divide the number of columns, or is neither positive
            nor -1, or groups are asked for with one scale per tensor.
        NumericalFailure: the matrix has NaN or infinite values.
    """
    out, columns = weight.shape
    if group_size != -1 and (group_size < 1 or columns % group_size):
        raise ConfigError(f"group_size {group_size} does not divide {columns} columns")
    if per_tensor and group_size != -1:
        raise ConfigError("one scale per tensor has no groups: leave group_size at -1")
    if scale_dtype is None and bits == 8 and group_size == -1:
        scale_dtype = torch.float32
    if per_tensor:
        return find_grid(weight, bits=bits, sym=sym, dim=None, scale_dtype=scale_dtype)
    groups = 1 if group_size == -1 else columns // group_size
    grouped = weight.reshape(out, groups, columns // groups)
    common: Any = {"bits": bits, "sym": sym, "scale_dtype": scale_dtype, "known_finite": known_finite}
    if importance is None:
        grid = find_grid(grouped, **common)
    else:
        grid = search_grid(grouped, importance.view(groups, columns // groups), **common)
    zero = None if grid.zero is None else grid.zero[:, :, 0]
    return Grid(bits, grid.scale[:, :, 0], zero)


def quantize_weight(
    weight: torch.Tensor,
    *,
    bits: int,
    group_size: int = -1,
    sym: bool,
    per_tensor: bool = False,
    pad: bool = False,
) -> QuantizedWeight:
    """Round a matrix [out, in] to the nearest points of its grid.

    Args:
        pad: append zero columns where the group size does not divide `in`, instead of refusing.

    Raises:
        ConfigError, NumericalFailure: as `group_grid`.
    """
    in_features = weight.shape[1]
    weight = weight.detach().float()
    if pad:
        weight = padded_to_groups(weight, group_size)
    grid = group_grid(weight, bits=bits, group_size=group_size, sym=sym, per_tensor=per_tensor)
    groups = grid.scale.shape[1]
    zero = None if grid.zero is None else grid.zero[:, :, None]
    cells = Grid(bits, grid.scale[:, :, None], zero)
    codes = cells.encode(weight.reshape(weight.shape[0], groups, -1)).view(weight.shape)
    return QuantizedWeight(codes, grid.scale, grid.zero, bits, group_size, in_features)


def quantize_row_groups(weight: torch.Tensor, *, bits: int, row_groups: int) -> QuantizedWeight:
    """Round a matrix [out, in] symmetrically; `out / row_groups` consecutive rows share a float32 scale.

    Such a scale is constant along the summed columns, so it can leave an integer product. As many groups
    as rows give the numbers of `quantize_weight` with one scale per row. The result has a scale for every
    row, [out, 1].

    Raises:
        ConfigError: the groups do not divide the rows, or `bits` outside 2 to 8.
        NumericalFailure: the matrix has NaN or infinite values.
    """
    out, columns = weight.shape
    if row_groups < 1 or out % row_groups:
        raise ConfigError(f"{row_groups} row groups do not divide {out} rows")
    grouped = weight.detach().float().reshape(row_groups, -1)
    grid = find_grid(grouped, bits=bits, sym=True)
    scale = grid.scale.repeat_interleave(out // row_groups, 0)
    return QuantizedWeight(grid.encode(grouped).view(out, columns), scale, None, bits, -1, columns)


def quantize_activation(
    x: torch.Tensor, scale: torch.Tensor | None = None, *, per_token: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 of activations [..., tokens, features] with their scales, float32.

    Values are multiplied by the reciprocal of the scale, as the kernels do, so that both agree bit
    for bit.

    Args:
        scale: a scale [1] found by calibration (values beyond it are clipped); by default it follows
            from these very values, per token ([..., tokens, 1]) or for all of them ([1]).

    Returns:
        int8 [..., tokens, features] in -127 to 127, and the scale. NaN in a token becomes a NaN scale.
    """
    x = x.float()
    if scale is None:
        peak = x.abs().amax(-1, keepdim=True) if per_token else x.abs().amax().view(1)
        # By a tensor: on CUDA torch divides by a Python number through its reciprocal, an ulp off.
        scale = peak / torch.full_like(peak, 127)
        scale = torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale)
    codes = torch.round(x * (1 / scale)).clamp_(-127, 127)
    return codes.to(torch.int8), scale
