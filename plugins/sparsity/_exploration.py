"""Two nested masks over dense weights: one to compute with, a wider one to update."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch

from harness.nn.held_masks import mask_moments
from harness.nn.magnitude import keep_largest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn
    from torch.utils.hooks import RemovableHandle

__all__ = ["Exploration", "largest_shares", "penalty_gradient"]

Masks = dict[str, torch.Tensor]


def largest_shares(weights: Mapping[str, torch.Tensor], share: float, *, scope: str) -> Masks:
    """Bool masks of the ``round(share * n)`` largest magnitudes, of each weight or of all together.

    Of equal magnitudes the last ones are in, so the masks of a smaller share lie within those of a larger.
    """
    if scope == "global":
        total = sum(weight.numel() for weight in weights.values())
        masks = keep_largest(list(weights.values()), total - round(share * total))
        return dict(zip(weights, masks, strict=True))
    return {
        name: keep_largest([weight], weight.numel() - round(share * weight.numel()))[0]
        for name, weight in weights.items()
    }


def penalty_gradient(
    weight: torch.Tensor,
    active: torch.Tensor,
    updated: torch.Tensor,
    *,
    density: float,
    lam: float,
    reg: Literal["l2", "l1"],
) -> torch.Tensor:
    """The gradient of ``lam * sum(c * weight²)`` (l2) or ``lam * sum(c * |weight|)`` (l1).

    c is 1 where a weight is active, ``1 / density`` where it is only updated, 0 elsewhere: the exploration
    regularisation of the paper, by which a weight that is only explored must grow to become active.
    """
    slope = 2 * weight if reg == "l2" else weight.sign()
    return lam * slope * (active + (updated & ~active) / density)


class Exploration:
    """Train with the `density` largest weights in the forward pass, and update `extra` more.

    The parameters hold the sparse weights, except within the optimiser's step, which sees the dense ones and
    whose changes outside the wider masks are taken back: those weights stay to the bit, and no moment of the
    optimiser survives there. Used as ``with exploration: context.train(model, on_start=exploration.start)``.
    Memory is that of dense training and a copy of the weights.

    Args:
        weights: parameters of any shape, by name; changed in place.
        density, extra: shares of the weights, together at most 1.
        scope: ``layer``, the largest of each weight, or ``global``.
        lam, reg: the penalty, see `penalty_gradient`.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        *,
        density: float,
        extra: float,
        scope: str,
        lam: float,
        reg: Literal["l2", "l1"],
    ) -> None:
        self.weights = dict(weights)
        self.density, self.extra, self.scope = density, extra, scope
        self.lam, self.reg = lam, reg
        self.dense = {name: weight.detach().float().clone() for name, weight in weights.items()}
        self.active: Masks = {}
        self.updated: Masks = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self._hooks: list[RemovableHandle] = []
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> int:
        """Choose both masks anew by the dense weights; returns how many weights became active."""
        before = self.active
        self.active = largest_shares(self.dense, self.density, scope=self.scope)
        self.updated = (
            largest_shares(self.dense, self.density + self.extra, scope=self.scope)
            if self.extra
            else self.active
        )
        for name, weight in self.weights.items():
            weight.copy_(self.dense[name].masked_fill(~self.active[name], 0))
            if self._optimizer is not None:
                mask_moments(self._optimizer, weight, self.updated[name])
        return sum(int((self.active[name] & ~mask).sum()) for name, mask in before.items())

    def stop_exploring(self) -> int:
        """From now on only what is active is updated; returns as `refresh`, which is the last one."""
        self.extra = 0.0
        return self.refresh()

    def start(self, optimizer: torch.optim.Optimizer) -> None:
        """For `on_start`: take part in this run's gradients and steps."""
        self._optimizer = optimizer
        self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
        self._hooks.append(optimizer.register_step_post_hook(self._after_step))
        for name, weight in self.weights.items():
            if weight.requires_grad:
                self._hooks.append(
                    weight.register_hook(lambda gradient, name=name: self._gradient(name, gradient))
                )

    def _gradient(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """That of the sparse weights, where they are updated, and that of the penalty."""
        masked = gradient * self.updated[name]
        if not self.lam:
            return masked
        return masked + penalty_gradient(
            self.dense[name],
            self.active[name],
            self.updated[name],
            density=self.density,
            lam=self.lam,
            reg=self.reg,
        )

    @torch.no_grad()
    def _before_step(self, *_: Any) -> None:
        for name, weight in self.weights.items():
            weight.copy_(self.dense[name])

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        for name, weight in self.weights.items():
            dense = self.dense[name]
            dense.copy_(torch.where(self.updated[name], weight, dense))
            weight.copy_(dense.masked_fill(~self.active[name], 0))

    def __enter__(self) -> Exploration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._optimizer = None
