"""Rounding-like noise on the weights while training, so that a small model tolerates quantization.

Large language models lose almost nothing at 4 bits because they have weights to spare; a model of a few
million parameters trained for long has none, and would make every 4-bit method look bad. Gradients taken
at weights that are moved as rounding to a grid would move them (Défossez, Adi & Synnaeve 2021, DiffQ,
arXiv:2104.09987: uniform noise of one step's width stands in for rounding) lead to minima in which such
moves cost little.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from harness.errors import ConfigError
from harness.nn.surgery import block_linears

__all__ = ["WeightNoise", "noisy_weights", "rounding_noise"]


def noisy_weights(model: PreTrainedModel) -> list[torch.Tensor]:
    """The matrices [out, in] that quantization methods change: those inside the blocks."""
    return [linear.weight for _, linear in block_linears(model)]


def rounding_noise(groups: torch.Tensor, levels: int, uniform: torch.Tensor) -> torch.Tensor:
    """Noise of one quantization step's width for each weight.

    Args:
        groups: weights [groups, group size]; a group shares a step of (max - min) / `levels`.
        uniform: numbers in [0, 1) of the same shape.
    """
    step = (groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True)) / levels
    return (uniform - 0.5) * step


class WeightNoise:
    """Moves the weights while the gradient is taken, and puts them back exactly.

    Args:
        weights: matrices [out, in].
        levels: steps from the smallest to the largest weight of a group (15 is a 4-bit grid).
        group_size: along the input dimension; must divide it.

    Raises:
        ConfigError: a group size that does not divide a matrix's input dimension.
    """

    def __init__(self, weights: Sequence[torch.Tensor], levels: int, group_size: int, seed: int) -> None:
        for weight in weights:
            if weight.shape[1] % group_size:
                raise ConfigError(
                    f"--weight-noise-group {group_size} does not divide "
                    f"an input dimension of {weight.shape[1]}"
                )
        self._weights = [weight.data for weight in weights]
        self._sizes = [weight.numel() for weight in weights]
        self._levels, self._group_size = levels, group_size
        self._generator = torch.Generator(weights[0].device).manual_seed(seed)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The weights are noisy inside and as before afterwards."""
        clean = torch.cat([weight.flatten() for weight in self._weights])
        groups = clean.view(-1, self._group_size)
        uniform = torch.rand(groups.shape, generator=self._generator, device=groups.device)
        self._write(clean + rounding_noise(groups, self._levels, uniform).flatten())
        try:
            yield
        finally:
            self._write(clean)

    def _write(self, flat: torch.Tensor) -> None:
        parts = [
            part.view_as(weight) for part, weight in zip(flat.split(self._sizes), self._weights, strict=True)
        ]
        torch._foreach_copy_(self._weights, parts)
