"""Prune a fifth of what is left, retrain, repeat: sparser at the same loss than one cut, for more training.

Paper: Comparing Rewinding and Fine-tuning in Neural Network Pruning. Alex Renda, Jonathan Frankle, Michael
Carbin, 2020, arXiv:2003.02389. After Han, Pool, Tran, Dally, 2015, arXiv:1506.02626.

Changes: zeros in the linear layers inside the blocks. Each cycle prunes the share `p` of the remaining
weights, smallest magnitudes first, the last one only as far as `sparsity`, and retrains with the zeros held.
What is pruned stays so. The zeros are unstructured: the dense kernel runs over them. `bitmap_bytes` records
what a bitmap and the survivors would take.

Needs: training tokens, `steps_per_cycle` steps for each of the cycles (8 of them for 80 % at a fifth each). A
`scratch:` model is first trained with the sweep's budget. To rewind between the cycles instead of training
on, see lottery-rewind and lr-rewind.

Knobs: `sparsity`; `p`; `steps_per_cycle` (the sweep's budget; 0: none); `retrain`, with a rate that
rises and falls anew in each cycle (schedule) or stays at the end of that curve (fine-tune); `lr`, the peak;
`scope`, over which weights compete (`global`, `layer`, `row`); `min_layer_density`, what a layer keeps at
least under `global`; `targets`.

Hurts: the training budget. One short schedule cut into cycles is worse than one cut with all of it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from harness import Method, Options, Paper, hookimpl
from harness.nn.held_masks import HeldMasks
from harness.nn.magnitude import keep_masks, live_magnitudes
from harness.nn.pruned import all_kept, record_masks, target_weights
from harness.nn.surgery import Targets

from ._scope import require_reachable
from ._trained import training_refusal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from harness import Context, ModelInfo
    from harness.training import TrainReport

__all__ = ["METHOD", "IterativeOptions", "cycle_sparsities"]

_MOST_CYCLES = 50


class IterativeOptions(Options):
    aliases: ClassVar[Mapping[str, str]] = {"steps": "steps_per_cycle"}

    sparsity: float = Field(0.8, ge=0, lt=1, description="share of zeros at the end")
    p: float = Field(0.2, gt=0, lt=1, description="share of the remaining weights that a cycle prunes")
    steps_per_cycle: int | None = Field(None, ge=0, description="by default the sweep's training budget")
    retrain: Literal["schedule", "fine-tune"] = Field("schedule", description="the rate in each cycle")
    lr: float | None = Field(None, gt=0, description="peak learning rate; by default the loop's")
    scope: Literal["layer", "global", "row"] = "global"
    min_layer_density: float = Field(0.01, ge=0, le=1, description="kept at least; scope=global")
    targets: Targets = Field(None, description="regular expression for the layers' names")

    @model_validator(mode="after")
    def _reachable(self) -> IterativeOptions:
        cycles = _cycles(self.sparsity, self.p)  # counted, not listed: a tiny p takes billions
        if cycles > _MOST_CYCLES:
            raise ValueError(
                f"p={self.p} takes {cycles} cycles to sparsity={self.sparsity}; at most {_MOST_CYCLES}"
            )
        require_reachable(self.sparsity, self.scope, self.min_layer_density)
        return self


def cycle_sparsities(sparsity: float, p: float) -> list[float]:
    """The share of zeros after each cycle: ``1 - (1 - p) ** c``, the last one exactly `sparsity`.

    >>> [round(share, 3) for share in cycle_sparsities(0.6, 0.2)]
    [0.2, 0.36, 0.488, 0.59, 0.6]
    """
    cycles = _cycles(sparsity, p)
    return [1 - (1 - p) ** cycle for cycle in range(1, cycles)] + [sparsity][:cycles]


def _cycles(sparsity: float, p: float) -> int:
    if sparsity == 0:
        return 0
    return max(1, math.ceil(math.log1p(-sparsity) / math.log1p(-p) - 1e-9))


def transform(model: nn.Module, options: IterativeOptions, context: Context) -> nn.Module:
    if context.info.scratch:
        context.training_steps(None)
        context.train(model, lr=options.lr)
    weights = target_weights(model, options.targets)
    held, report = HeldMasks(weights, all_kept(weights)), None
    for cycle, sparsity in enumerate(cycle_sparsities(options.sparsity, options.p)):
        scores = live_magnitudes(weights, held.masks)
        held.change(keep_masks(scores, sparsity, options.scope, options.min_layer_density))
        report = _retrain(model, held, cycle, options, context)
    if report is not None and report.steps:
        context.record("training_loss", report.final_loss, "nats", "last cycle, mean of the last tenth")
    record_masks(context, model, weights, held.masks)
    return model


def _retrain(
    model: nn.Module, held: HeldMasks, cycle: int, options: IterativeOptions, context: Context
) -> TrainReport:
    peak = options.lr or context.settings.lr
    end = context.settings.final_share
    constant = options.retrain == "fine-tune"
    with held:
        return context.train(
            model,
            steps=options.steps_per_cycle,
            lr=peak * end if constant else peak,
            warmup_share=0.0 if constant else None,
            final_share=1.0 if constant else None,
            # The first cycle sees what a single retraining sees, each later one other text.
            stream=f"training cycle {cycle}" if cycle else "training",
            on_start=held.start,
            on_step=held.hold,
        )


def applies(info: ModelInfo, options: IterativeOptions) -> str | None:
    return training_refusal(info, trains=options.steps_per_cycle != 0)


METHOD = Method(
    name="iterative-prune",
    family="pruning",
    paper=Paper(
        title="Comparing Rewinding and Fine-tuning in Neural Network Pruning",
        authors="Renda, Frankle, Carbin",
        year=2020,
        arxiv="2003.02389",
    ),
    options=IterativeOptions,
    transform=transform,
    needs=lambda options: () if options.steps_per_cycle == 0 else ("training",),
    applies=applies,
    trains_scratch=True,
    leaves_zeros=True,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
