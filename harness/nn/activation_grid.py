"""Static grids of activations: one range for a tensor, or one for each group of its dimensions.

An asymmetric b-bit grid covers a calibrated range [low, high] and always 0: ``s = (high - low) / (2^b - 1)``,
``z = round(-low / s)``, a value x becomes ``s * (clip(round(x / s) + z, 0, 2^b - 1) - z)``. Bits go up to
16, for tensors that 8 bits would harm.

Source: Bondarenko, Nagel, Blankevoort 2021 (arXiv:2109.12948), sections 2 and 4; conventions of
`harness.nn.quantizer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from harness.errors import ConfigError, NumericalFailure
from harness.nn.kept_types import KeptTypes

__all__ = ["ActivationGrid", "ActivationQuantizer", "group_sizes", "grouped_grid", "tensor_grid"]

_WIDTH_MULTIPLE = 16  # of columns, which int8 kernels like


@dataclass(frozen=True)
class ActivationGrid:
    """The points that an activation tensor [..., d] is rounded to.

    Args:
        scale, zero: float32 [groups]; zeros are whole numbers.
        sizes: dimensions of each group; empty where there is one group of whatever size.
        order: int64 [d]: the dimensions of the first group, then of the second ...; None: as they come.
    """

    bits: int
    scale: torch.Tensor
    zero: torch.Tensor
    sizes: tuple[int, ...] = ()
    order: torch.Tensor | None = None

    @property
    def groups(self) -> int:
        return self.scale.numel()

    @property
    def member(self) -> torch.Tensor | None:
        """The group of each dimension, int64 [d]; None where there is one group."""
        if self.groups == 1:
            return None
        sizes = torch.tensor(self.sizes, device=self.scale.device)
        grouped = torch.arange(self.groups, device=self.scale.device).repeat_interleave(sizes)
        if self.order is None:
            return grouped
        return torch.empty_like(grouped).index_copy_(0, self.order, grouped)

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest points, in x's type."""
        return ActivationQuantizer(self).forward(x)


class ActivationQuantizer(KeptTypes):
    """Rounds a tensor [..., d] to the points of a grid and hands it on as floats.

    No kernel carries these tensors as integers between the operations, so this is an imitation.
    """

    scale: torch.Tensor
    zero: torch.Tensor
    member: torch.Tensor | None
    simulated = True
    _kept = ("scale", "zero")

    def __init__(self, grid: ActivationGrid) -> None:
        super().__init__()
        self.a_bits, self.groups = grid.bits, grid.groups
        self.register_buffer("scale", grid.scale)
        self.register_buffer("zero", grid.zero)
        member = grid.member
        self.register_buffer("member", None if member is None else member.to(torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale, zero = self.scale, self.zero
        if self.member is not None:
            scale, zero = scale[self.member], zero[self.member]
        return _round(x, scale, zero, self.a_bits)

    def extra_repr(self) -> str:
        return f"a_bits={self.a_bits}, groups={self.groups}"


def _round(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    codes = torch.round(x.float() / scale).add_(zero).clamp_(0, 2**bits - 1)
    return codes.sub_(zero).mul_(scale).to(x.dtype)


def _affine(low: torch.Tensor, high: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each range [low, high], float32; a range of zeros has the scale 1."""
    if not 2 <= bits <= 16:
        raise ConfigError(f"activations are rounded to 2 to 16 bits, not {bits}")
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise NumericalFailure("calibration activations are NaN or infinite")
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, torch.round(-low / scale).clamp(0, 2**bits - 1)


def tensor_grid(low: torch.Tensor, high: torch.Tensor, bits: int) -> ActivationGrid:
    """One grid for a whole tensor from its calibrated range (0-d tensors).

    Raises:
        ConfigError: bits outside 2 to 16.
        NumericalFailure: the range is not finite.
    """
    return ActivationGrid(bits, *_affine(low.view(1), high.view(1), bits))


def grouped_grid(
    low: torch.Tensor, high: torch.Tensor, bits: int, sizes: Sequence[int], order: torch.Tensor | None
) -> ActivationGrid:
    """One grid for each group of dimensions, from the range [d] of every dimension.

    Raises:
        ConfigError, NumericalFailure: as `tensor_grid`, and for groups that are not d dimensions in all.
    """
    if sum(sizes) != low.numel():
        raise ConfigError(f"groups of {sum(sizes)} dimensions do not fit a tensor of {low.numel()}")
    if order is not None:
        low, high = low[order], high[order]
    lows = torch.stack([part.amin() for part in low.split(list(sizes))])
    highs = torch.stack([part.amax() for part in high.split(list(sizes))])
    return ActivationGrid(bits, *_affine(lows, highs, bits), tuple(sizes), order)


def group_sizes(dimensions: int, groups: int, *, ragged: bool = False) -> tuple[int, ...]:
    """`dimensions` cut into so many groups: equal ones, or with `ragged` nearly equal ones.

    Ragged groups differ by one multiple of 16 dimensions at most where there are enough of those.

    Raises:
        ConfigError: more groups than dimensions, or a number that does not divide them.
    """
    if not 1 <= groups <= dimensions:
        raise ConfigError(f"{dimensions} dimensions make 1 to {dimensions} groups, not {groups}")
    if dimensions % groups == 0:
        return (dimensions // groups,) * groups
    if not ragged:
        raise ConfigError(
            f"{groups} groups do not divide {dimensions} dimensions; choose a divisor or ragged"
        )
    unit = (
        _WIDTH_MULTIPLE if dimensions % _WIDTH_MULTIPLE == 0 and dimensions >= _WIDTH_MULTIPLE * groups else 1
    )
    units = dimensions // unit
    ends = [units * (index + 1) // groups * unit for index in range(groups)]
    return tuple(end - start for start, end in zip([0, *ends[:-1]], ends, strict=True))
