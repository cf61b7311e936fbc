"""Fake quantization: training through the very grid in which a weight will be stored.

Forward, a weight is rounded to its grid; backward, rounding counts as the identity (the straight-through
estimator, Bengio et al. 2013, arXiv:1308.3432). The step of the grid either follows from the weights
each time, as plain rounding does, or is learned with the gradient of LSQ (Esser et al. 2020,
arXiv:1902.08153, equations 1 to 3).

LSQ's signed range is ``[-2^(b-1), 2^(b-1) - 1]``. The packed symmetric grid never stores ``-2^(b-1)``, so a
learned grid is kept as an asymmetric one whose zero point is always ``2^(b-1)``: the same points, at the
price of the b bits per scale that zero points take. At 8 bits, where one point of 256 does not matter and
integer products want symmetric weights, the range is ``[-127, 127]`` on the symmetric grid.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from harness.errors import ConfigError, NumericalFailure
from harness.nn.quantized import Int8Linear, QuantizedLinear
from harness.nn.quantizer import (
    Grid,
    QuantizedWeight,
    group_scale_dtype,
    quantize_activation,
    quantize_weight,
)

__all__ = [
    "FakeQuantLinear",
    "learned_step",
    "lsq_gradient_scale",
    "lsq_initial_scale",
    "nearest_initial_scale",
    "straight_through",
]

_SMALLEST_STEPS = {torch.float16: 2.0**-14, torch.bfloat16: 1e-8, torch.float32: 1e-8}
"""Below these a learned step would be lost in the type that stores it."""


def straight_through(values: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """`rounded`, bit for bit, with the gradient of `values`."""
    result: torch.Tensor = _StraightThrough.apply(values, rounded)  # type: ignore[no-untyped-call]
    return result


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, _values: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(_ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def learned_step(
    values: torch.Tensor, scale: torch.Tensor, *, lowest: int, highest: int, gradient_scale: float = 1.0
) -> torch.Tensor:
    """``scale * round(clip(values / scale, lowest, highest))`` with LSQ's gradients.

    To `values` the gradient passes where they are not clipped. To `scale` it is
    ``round(v/s) - v/s`` inside, `lowest` below and `highest` above, times `gradient_scale`, summed over
    the values that share a step.

    Args:
        scale: positive, broadcasts against `values`.
        lowest, highest: integers, ``-Q_n`` and ``Q_p`` of the paper.
    """
    result: torch.Tensor = _LearnedStep.apply(  # type: ignore[no-untyped-call]
        values, scale, lowest, highest, gradient_scale
    )
    return result


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, scale: torch.Tensor, lowest: int, highest: int, gradient_scale: float
    ) -> torch.Tensor:
        steps = values / scale
        ctx.save_for_backward(steps)
        ctx.bounds, ctx.gradient_scale, ctx.shape = (lowest, highest), gradient_scale, scale.shape
        return steps.round().clamp_(lowest, highest).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        (steps,) = ctx.saved_tensors
        lowest, highest = ctx.bounds
        inside = (steps > lowest) & (steps < highest)
        to_scale = torch.where(inside, steps.round() - steps, steps.clamp(lowest, highest))
        to_scale = (gradient * to_scale).sum_to_size(ctx.shape) * ctx.gradient_scale
        return gradient * inside, to_scale, None, None, None


def lsq_initial_scale(values: torch.Tensor, highest: int) -> torch.Tensor:
    """``2 * mean|v| / sqrt(Q_p)`` over the last dimension, kept; 1 where all values are zero."""
    scale = 2 * values.abs().mean(-1, keepdim=True) / math.sqrt(highest)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def nearest_initial_scale(values: torch.Tensor, lowest: int, highest: int) -> torch.Tensor:
    """The step with the least squared error over the last dimension, kept; 1 where all values are zero.

    The best of 80 shares of the largest value, after LSQ+ (Bhalgat et al. 2020, arXiv:2004.09576).
    """
    reach = values.abs().amax(-1, keepdim=True) / highest
    reach = torch.where(reach == 0, torch.ones_like(reach), reach)
    best, least = reach, torch.full_like(reach, math.inf)
    for percent in range(100, 20, -1):
        scale = reach * percent / 100
        rounded = (values / scale).round().clamp_(lowest, highest) * scale
        found = (rounded - values).square().sum(-1, keepdim=True)
        best = torch.where(found < least, scale, best)
        least = torch.minimum(found, least)
    return best


def lsq_gradient_scale(sharing: int, highest: int) -> float:
    """``1 / sqrt(N * Q_p)`` for N values that share a step: weights and steps then move alike."""
    return 1 / math.sqrt(sharing * highest)


class FakeQuantLinear(nn.Module):
    """A linear layer under quantization-aware training; used only while training, then `packed`.

    The master weight is float32. With `learn_scale` the steps are a parameter `scale` [out * groups], a
    vector so that weight decay leaves it alone; they are rounded to the type that stores them before any
    weight is, so the forward pass is that of the packed layer.

    Args:
        linear: what it takes the place of.
        bits: of a weight: 2, 3, 4 or 8.
        group_size: input columns per scale, or -1 for one scale per output row.
        a_bits: 8: inputs are rounded to symmetric int8 as well, one scale per token.
        learn_scale: learn the steps (LSQ); else they cover the range of the weights at each step.
        scale_init: where learned steps begin: ``mse``, where the weights round with the least squared
            error, or ``lsq``, the paper's 2 mean|w| / sqrt(Q_p).

    Raises:
        ConfigError: the group size does not divide the columns, or `a_bits` 8 with a grid that no int8
            product can apply.
        NumericalFailure: the weights are NaN or infinite.
    """

    scale: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        linear: nn.Linear,
        *,
        bits: int,
        group_size: int = -1,
        a_bits: int = 16,
        learn_scale: bool = True,
        scale_init: Literal["mse", "lsq"] = "mse",
    ) -> None:
        super().__init__()
        if a_bits == 8 and (bits, group_size) != (8, -1):
            raise ConfigError("8-bit activations need 8-bit weights with one scale per output row")
        if group_size != -1 and (group_size < 1 or linear.in_features % group_size):
            raise ConfigError(f"group_size {group_size} does not divide {linear.in_features} columns")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits, self.group_size, self.a_bits = bits, group_size, a_bits
        self.sym = bits == 8
        self.highest = 2 ** (bits - 1) - 1
        self.lowest = -self.highest if self.sym else -self.highest - 1
        self.weight = nn.Parameter(linear.weight.detach().float())
        self.bias = linear.bias
        if not bool(torch.isfinite(self.weight).all()):
            raise NumericalFailure("weights are NaN or infinite")
        self.scale = None
        self.scale_dtype = torch.float32
        if learn_scale:
            values = self._grouped().detach()
            if scale_init == "lsq":
                scale = lsq_initial_scale(values, self.highest)
            else:
                scale = nearest_initial_scale(values, self.lowest, self.highest)
            if bits < 8 or group_size != -1:
                self.scale_dtype = group_scale_dtype(scale)
            self.scale = nn.Parameter(scale.flatten())
            self.clamp_scale()

    def _grouped(self) -> torch.Tensor:
        """The weight as [out, groups, columns of a group]."""
        columns = self.in_features if self.group_size == -1 else self.group_size
        return self.weight.view(self.out_features, -1, columns)

    def _stored_scale(self, scale: torch.Tensor) -> torch.Tensor:
        """Steps [out, groups, 1] as they will be stored."""
        return scale.detach().to(self.scale_dtype).view(self.out_features, -1, 1)

    def fake_weight(self) -> torch.Tensor:
        """The matrix [out, in] on its grid, float32, with gradients to the weight and its steps."""
        if self.scale is None:
            return straight_through(self.weight, self.quantized().dequantize())
        grouped = self._grouped()
        stored = self._stored_scale(self.scale).float()
        rounded = learned_step(
            grouped,
            straight_through(self.scale.view_as(stored), stored),
            lowest=self.lowest,
            highest=self.highest,
            gradient_scale=lsq_gradient_scale(grouped.shape[-1], self.highest),
        )
        return rounded.view_as(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., out] for x [..., in], in x's type."""
        if self.a_bits == 8:
            codes, scale = quantize_activation(x.detach())
            x = straight_through(x, (codes.float() * scale).to(x.dtype))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.fake_weight().to(x.dtype), bias)

    @torch.no_grad()
    def clamp_scale(self) -> torch.Tensor:
        """Keep learned steps above what their type can store; the number of those that were not."""
        if self.scale is None:
            return torch.zeros((), dtype=torch.int64, device=self.weight.device)
        smallest = _SMALLEST_STEPS[self.scale_dtype]
        hits = (self.scale < smallest).sum()
        self.scale.clamp_(min=smallest)
        return hits

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """The matrix as integers, exactly what `fake_weight` stands for.

        Raises:
            NumericalFailure: training left NaN or infinite values.
        """
        if self.scale is None:
            return quantize_weight(self.weight, bits=self.bits, group_size=self.group_size, sym=self.sym)
        if not bool(torch.isfinite(self.weight).all() & torch.isfinite(self.scale).all()):
            raise NumericalFailure("training left NaN or infinite weights or steps")
        scale = self._stored_scale(self.scale)
        zero = None if self.sym else torch.full_like(scale, -self.lowest, dtype=torch.uint8)
        codes = Grid(self.bits, scale, zero).encode(self._grouped()).view_as(self.weight)
        return QuantizedWeight(
            codes,
            scale[:, :, 0],
            None if zero is None else zero[:, :, 0],
            self.bits,
            self.group_size,
            self.in_features,
        )

    def packed(self) -> QuantizedLinear | Int8Linear:
        """The layer to deploy: the same function from packed integers."""
        if self.a_bits == 8:
            return Int8Linear.from_weight(self.quantized(), self.bias)
        return QuantizedLinear.from_weight(self.quantized(), self.bias)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bits={self.bits}, a_bits={self.a_bits}, "
            f"group_size={self.group_size}, learn_scale={self.scale is not None}"
        )
