"""Zeros come gradually while the model trains, fast at first and slowly at the end.

Paper: To prune, or not to prune: exploring the efficacy of pruning for model compression. Michael Zhu,
Suyog Gupta, 2017, arXiv:1710.01878.

Changes: zeros in the linear layers inside the blocks, at a share that rises along a cubic curve from
`initial` to `sparsity` between the shares `start` and `end` of the run; then the masks stay and training goes
on. Pruned weights are not updated but keep their values, and one comes back when the others have become
smaller than it. The zeros are unstructured: the dense kernel runs over them. `bitmap_bytes` records what a
bitmap and the survivors would take.

Needs: training tokens. A `scratch:` model is pruned while it is trained for the first time; random weights
(`shape:` models) are only pruned.

Knobs: `sparsity`; `initial`; `start`, `end` and `every` (steps between two prunings; a fiftieth of the run);
`revive` (False: what is pruned stays so); `scope`, over which weights compete (`layer`, `row`, `global`);
`min_layer_density`, what a layer keeps at least under `global`; `targets`; `steps` and `lr` (the sweep's).

Hurts: the training budget; and memory, a second copy of the pruned layers where weights can come back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from harness import ConfigError, Method, Options, Paper, hookimpl
from harness.nn.held_masks import HeldMasks
from harness.nn.magnitude import keep_masks, live_magnitudes
from harness.nn.pruned import all_kept, burn_in, record_masks, target_weights
from harness.nn.surgery import Targets

from ._scope import require_reachable
from ._trained import training_refusal

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from harness import Context

__all__ = ["METHOD", "GmpOptions", "cubic_sparsity", "pruning_schedule"]


class GmpOptions(Options):
    aliases: ClassVar[Mapping[str, str]] = {"s_f": "sparsity", "s_i": "initial", "t0": "start", "dt": "every"}

    sparsity: float = Field(0.8, ge=0, lt=1, description="share of zeros at the end")
    initial: float = Field(0.0, ge=0, lt=1, description="share of zeros at the first pruning")
    start: float = Field(0.1, ge=0, lt=1, description="first pruning, as a share of the run")
    end: float = Field(0.8, gt=0, le=1, description="last pruning, as a share of the run")
    every: int | None = Field(None, ge=1, description="steps between prunings; by default a fiftieth")
    revive: bool = Field(True, description="a pruned weight may come back with the value that it had")
    scope: Literal["layer", "global", "row"] = "layer"
    min_layer_density: float = Field(0.01, ge=0, le=1, description="kept at least; scope=global")
    steps: int | None = Field(None, ge=1, description="training steps; by default the sweep's")
    lr: float | None = Field(None, gt=0, description="peak learning rate; by default the loop's")
    targets: Targets = Field(None, description="regular expression for the layers' names")

    @model_validator(mode="after")
    def _ordered(self) -> GmpOptions:
        if self.initial > self.sparsity:
            raise ValueError(f"initial={self.initial} is above sparsity={self.sparsity}; zeros only grow")
        if self.end <= self.start:
            raise ValueError(f"end={self.end} must be after start={self.start}")
        require_reachable(self.sparsity, self.scope, self.min_layer_density)
        return self


def cubic_sparsity(progress: float, initial: float, final: float) -> float:
    """The share of zeros at `progress` in [0, 1] of the pruning (equation 1 of the paper)."""
    return final + (initial - final) * (1 - progress) ** 3


def pruning_schedule(
    steps: int, *, start: float, end: float, every: int | None, initial: float, final: float
) -> dict[int, float]:
    """The share of zeros from each pruning on, by the number of training steps before it.

    The first pruning is at ``round(start * steps)``, the others follow `every` steps apart (by default a
    fiftieth of the run, at least 1), the last one at most at ``round(end * steps)``.

    Raises:
        ConfigError: so few steps that there is no room for a second pruning.
    """
    first, last = round(start * steps), round(end * steps)
    every = every or max(1, steps // 50)
    prunings = (last - first) // every
    if prunings < 1:
        raise ConfigError(
            f"between steps {first} and {last} of {steps} there is no room for prunings {every} steps apart; "
            "give more steps, or smaller every"
        )
    return {
        first + number * every: cubic_sparsity(number / prunings, initial, final)
        for number in range(prunings + 1)
    }


def transform(model: nn.Module, options: GmpOptions, context: Context) -> nn.Module:
    weights = target_weights(model, options.targets)

    def masks_of(values: Mapping[str, torch.Tensor], sparsity: float) -> dict[str, torch.Tensor]:
        return keep_masks(values, sparsity, options.scope, options.min_layer_density)

    if context.info.synthetic:
        masks = masks_of(weights, options.sparsity)
        burn_in(weights, masks)
        record_masks(context, model, weights, masks)
        return model
    steps = context.training_steps(options.steps)
    schedule = pruning_schedule(
        steps,
        start=options.start,
        end=options.end,
        every=options.every,
        initial=options.initial,
        final=options.sparsity,
    )
    with HeldMasks(weights, all_kept(weights), remember=options.revive) as held:

        def prune(before: int) -> None:
            if before in schedule:
                held.change(masks_of(_scores(held, revive=options.revive), schedule[before]))

        def on_step(step: int, model: nn.Module) -> None:
            held.hold(step, model)
            prune(step + 1)

        prune(0)
        report = context.train(model, steps=steps, lr=options.lr, on_start=held.start, on_step=on_step)
    context.record("training_loss", report.final_loss, "nats", "mean of the last tenth")
    record_masks(context, model, weights, held.masks)
    return model


def _scores(held: HeldMasks, *, revive: bool) -> dict[str, torch.Tensor]:
    """What competes: the values kept for pruned weights too, or else none of them."""
    if revive:
        return {name: held.full(name) for name in held.weights}
    return live_magnitudes(held.weights, held.masks)


METHOD = Method(
    name="gmp",
    family="pruning",
    paper=Paper(
        title="To prune, or not to prune: exploring the efficacy of pruning for model compression",
        authors="Zhu, Gupta",
        year=2017,
        arxiv="1710.01878",
    ),
    options=GmpOptions,
    transform=transform,
    needs=("training",),
    applies=lambda info, _options: training_refusal(info),
    trains_scratch=True,
    leaves_zeros=True,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
