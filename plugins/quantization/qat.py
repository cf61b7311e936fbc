"""QAT: trained through its own rounding, a network of 2 or 3 bits recovers most of what rounding costs.

Paper: Learned Step Size Quantization. Steven K. Esser, Jeffrey L. McKinstry, Deepika Bablani,
Rathinakumar Appuswamy, Dharmendra S. Modha, 2020, arXiv:1902.08153; the straight-through estimator is
that of Bengio et al. 2013, arXiv:1308.3432, integer inference that of Jacob et al. 2018,
arXiv:1712.05877.

Changes: all weights are fine-tuned on the model's own task while every linear layer inside the blocks
computes with weights rounded to `bits` (and inputs rounded to int8, one scale per token, with `a_bits`
8). Gradients pass through the rounding. Then those layers are packed as rtn packs the same bits; the
packed forward pass is that of training. Up to 4 bits a learned grid has all 2^bits points, the zero
point fixed in their middle; at 8 bits it is symmetric.

Needs: training tokens; encoders a head and a mask token (the task is to predict masked tokens).

Knobs: `bits` (16: plain fine-tuning, the control that says what the steps alone do); `a_bits`;
`w_gran` and `group_size` (one step per output row, or per group of input columns); `learn_scale`
(steps are learned; else they cover the range of the weights, as rounding to nearest does);
`scale_init` (where learned steps begin: mse, least squared error, which a short training needs; lsq, the
paper's 2 mean|w| / sqrt(Q_p), Q_p the largest integer); `lr`; `scale_lr_mult` (rate of the learned steps,
in units of lr / sqrt(Q_p)); `steps` (the sweep's budget where left out; 0 rounds on the initial grid).

Hurts: without a real training budget or the training text; all master weights, gradients and moments
are float32, so it takes some 16 bytes per parameter to train. At 8 bits rounding is as good.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness import Method, Paper, hookimpl
from harness.nn.losses import prediction_task, task_loss

from ._qat import TrainedOptions, refused, trained_and_packed

if TYPE_CHECKING:
    import torch
    from torch import nn

    from harness import Context

__all__ = ["METHOD", "QatOptions"]


class QatOptions(TrainedOptions):
    """The options of training on a grid, no more."""


def transform(model: nn.Module, options: QatOptions, context: Context) -> nn.Module:
    if context.info.kind == "decoder" or options.steps == 0:
        return trained_and_packed(model, options, context, None)
    corrupt = prediction_task(model, context)

    def loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        inputs, labels = corrupt(tokens)
        return task_loss(model(input_ids=inputs).logits, labels)

    return trained_and_packed(model, options, context, loss)


METHOD = Method(
    name="qat",
    family="quantization",
    paper=Paper(
        title="Learned Step Size Quantization",
        authors="Esser, McKinstry, Bablani, Appuswamy, Modha",
        year=2020,
        arxiv="1902.08153",
        venue="ICLR 2020",
    ),
    options=QatOptions,
    transform=transform,
    needs=lambda options: () if options.steps == 0 else ("training",),
    applies=refused,
    leaves_layers=lambda options: options.bits == 16,  # trained, and left in full precision
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
