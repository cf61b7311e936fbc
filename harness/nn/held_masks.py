"""Weights that keep their zeros while they are trained.

A mask is bool, True where a weight stays. Around the one training loop, a pruned place is zero in every
forward pass, its gradient is zero before the gradients are clipped, and the optimiser holds no moment
for it, so neither momentum nor decay moves it. Nothing comes back except by `HeldMasks.change`.

The forms of storage are dense: training takes as much memory as without masks (and a copy of the pruned
values where they are remembered).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

__all__ = ["HeldMasks", "mask_moments"]


def mask_moments(optimizer: torch.optim.Optimizer, weight: torch.Tensor, keep: torch.Tensor) -> None:
    """Zero what the optimiser remembers of a weight outside `keep`; scalars such as its step count stay."""
    for value in optimizer.state.get(weight, {}).values():
        if isinstance(value, torch.Tensor) and value.shape == weight.shape:
            value.mul_(keep)


class HeldMasks:
    """Hold masks: ``with masks: context.train(model, on_start=masks.start, on_step=masks.hold)``.

    Weights are zeroed where the masks are False, at once.

    Args:
        weights: parameters of any shape, by name; the model's own, changed in place.
        masks: bool, of the same names and shapes.
        remember: keep the values that pruned weights had, so that `change` can bring them back.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        masks: Mapping[str, torch.Tensor],
        *,
        remember: bool = False,
    ) -> None:
        self.weights = dict(weights)
        self.masks = {name: torch.ones_like(self.weights[name], dtype=torch.bool) for name in weights}
        self._remembered = (
            {name: weight.detach().clone() for name, weight in weights.items()} if remember else None
        )
        self._optimizer: torch.optim.Optimizer | None = None
        self._hooks: list[RemovableHandle] = []
        self.change(masks)

    @torch.no_grad()
    def full(self, name: str) -> torch.Tensor:
        """A weight with the remembered values in its pruned places (zeros where nothing is remembered)."""
        weight = self.weights[name].detach()
        if self._remembered is None:
            return weight
        return torch.where(self.masks[name], weight, self._remembered[name].to(weight.dtype))

    @torch.no_grad()
    def change(self, masks: Mapping[str, torch.Tensor]) -> None:
        """Hold other masks from now on. A place that comes back has its remembered value, or zero."""
        for name, weight in self.weights.items():
            values = self.full(name)
            if self._remembered is not None:
                values = self._remembered[name] = values.clone()
            self.masks[name] = masks[name]
            weight.copy_(values.masked_fill(~masks[name], 0))
            if self._optimizer is not None:
                mask_moments(self._optimizer, weight, masks[name])

    def start(self, optimizer: torch.optim.Optimizer) -> None:
        """For `on_start`: mask the gradients as soon as they are computed, in this run's optimiser."""
        self._optimizer = optimizer
        # Registered only now: the loop gives a half-precision parameter other data before it starts.
        for name, weight in self.weights.items():
            if weight.requires_grad:
                self._hooks.append(
                    weight.register_hook(lambda gradient, name=name: gradient * self.masks[name])
                )

    @torch.no_grad()
    def hold(self, _step: int = 0, _model: nn.Module | None = None) -> None:
        """For `on_step`. Without gradient and moments nothing moved; this makes it certain."""
        for name, weight in self.weights.items():
            weight.mul_(self.masks[name])

    def __enter__(self) -> HeldMasks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._optimizer = None
