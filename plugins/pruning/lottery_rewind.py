"""A sparse winning ticket: the weights that survive, put back to their early values, train to the same loss.

Paper: The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks. Jonathan Frankle, Michael
Carbin, 2019, arXiv:1803.03635. Rewinding to an early step instead of the start: Frankle, Dziugaite, Roy,
Carbin, 2019, arXiv:1903.01611.

Changes: zeros in the linear layers inside the blocks. The model is trained; the smallest weights are pruned;
all parameters, embeddings and norms too, go back to what they were after `k` steps; and the rest of the run
is replayed with the zeros held, at the same rates, on the same batches, with a fresh optimiser. The zeros are
unstructured: the dense kernel runs over them.

Needs: a `scratch:` model and training tokens: the run of `steps` steps, and for each cycle a replay of it. A
model that is trained already has no early weights here. Memory for one more copy of the weights.

Knobs: `sparsity`; `k` (by default a fiftieth of the run; 0 is the initialisation); `cycles`, in how many
rounds it is pruned; `control`, for comparison: random-mask (as many zeros in each layer at random places) or
random-init (the ticket's mask on other initial weights); `scope`; `min_layer_density`; `steps`; `lr`;
`targets`.

Hurts: costs the training more than twice over. Where the run is too short to converge, a replay gains by the
added training alone: compare with `dense_training_loss`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator

from harness import ConfigError, Method, Paper, hookimpl
from harness.nn.fresh import reinitialised

from ._rewinding import Masks, RewindOptions, prune_and_replay, rewinding_refusal, train_base

if TYPE_CHECKING:
    from torch import nn

    from harness import Context

__all__ = ["METHOD", "LotteryOptions", "random_masks"]


class LotteryOptions(RewindOptions):
    k: int | None = Field(None, ge=0, description="step to rewind to; by default a fiftieth of the run")
    control: Literal["none", "random-mask", "random-init"] = "none"

    @model_validator(mode="after")
    def _within_the_run(self) -> LotteryOptions:
        if self.k is not None and self.steps is not None and self.k >= self.steps:
            raise ValueError(_too_late(self.k, self.steps))
        return self


def _too_late(k: int, steps: int) -> str:
    return f"k={k} must be before the end of the run of {steps} steps"


def random_masks(masks: Masks, held: Masks, generator: torch.Generator) -> Masks:
    """As many kept places in each layer as in `masks`, drawn from those kept in `held`."""
    drawn = {}
    for name, mask in masks.items():
        live = held[name].flatten().nonzero().squeeze(1).cpu()
        kept = live[torch.randperm(len(live), generator=generator)[: int(mask.sum())]]
        flat = torch.zeros(mask.numel(), dtype=torch.bool)
        flat[kept] = True
        drawn[name] = flat.view(mask.shape).to(mask.device)
    return drawn


def transform(model: nn.Module, options: LotteryOptions, context: Context) -> nn.Module:
    steps = context.training_steps(options.steps)
    k = max(1, steps // 50) if options.k is None else options.k
    if k >= steps:
        raise ConfigError(_too_late(k, steps))
    generator = context.generator("lottery control")
    fresh = reinitialised(model, generator) if options.control == "random-init" else None
    early = train_base(model, options, context, steps, keep_after=k)
    if fresh is not None:
        early = {name: parameter.detach().float() for name, parameter in fresh.named_parameters()}
    if options.control == "random-mask":
        prune_and_replay(
            model,
            options,
            context,
            steps=steps,
            first_step=k,
            rewind_to=early,
            choose=lambda masks, held: random_masks(masks, held, generator),
        )
    else:
        prune_and_replay(model, options, context, steps=steps, first_step=k, rewind_to=early)
    context.record("rewound_to_step", k, "steps", f"of {steps}")
    return model


METHOD = Method(
    name="lottery-rewind",
    family="pruning",
    paper=Paper(
        title="The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks",
        authors="Frankle, Carbin",
        year=2019,
        arxiv="1803.03635",
    ),
    options=LotteryOptions,
    transform=transform,
    needs=("training",),
    applies=lambda info, _options: rewinding_refusal(info),
    trains_scratch=True,
    leaves_zeros=True,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
