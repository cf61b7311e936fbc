"""Weights as places in a table of values, before they are packed.

A weight is ``table[code]``, times the scale of its group of input columns where there are groups. Single
weights may be kept as they are beside it: outliers that no value of the table is near.

Scales can be quantized once more (Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, section 3): their mean
is taken off, and what is left is stored in 8 bits with one float32 step for every 256 scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from harness.errors import ConfigError

__all__ = ["SCALE_BLOCK", "CodebookWeight", "Outliers", "ScaleCodes", "nearest_codes", "quantize_scales"]

SCALE_BLOCK = 256
"""Scales that share a step."""


@dataclass(frozen=True, slots=True)
class Outliers:
    """Single weights of a matrix [out, in] that are kept exactly.

    Args:
        index: int32 [n] (int64 where the matrix is too large), ascending: ``row * in + column``.
        values: [n], in the type that the weight had.
    """

    index: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class ScaleCodes:
    """Scales in 8 bits: ``mean + steps[i // 256] * codes[i]``, i counting in row-major order.

    Args:
        codes: int8 [groups, out]. steps: float32 [blocks]. mean: float32 [1].
    """

    codes: torch.Tensor
    steps: torch.Tensor
    mean: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """The scales, float32 [groups, out]."""
        steps = self.steps.repeat_interleave(SCALE_BLOCK)[: self.codes.numel()]
        return self.mean + steps.view(self.codes.shape) * self.codes.float()


@dataclass(frozen=True, slots=True)
class CodebookWeight:
    """A matrix [out, in] as places in a table.

    Args:
        codes: uint8 [out, padded in].
        table: float32 [2^bits], ascending.
        scales: float32 [groups, out], the same in 8 bits, or None.
        group_size: columns per scale; -1 without scales.
        outliers: weights that are not what their code says.
    """

    codes: torch.Tensor
    table: torch.Tensor
    bits: int
    in_features: int
    scales: torch.Tensor | ScaleCodes | None = None
    group_size: int = -1
    outliers: Outliers | None = None

    def __post_init__(self) -> None:
        if (self.scales is None) != (self.group_size == -1):
            raise ConfigError("scales belong to groups of columns, and groups need scales")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [out, in], computed in float32 and rounded to `dtype` once."""
        if self.scales is None:  # nothing is computed: the table is rounded and not the matrix
            weight = self.table.to(dtype)[self.codes.int()]
        else:
            scales = self.scales.dequantize() if isinstance(self.scales, ScaleCodes) else self.scales
            values = self.table[self.codes.int()].unflatten(1, (-1, self.group_size))  # [out, groups, size]
            weight = (values * scales.t()[:, :, None].float()).flatten(1).to(dtype)
        weight = weight[:, : self.in_features].contiguous()
        if self.outliers is not None:
            weight.view(-1)[self.outliers.index.long()] = self.outliers.values.to(dtype)
        return weight


def nearest_codes(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The places uint8 of the nearest values of an ascending table (at most 256)."""
    halfway = (table[1:] + table[:-1]) / 2
    return torch.bucketize(values, halfway, out_int32=True, right=True).to(torch.uint8)


def quantize_scales(scales: torch.Tensor) -> ScaleCodes:
    """Scales float32 [groups, out] in 8 bits, symmetric around their mean."""
    mean = scales.mean().view(1)
    rest = (scales - mean).flatten()
    blocks = torch.nn.functional.pad(rest, (0, -rest.numel() % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    steps = blocks.abs().amax(1) / 127
    codes = torch.round(blocks / torch.where(steps == 0, torch.ones_like(steps), steps)[:, None])
    codes = codes.to(torch.int8).flatten()[: rest.numel()]
    return ScaleCodes(codes.view(scales.shape).contiguous(), steps, mean)
