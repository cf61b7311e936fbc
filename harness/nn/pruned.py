"""Pruned layers: which ones there are, their zeros, and what is recorded of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from harness.nn.surgery import block_linears

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from harness.context import Context

__all__ = ["all_kept", "bitmap_bytes", "burn_in", "record_masks", "target_weights"]


def target_weights(model: nn.Module, targets: str | None) -> dict[str, nn.Parameter]:
    """The weights [out, in] of the linear layers inside the blocks, by the layer's name.

    Raises:
        ConfigError: `targets` is no regular expression or matches nothing.
    """
    layers = block_linears(model, targets=targets)
    return {name: cast("nn.Parameter", linear.weight) for name, linear in layers}


def all_kept(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Masks that prune nothing."""
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}


@torch.no_grad()
def burn_in(weights: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor]) -> None:
    """Zero the weights outside their masks, in place."""
    for name, weight in weights.items():
        weight.mul_(masks[name])


def bitmap_bytes(weight: torch.Tensor, keep: torch.Tensor) -> int:
    """One bit for each place and the surviving values in the weight's own type."""
    return -(-weight.numel() // 8) + int(keep.sum()) * weight.element_size()


def record_masks(
    context: Context,
    model: nn.Module,
    weights: Mapping[str, torch.Tensor],
    masks: Mapping[str, torch.Tensor],
) -> None:
    """Store how much is pruned, of the targets and of all, and the size on paper."""
    zeros = sum(int((~keep).sum()) for keep in masks.values())
    places = sum(keep.numel() for keep in masks.values())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    bitmap = sum(bitmap_bytes(weights[name], keep) for name, keep in masks.items())
    theoretical = "theoretical size of the pruned layers; the dense weights are what runs"
    context.record("bitmap_bytes", bitmap, "B", theoretical)
    context.record("pruned_share_of_targets", zeros / places, "1")
    context.record("pruned_share_of_all_parameters", zeros / parameters, "1")
    context.record("lowest_layer_density", min(keep.float().mean().item() for keep in masks.values()), "1")
