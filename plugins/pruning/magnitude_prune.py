"""The smallest weights become zero: large networks lose half of them at little cost.

Paper: Learning both Weights and Connections for Efficient Neural Networks. Song Han, Jeff Pool,
John Tran, William J. Dally, 2015, arXiv:1506.02626. Compared with other ways in Gale, Elsen,
Hooker, 2019, arXiv:1902.09574.

Changes: zeros in the linear layers inside the blocks; embeddings, norms, biases and the head stay.
The zeros are unstructured: the dense kernel runs over them, so nothing gets faster or smaller. What
a bitmap and the surviving weights would take is recorded as `bitmap_bytes`, a theoretical size.

Needs: nothing; with `steps` it retrains, the zeros held at zero (weights, gradients, optimiser).

Knobs: `sparsity`; `scope`, over which weights compete (`layer`, `row` of a layer, `global`);
`min_layer_density`, what a layer keeps at least under `global`; `steps`; `targets`, a regular
expression for the names of layers.

Hurts: beyond half without retraining; on small, well-trained models much earlier.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from harness import Method, Options, Paper, hookimpl
from harness.nn.surgery import block_linears

from ._magnitude import count_of, global_keep_masks, keep_largest, keep_largest_of_rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from harness import Context, ModelInfo

__all__ = ["METHOD", "MagnitudeOptions", "bitmap_bytes", "keep_masks"]


class MagnitudeOptions(Options):
    sparsity: float = Field(0.5, ge=0, lt=1, description="share of the weights that become zero")
    scope: Literal["layer", "global", "row"] = "layer"
    steps: int = Field(0, ge=0, description="retraining steps with the zeros held")
    targets: str | None = Field(None, description="regular expression for the layers' names")
    min_layer_density: float = Field(0.01, ge=0, le=1, description="kept at least; scope=global")


def keep_masks(
    weights: Mapping[str, torch.Tensor],
    sparsity: float,
    scope: str = "layer",
    min_layer_density: float = 0.01,
) -> dict[str, torch.Tensor]:
    """Bool masks, True where a weight [out, in] stays: the largest magnitudes, in exact number."""
    if scope == "global":
        masks = global_keep_masks(list(weights.values()), sparsity, min_layer_density)
        return dict(zip(weights, masks, strict=True))
    if scope == "row":
        return {
            name: keep_largest_of_rows(weight, count_of(sparsity, weight.shape[1]))
            for name, weight in weights.items()
        }
    return {
        name: keep_largest([weight], count_of(sparsity, weight.numel()))[0]
        for name, weight in weights.items()
    }


def bitmap_bytes(weight: torch.Tensor, keep: torch.Tensor) -> int:
    """One bit for each place and the surviving values in the weight's own type."""
    return -(-weight.numel() // 8) + int(keep.sum()) * weight.element_size()


def transform(model: nn.Module, options: MagnitudeOptions, context: Context) -> nn.Module:
    linears = dict(block_linears(model, targets=options.targets))
    weights = {name: linear.weight for name, linear in linears.items()}
    masks = keep_masks(weights, options.sparsity, options.scope, options.min_layer_density)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.mul_(masks[name])
    _record(context, model, weights, masks)
    if options.steps:
        _retrain(model, options, context, [(weights[name], masks[name]) for name in weights])
    return model


def _retrain(
    model: nn.Module,
    options: MagnitudeOptions,
    context: Context,
    pruned: list[tuple[torch.Tensor, torch.Tensor]],
) -> None:
    @torch.no_grad()
    def hold(_step: int = 0, _model: nn.Module | None = None) -> None:
        for weight, keep in pruned:
            weight.mul_(keep)

    # Without a gradient Adam's moments of a pruned weight stay zero, so it never wants to come
    # back; decay of a zero is zero. Multiplying after each step makes it certain.
    hooks = [weight.register_hook(lambda gradient, keep=keep: gradient * keep) for weight, keep in pruned]
    try:
        context.train(model, steps=options.steps, on_step=hold)
    finally:
        for hook in hooks:
            hook.remove()


def _record(
    context: Context,
    model: nn.Module,
    weights: Mapping[str, torch.Tensor],
    masks: Mapping[str, torch.Tensor],
) -> None:
    zeros = sum(int((~keep).sum()) for keep in masks.values())
    places = sum(keep.numel() for keep in masks.values())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    bitmap = sum(bitmap_bytes(weights[name], keep) for name, keep in masks.items())
    theoretical = "theoretical size of the pruned layers; the dense weights are what runs"
    context.record("bitmap_bytes", bitmap, "B", theoretical)
    context.record("pruned_share_of_targets", zeros / places, "1")
    context.record("pruned_share_of_all_parameters", zeros / parameters, "1")
    context.record("lowest_layer_density", min(keep.float().mean().item() for keep in masks.values()), "1")


def applies(info: ModelInfo, options: MagnitudeOptions) -> str | None:
    if info.family == "other":
        return f"architecture {info.model_type!r} is not known"
    if options.steps and info.kind == "encoder":
        return "encoders have no training objective here; leave steps at 0"
    return None


METHOD = Method(
    name="magnitude-prune",
    family="pruning",
    paper=Paper(
        title="Learning both Weights and Connections for Efficient Neural Networks",
        authors="Han, Pool, Tran, Dally",
        year=2015,
        arxiv="1506.02626",
    ),
    options=MagnitudeOptions,
    transform=transform,
    needs=lambda options: ("training",) if options.steps else (),
    applies=applies,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
