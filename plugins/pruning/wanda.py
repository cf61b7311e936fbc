"""Weights that are small or read quiet inputs become zero, without any update of the others.

Paper: A Simple and Effective Pruning Approach for Large Language Models. Mingjie Sun, Zhuang Liu, Anna
Bair, J. Zico Kolter, 2023, arXiv:2306.11695.

Changes: zeros in the linear layers inside the blocks. The score of a weight is its magnitude times the
2-norm of its input over the calibration tokens; scores compete within each output row or, with `n` and
`m`, within every `m` consecutive inputs of a row. Block after block, each calibrated on what the already
pruned blocks before it produce. The dense kernel runs over the zeros, so nothing gets faster or smaller;
what a bitmap and the surviving weights would take is recorded as `bitmap_bytes`, a theoretical size. Only
2:4 is stored compressed (0.56 of the bytes in 16 bits) and run by sparse tensor cores where there are any.

Needs: calibration tokens, without labels. One pass; nothing is trained and no matrix is inverted.

Knobs: `sparsity`; `n` and `m` (n of every m inputs stay, 2:4 is n=2, m=4); `backend` (auto; dense: 2:4 too
stays zeros in dense weights); `targets`, a regular expression for the names of layers.

Hurts: where all inputs are equally loud it is plain magnitude within rows. What is lost is not made up for,
so `sparsegpt` keeps more at the same sparsity, the more so under N:M and beyond 60 %.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from harness import ConfigError, Method, NumericalFailure, Paper, hookimpl
from harness.nn.folding import linears_of
from harness.nn.pruned import ZeroCount

from ._one_shot import MaskOptions, keep_best, prunable, refusal, store_pattern

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from harness import Context, ModelInfo
    from harness.nn.blocks import Block

__all__ = ["METHOD", "WandaOptions", "input_norms", "wanda_keep"]


class WandaOptions(MaskOptions):
    """The paper's setting: half of every row."""


@torch.no_grad()
def wanda_keep(
    weight: torch.Tensor,
    norms: torch.Tensor,
    *,
    sparsity: float = 0.5,
    n: int | None = None,
    m: int | None = None,
) -> torch.Tensor:
    """Keep mask, bool [out, in], of a weight [out, in] given the 2-norms [in] of its inputs.

    Of equal scores the first ones in a row go. Only the ratios of the norms matter.

    Raises:
        ConfigError: `m` does not divide the inputs, or n exceeds m.
        NumericalFailure: weights or norms are not finite.
    """
    if not bool(torch.isfinite(weight).all() & torch.isfinite(norms).all()):
        raise NumericalFailure("weights or calibration activations are NaN or infinite")
    return keep_best(weight.detach().abs().float() * norms, sparsity, n, m)


def input_norms(block: Block, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """2-norms over all calibration tokens, float32 [in], of the inputs of layers of a block, by name.

    Raises:
        ConfigError: no tokens reached a layer.
        NumericalFailure: its inputs were NaN or infinite.
    """
    squares: dict[str, torch.Tensor] = {}

    def see(name: str, x: torch.Tensor) -> None:
        found = x.reshape(-1, x.shape[-1]).float().square().sum(0, dtype=torch.float64)
        if x.numel():
            squares[name] = squares[name] + found if name in squares else found

    block.observe(names, see)
    for name in names:
        if name not in squares:
            raise ConfigError(f"{block.name}.{name}: no calibration tokens reached the layer")
        if not bool(torch.isfinite(squares[name]).all()):
            raise NumericalFailure(f"{block.name}.{name}: calibration activations are NaN or infinite")
    return {name: squares[name].sqrt().float() for name in names}


@torch.no_grad()
def transform(model: nn.Module, options: WandaOptions, context: Context) -> nn.Module:
    plan = prunable(model, options)
    count, names = ZeroCount.of(model), []
    for block in context.blocks(model, context.calibration_batches()):
        groups = plan[block.name]
        norms = input_norms(block, [group[0] for group in groups])
        for group in groups:
            names += [f"{block.name}.{name}" for name in group]
            for linear in linears_of(block.module, group, block.name):
                keep = wanda_keep(
                    linear.weight, norms[group[0]], sparsity=options.sparsity, n=options.n, m=options.m
                )
                linear.weight.masked_fill_(~keep, 0)
                count.add(keep, 8 * linear.weight.element_size())
    count.record(context, compressed=store_pattern(model, names, options, context))
    return model


def applies(info: ModelInfo, options: WandaOptions) -> str | None:
    return refusal(info, options)


METHOD = Method(
    name="wanda",
    family="pruning",
    paper=Paper(
        title="A Simple and Effective Pruning Approach for Large Language Models",
        authors="Sun, Liu, Bair, Kolter",
        year=2023,
        arxiv="2306.11695",
        venue="ICLR 2024",
    ),
    options=WandaOptions,
    transform=transform,
    needs=("calibration",),
    applies=applies,
    leaves_zeros=True,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
