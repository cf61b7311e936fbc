"""Low-rank adapters over a frozen layer.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685): the layer
computes ``base(x) + alpha / rank * B A x`` with a random A and a zero B, so that at first it computes what
the base does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

__all__ = ["LoraLinear"]


class LoraLinear(nn.Module):
    """A linear layer that stays as it is, and a trainable product of two thin matrices beside it.

    Args:
        base: has `in_features`, `out_features`, `bits`, `kernel_name` and `dense_weight`; frozen here.
        rank: columns of B and rows of A.
        alpha: the product counts ``alpha / rank`` times.
        generator: on the CPU; draws A uniformly within ``1 / sqrt(in)``, as `nn.Linear` its weight.
        dtype, device: of A and B.
    """

    simulated = False

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int,
        alpha: float,
        generator: torch.Generator,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        sized: Any = base
        self.in_features: int = sized.in_features
        self.out_features: int = sized.out_features
        self.rank, self.alpha = rank, alpha
        self.base = base.requires_grad_(False)
        bound = 1 / math.sqrt(self.in_features)
        down = (torch.rand(rank, self.in_features, generator=generator) * 2 - 1) * bound
        self.lora_a = nn.Parameter(down.to(device, dtype))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, dtype=dtype, device=device))

    @property
    def bits(self) -> float:
        """Nominal bits of a weight of the base, and the adapters' share."""
        adapters = 8 * self.lora_a.element_size() * (self.lora_a.numel() + self.lora_b.numel())
        base: Any = self.base
        return float(base.bits) + adapters / (self.in_features * self.out_features)

    @property
    def kernel_name(self) -> str:
        """That of the base, and the two thin products."""
        return f"{self.base.kernel_name}+lora"

    def dense_weight(self) -> torch.Tensor:
        """The matrix [out, in] that base and adapters amount to, float32."""
        base: Any = self.base
        product = self.lora_b.detach().float() @ self.lora_a.detach().float()
        weight: torch.Tensor = base.dense_weight() + self.alpha / self.rank * product
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., out] for x [..., in]."""
        y: torch.Tensor = self.base(x)
        return y + functional.linear(functional.linear(x, self.lora_a), self.lora_b) * (
            self.alpha / self.rank
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, alpha={self.alpha}"
