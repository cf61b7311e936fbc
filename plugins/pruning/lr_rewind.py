"""After pruning, only the learning rate goes back: trained weights at early rates match rewound weights.

Paper: Comparing Rewinding and Fine-tuning in Neural Network Pruning. Alex Renda, Jonathan Frankle, Michael
Carbin, 2020, arXiv:2003.02389.

Changes: zeros in the linear layers inside the blocks. The model is trained; the smallest weights are pruned;
the others keep their trained values; and the last `t` steps of the run are replayed with the zeros held, at
the same rates, on the same batches, with a fresh optimiser. The zeros are unstructured: the dense kernel runs
over them.

Needs: a `scratch:` model and training tokens: the run of `steps` steps, and for each cycle a replay of it. Of
a model that is trained already, the rates and the length of the run are not known here.

Knobs: `sparsity`; `t` (by default the whole run, warm-up included; 0: no retraining); `cycles`, in how many
rounds it is pruned (the paper recommends many); `scope`; `min_layer_density`; `steps`; `lr`; `targets`.

Hurts: costs the training again for each cycle. Where the run is too short to converge, a replay gains by the
added training alone: compare with `dense_training_loss`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from harness import ConfigError, Method, Paper, hookimpl

from ._rewinding import RewindOptions, prune_and_replay, rewinding_refusal, train_base

if TYPE_CHECKING:
    from torch import nn

    from harness import Context

__all__ = ["METHOD", "LrRewindOptions"]


class LrRewindOptions(RewindOptions):
    t: int | None = Field(None, ge=0, description="steps replayed, the last ones; by default the whole run")

    @model_validator(mode="after")
    def _within_the_run(self) -> LrRewindOptions:
        if self.t is not None and self.steps is not None and self.t > self.steps:
            raise ValueError(_too_many(self.t, self.steps))
        return self


def _too_many(t: int, steps: int) -> str:
    return f"t={t} is more than the run has, {steps} steps"


def transform(model: nn.Module, options: LrRewindOptions, context: Context) -> nn.Module:
    steps = context.training_steps(options.steps)
    t = steps if options.t is None else options.t
    if t > steps:
        raise ConfigError(_too_many(t, steps))
    train_base(model, options, context, steps)
    prune_and_replay(model, options, context, steps=steps, first_step=steps - t, rewind_to=None)
    context.record("replayed_steps", t, "steps", f"of {steps}, in each cycle")
    return model


METHOD = Method(
    name="lr-rewind",
    family="pruning",
    paper=Paper(
        title="Comparing Rewinding and Fine-tuning in Neural Network Pruning",
        authors="Renda, Frankle, Carbin",
        year=2020,
        arxiv="2003.02389",
    ),
    options=LrRewindOptions,
    transform=transform,
    needs=("training",),
    applies=lambda info, _options: rewinding_refusal(info),
    trains_scratch=True,
    leaves_zeros=True,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
