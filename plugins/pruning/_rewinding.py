"""What the rewinding methods share: they train their own model, prune it, and replay its training.

Only of a run made here are the early weights, the rates and the batches known, so only `scratch:` models fit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator

from harness import Options
from harness.nn.held_masks import HeldMasks
from harness.nn.magnitude import keep_masks, live_magnitudes
from harness.nn.pruned import all_kept, record_masks, target_weights
from harness.nn.surgery import Targets

from ._scope import require_reachable
from ._trained import training_refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from harness import Context, ModelInfo

__all__ = ["RewindOptions", "even_cycles", "prune_and_replay", "rewinding_refusal", "train_base"]

Masks = dict[str, torch.Tensor]


class RewindOptions(Options):
    """`steps` is the length of the run that is made and then replayed."""

    sparsity: float = Field(0.8, ge=0, lt=1, description="share of zeros at the end")
    cycles: int = Field(
        1, ge=1, le=50, description="prune so many times, each time the same share of the rest"
    )
    scope: Literal["layer", "global", "row"] = "global"
    min_layer_density: float = Field(0.01, ge=0, le=1, description="kept at least; scope=global")
    steps: int | None = Field(None, ge=1, description="of the run; by default the sweep's training budget")
    lr: float | None = Field(None, gt=0, description="peak learning rate of the run; by default the loop's")
    targets: Targets = Field(None, description="regular expression for the layers' names")

    @model_validator(mode="after")
    def _can_be_reached(self) -> RewindOptions:
        require_reachable(self.sparsity, self.scope, self.min_layer_density)
        return self


def even_cycles(sparsity: float, cycles: int) -> list[float]:
    """The share of zeros after each cycle: each prunes the same share of what is left.

    >>> [round(share, 3) for share in even_cycles(0.75, 2)]
    [0.5, 0.75]
    """
    return [1 - (1 - sparsity) ** (cycle / cycles) for cycle in range(1, cycles)] + [sparsity]


def train_base(
    model: nn.Module, options: RewindOptions, context: Context, steps: int, *, keep_after: int | None = None
) -> dict[str, torch.Tensor]:
    """Train the dense model; returns all parameters, float32, as they were after `keep_after` steps."""
    early: dict[str, torch.Tensor] = {}

    def keep() -> None:
        early.update({name: p.detach().float().clone() for name, p in model.named_parameters()})

    def on_step(step: int, _model: nn.Module) -> None:
        if step + 1 == keep_after:
            keep()

    if keep_after == 0:
        keep()
    report = context.train(model, steps=steps, lr=options.lr, on_step=on_step)
    context.record("dense_training_loss", report.final_loss, "nats", "before pruning, mean of the last tenth")
    return early


def prune_and_replay(
    model: nn.Module,
    options: RewindOptions,
    context: Context,
    *,
    steps: int,
    first_step: int,
    rewind_to: Mapping[str, torch.Tensor] | None,
    choose: Callable[[Masks, Masks], Masks] = lambda chosen, _held: chosen,
) -> None:
    """Prune the trained model by magnitude and train it again from `first_step` on, once for each cycle.

    The replay has the rates and the batches that the run of `steps` steps had there, and a fresh optimiser.

    Args:
        rewind_to: what all parameters become before each replay; left as trained where None.
        choose: from the masks by magnitude, and those held so far, to the masks to hold.
    """
    weights = target_weights(model, options.targets)
    report = None
    held = HeldMasks(weights, all_kept(weights))

    @torch.no_grad()
    def rewind(optimizer: torch.optim.Optimizer) -> None:
        # Here the parameters are the loop's float32 masters, so the early weights come back exactly.
        if rewind_to is not None:
            for name, parameter in model.named_parameters():
                parameter.copy_(rewind_to[name])
        held.hold()
        held.start(optimizer)

    for sparsity in even_cycles(options.sparsity, options.cycles):
        scores = live_magnitudes(weights, held.masks)
        masks = keep_masks(scores, sparsity, options.scope, options.min_layer_density)
        held.change(choose(masks, held.masks))
        with held:
            report = context.train(
                model,
                steps=steps,
                lr=options.lr,
                first_step=first_step,
                on_start=rewind,
                on_step=held.hold,
            )
    if report is not None and report.steps:
        context.record("training_loss", report.final_loss, "nats", "after pruning, mean of the last tenth")
    record_masks(context, model, weights, held.masks)


def rewinding_refusal(info: ModelInfo) -> str | None:
    """Why there is no run to rewind."""
    if (reason := training_refusal(info)) is not None:
        return reason
    if not info.scratch:
        return (
            "it rewinds the model's own training run, and a trained model comes without that run's early "
            "weights, rates and batches; use a scratch: model, which it trains itself"
        )
    return None
