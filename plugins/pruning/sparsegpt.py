"""Weights become zero one column after the other, and the columns to come make up for what is lost.

Paper: SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot. Elias Frantar, Dan Alistarh,
2023, arXiv:2301.00774.

Changes: zeros in the linear layers inside the blocks, and all weights after them: the inverse Hessian of a
layer's inputs says what each weight costs and how the other weights of its row answer best, as in GPTQ.
Masks are chosen block by block of `block_size` columns on the weights as corrected so far; with `n` and
`m`, group by group. Below 16 `bits` the survivors are rounded in the same pass and stored packed, with a
code for zero. Blocks are calibrated one after the other on what those before them, as pruned, produce. The
dense (or integer) kernel runs over the zeros: nothing gets faster by them. What a bitmap and the surviving
weights would take is recorded as `bitmap_bytes`, a theoretical size. Only 2:4 of unrounded weights is stored
compressed (0.56 of the bytes in 16 bits) and run by sparse tensor cores where there are any.

Needs: calibration tokens, without labels; a Cholesky factor of each layer's input.

Knobs: `sparsity`; `n` and `m` (n of every m inputs stay, 2:4 is n=2, m=4); `bits` (16: no rounding),
`group_size` (inputs per scale; -1: one per output row) and `sym` (no zero points) of the survivors; `damp`
(share of the mean diagonal added to the Hessian); `block_size`; `true_sequential` (inside a block, q/k/v,
then output, then FFN see each other's pruning); `backend` (auto; dense: 2:4 too stays zeros in dense
weights); `targets`, a regular expression for the names of layers.

Hurts: with few calibration tokens it fits those. Beyond 60 % the loss grows fast, as for all of its kind.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator

from harness import Method, NotApplicable, NumericalFailure, Paper, hookimpl
from harness.nn.folding import linears_of
from harness.nn.hessian import factorise, observe_hessians, output_error, output_size
from harness.nn.pruned import ZeroCount
from harness.nn.quantized import QuantizedLinear
from harness.nn.surgery import replace_module

from ._one_shot import MaskOptions, prunable, refusal, store_pattern
from ._sparsegpt import Pruning, SparseGptResult, prune_matrix, sparsegpt_prune

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from harness import Context, ModelInfo
    from harness.nn.blocks import Block

__all__ = ["METHOD", "SparseGptOptions", "SparseGptResult", "sparsegpt_prune"]


def _number(value: object) -> object:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class SparseGptOptions(MaskOptions):
    """The paper's settings."""

    bits: Annotated[Literal[2, 3, 4, 8, 16], BeforeValidator(_number)] = Field(
        16, description="bits of a surviving weight; 16: not rounded"
    )
    group_size: int = Field(128, ge=-1, description="input columns per scale; -1: one per output row")
    sym: bool = Field(False, description="no zero points")
    damp: float = Field(0.01, gt=0, description="added to the Hessian, as a share of its mean diagonal")
    block_size: int = Field(128, ge=1, description="columns whose weights compete for the mask")
    true_sequential: bool = Field(True, description="calibrate inside a block step by step")

    @model_validator(mode="after")
    def _groups_fit(self) -> SparseGptOptions:
        if self.group_size == 0:
            raise ValueError("group_size must be positive, or -1 for one scale per output row")
        if self.bits < 16 and self.m is not None and self.group_size > 0 and self.group_size % self.m:
            raise ValueError(f"m={self.m} does not divide group_size={self.group_size}")
        return self


@torch.no_grad()
def transform(model: nn.Module, options: SparseGptOptions, context: Context) -> nn.Module:
    plan = prunable(model, options)
    _require_whole_groups(model, plan, options)
    count, errors = ZeroCount.of(model), []
    for block in context.blocks(model, context.calibration_batches()):
        groups = plan[block.name]
        for step in [[group] for group in groups] if options.true_sequential else [groups]:
            hessians = observe_hessians(block, [group[0] for group in step])
            for group in step:
                errors += _prune_group(block, group, hessians.pop(group[0]), options, count)
    names = [f"{block}.{name}" for block, groups in plan.items() for group in groups for name in group]
    stored = store_pattern(model, names, options, context) if options.bits == 16 else []
    count.record(context, compressed=stored)
    note = "squared error of layer outputs, mean of layers"
    context.record("sparsegpt_relative_error", sum(errors) / len(errors), "ratio", note)
    return model


def _require_whole_groups(
    model: nn.Module, plan: dict[str, list[list[str]]], options: SparseGptOptions
) -> None:
    if options.bits == 16 or options.group_size == -1:
        return
    for block, groups in plan.items():
        names = [f"{block}.{name}" for group in groups for name in group]
        for name, linear in zip(names, linears_of(model, names, "model"), strict=True):
            if linear.in_features % options.group_size:
                raise NotApplicable(
                    f"group_size {options.group_size} does not divide the {linear.in_features} columns of "
                    f"{name}; choose a divisor, or group_size=-1"
                )


def _prune_group(
    block: Block, group: Sequence[str], hessian: torch.Tensor, options: SparseGptOptions, count: ZeroCount
) -> list[float]:
    """Prune layers that read the same input; the relative squared output error of each."""
    pruning = Pruning(**options.model_dump(include={each.name for each in fields(Pruning)}))
    names = [f"{block.name}.{name}" for name in group]
    errors = []
    try:
        factor = factorise(hessian, damp=options.damp)
        for name, linear in zip(group, linears_of(block.module, group, block.name), strict=True):
            weight = linear.weight.detach().float()
            result = prune_matrix(weight, factor, pruning)
            size = output_size(weight, hessian)
            errors.append(output_error(weight - result.weight, hessian) / size if size else 0.0)
            if result.quantized is None:
                linear.weight.copy_(result.weight)
                count.add(result.keep, 8 * linear.weight.element_size())
            else:
                packed = QuantizedLinear.from_weight(result.quantized, linear.bias)
                replace_module(block.module, name, packed)
                count.add(result.keep, options.bits)
    except NumericalFailure as error:
        raise NumericalFailure(f"{', '.join(names)}: {error}") from None
    return errors


def applies(info: ModelInfo, options: SparseGptOptions) -> str | None:
    reason = refusal(info, options)
    if reason or options.bits == 16 or options.group_size == -1 or options.targets is not None:
        return reason
    for what, size in (("hidden size", info.hidden_size), ("FFN size", info.ffn_size)):
        if size % options.group_size:
            return f"group_size {options.group_size} does not divide the {what} {size}"
    return None


METHOD = Method(
    name="sparsegpt",
    family="pruning",
    paper=Paper(
        title="SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        authors="Frantar, Alistarh",
        year=2023,
        arxiv="2301.00774",
        venue="ICML 2023",
    ),
    options=SparseGptOptions,
    transform=transform,
    needs=("calibration",),
    applies=applies,
    leaves_layers=lambda options: options.bits == 16 or options.targets is not None,
    leaves_zeros=True,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
