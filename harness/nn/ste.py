"""Rounding that gradients pass straight through: the training form of the int8 linear layers.

Forward, values lie on the grid that will be stored; backward, rounding counts as the identity where it goes
to the nearest point and as a constant where the range of the grid clips it.

Source: Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons"
(arXiv:1308.3432), the straight-through estimator.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from harness.nn.quantizer import quantize_activation, quantize_row_groups

__all__ = ["SteLinear", "round_clipped", "round_rows", "round_tokens"]


def round_clipped(values: torch.Tensor, scale: torch.Tensor, highest: int) -> torch.Tensor:
    """``scale * clip(round(values / scale), -highest, highest)``; the gradient passes where none is clipped.

    Args:
        scale: positive, broadcasts against `values`; a constant.
    """
    steps = values / scale
    rounded = steps.detach().round()
    passing = torch.where(rounded.abs() <= highest, steps, steps.detach())
    return (rounded.clamp(-highest, highest) + (passing - passing.detach())) * scale


def round_rows(weight: torch.Tensor, *, bits: int, row_groups: int) -> torch.Tensor:
    """A matrix [out, in] as `quantize_row_groups` rounds it, scales from the matrix as it is now.

    Raises:
        ConfigError, NumericalFailure: as `quantize_row_groups`.
    """
    scale = quantize_row_groups(weight, bits=bits, row_groups=row_groups).scale
    return round_clipped(weight, scale, 2 ** (bits - 1) - 1)


def round_tokens(x: torch.Tensor) -> torch.Tensor:
    """Activations [..., d] as int8 with one scale per token holds them; none is clipped."""
    codes, scale = quantize_activation(x.detach())
    return x + (codes * scale - x).detach()


class SteLinear(nn.Module):
    """What an `Int8Linear` made of these weights would compute, in floating point and trainable.

    Shares the parameters of `linear`. Weights of `bits` in `row_groups` (-1: one per row), int8 tokens.
    """

    simulated = True

    def __init__(self, linear: nn.Linear, *, bits: int, row_groups: int = -1) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits, self.row_groups = bits, self.out_features if row_groups == -1 else row_groups
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., out] for x [..., in]."""
        weight = round_rows(self.weight, bits=self.bits, row_groups=self.row_groups)
        return functional.linear(round_tokens(x), weight, self.bias)
