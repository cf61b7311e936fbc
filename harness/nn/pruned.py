"""Pruned layers: which ones there are, their zeros, and what is recorded of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from harness.errors import ConfigError
from harness.nn.held_masks import HeldMasks
from harness.nn.surgery import block_linears

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from harness.context import Context

__all__ = [
    "ZeroCount",
    "all_kept",
    "bitmap_bits",
    "bitmap_bytes",
    "burn_in",
    "held_zeros",
    "is_pruned",
    "note_before_others",
    "record_masks",
    "target_weights",
]


_PRUNED_SHARE = 0.01
"""Zeros of a matrix that pruning made; training leaves hardly any."""


def is_pruned(weight: torch.Tensor) -> bool:
    """Whether a matrix [out, in] has so many zeros that a method must have made them."""
    return weight.numel() > 0 and int((weight == 0).sum()) >= _PRUNED_SHARE * weight.numel()


def held_zeros(model: nn.Module) -> HeldMasks:
    """Masks that hold the zeros of the matrices among the parameters that are pruned."""
    matrices = ((name, weight) for name, weight in model.named_parameters() if weight.dim() == 2)
    pruned = {name: weight for name, weight in matrices if is_pruned(weight.detach())}
    return HeldMasks(pruned, {name: weight.detach() != 0 for name, weight in pruned.items()})


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


def bitmap_bits(places: int, kept: int, value_bits: int) -> int:
    """One bit for each place, in whole bytes, and the surviving values of so many bits."""
    return -(-places // 8) * 8 + kept * value_bits


def bitmap_bytes(weight: torch.Tensor, keep: torch.Tensor) -> int:
    """One bit for each place and the surviving values in the weight's own type."""
    return bitmap_bits(weight.numel(), int(keep.sum()), 8 * weight.element_size()) // 8


def note_before_others(context: Context) -> str | None:
    """For figures of zeros that a method which follows in the chain may fill or add to."""
    if context.last_in_chain:
        return None
    return "before what follows in the chain; `sparsity` is that of the model that is measured"


@dataclass
class ZeroCount:
    """What was pruned, added up layer by layer.

    Args:
        parameters: of the whole model, before any of it was packed.
    """

    parameters: int
    zeros: int = 0
    places: int = 0
    stored_bits: int = 0
    lowest_density: float = 1.0

    @classmethod
    def of(cls, model: nn.Module) -> ZeroCount:
        """Nothing yet, of a model that is still dense."""
        return cls(sum(parameter.numel() for parameter in model.parameters()))

    def add(self, keep: torch.Tensor, value_bits: int) -> None:
        """Take in a layer's keep mask; a surviving value takes `value_bits`."""
        kept, places = int(keep.sum()), keep.numel()
        self.zeros += places - kept
        self.places += places
        self.stored_bits += bitmap_bits(places, kept, value_bits)
        self.lowest_density = min(self.lowest_density, kept / places)

    def record(self, context: Context, compressed: Sequence[str] = ()) -> None:
        """Store the figures under the names that all pruning methods use.

        Args:
            compressed: the layers that are stored without their zeros; where there are any, no size on
                paper is recorded beside the real one.
        """
        if not self.places:
            raise ConfigError("no layer was pruned")
        note = note_before_others(context)
        if not compressed:
            theoretical = "theoretical size of the pruned layers; the dense weights are what runs"
            context.record(
                "bitmap_bytes", self.stored_bits / 8, "B", f"{theoretical}; {note}" if note else theoretical
            )
        context.record("pruned_share_of_targets", self.zeros / self.places, "1", note)
        context.record("pruned_share_of_all_parameters", self.zeros / self.parameters, "1", note)
        context.record("lowest_layer_density", self.lowest_density, "1", note)


def record_masks(
    context: Context,
    model: nn.Module,
    weights: Mapping[str, torch.Tensor],
    masks: Mapping[str, torch.Tensor],
) -> None:
    """Store how much is pruned, of the targets and of all, and the size on paper."""
    count = ZeroCount.of(model)
    for name, keep in masks.items():
        count.add(keep, 8 * weights[name].element_size())
    count.record(context)
