"""Training under rounding in row groups: forward on the grid, backward straight through."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from harness.nn.quantizer import quantize_activation
from harness.nn.row_groups import quantize_in_row_groups

__all__ = ["RoundedLinear"]


class RoundedLinear(nn.Module):
    """A linear layer that computes with its weights as they will be stored, and trains the exact ones.

    The range of a group is that of its weights at every step. Source of the estimator: Bengio et al. 2013,
    arXiv:1308.3432.
    """

    simulated = True  # of training only: the packed layer takes its place

    def __init__(self, linear: nn.Linear, *, bits: int, sizes: Sequence[int], a_bits: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.bits, self.sizes, self.a_bits = bits, tuple(sizes), a_bits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rounded = quantize_in_row_groups(self.weight, bits=self.bits, sizes=self.sizes).dequantize()
        weight = self.weight + (rounded - self.weight).detach()
        if self.a_bits == 8:
            codes, scale = quantize_activation(x.detach().flatten(0, -2))
            x = x + ((codes * scale).view(x.shape) - x).detach()
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)
