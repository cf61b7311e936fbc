"""GPTQ: rounding one column after the other and correcting the rest halves the damage of 3 and 2 bits.

Paper: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers. Elias Frantar,
Saleh Ashkboos, Torsten Hoefler, Dan Alistarh, 2022, arXiv:2210.17323; after OBQ, arXiv:2208.11580.

Changes: every linear layer inside the blocks (or those whose full name matches `targets`) is stored in
packed `bits`. Columns are rounded in one fixed order for all rows; each rounding error is spread over
the columns still to come so that the layer's output on calibration data changes least (squared error).
Block after block, each calibrated on inputs that the already quantized blocks produce, as in the paper,
or (`calibrate_on`: original) on those of the untouched model. The latter's Hessians depend on no option
and are kept on disk (11 GB for a 7B model), so that every later configuration runs no calibration pass.
Of a pruned matrix (1 % zeros or more) what is zero stays zero, and columns to come make up for what its
correction would have been; that runs in plain torch, on a GPU too.

Needs: calibration tokens.

Knobs: `bits`, `group_size` (input columns per scale; -1: one per output row), `sym` (no zero points),
`act_order` (columns by falling activity; without `static_groups` they are stored in that order and the
input is gathered), `static_groups` (scales from the weights as they were), `damp` (share of the mean
diagonal added to the Hessian), `clip` (mse: each scale clips its range where that lowers the loss, as
the authors' code can; absmax: never, as in the paper), `block_size` (columns per lazy update: speed
only), `true_sequential` (inside a block, q/k/v, then output, then FFN see each other's rounding; says nothing
where `calibrate_on` is original),
`ragged`, `targets`.

Hurts: with few calibration tokens or tokens of another kind it fits them and not the task; at 8 bits
it gains nothing over plain rounding. At many rows the weights are dequantized before the product.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import fields
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, field_validator

from harness import Method, NumericalFailure, Options, Paper, hookimpl
from harness.nn.anatomy import anatomy_of, blocks_of
from harness.nn.folding import linears_of
from harness.nn.hessian import observe_hessians, output_error, output_size
from harness.nn.pruned import is_pruned
from harness.nn.surgery import Targets, replace_module

from ._gptq import GptqResult, Rounding, factorise, gptq_quantize, quantize_stack
from ._hessians import OriginalHessians
from ._weights import (
    Ragged,
    WeightBits,
    leaves_layers,
    pack_float_weight,
    quantizable,
    refusal,
    sharing_input,
)

if TYPE_CHECKING:
    from torch import nn

    from harness import Context, ModelInfo

__all__ = ["METHOD", "GptqOptions", "GptqResult", "gptq_quantize"]


class GptqOptions(Options):
    """The paper's settings with groups of 128, but for `clip`."""

    bits: WeightBits = Field(4, description="bits of a weight")
    group_size: int = Field(128, ge=-1, description="input columns per scale; -1: one per output row")
    sym: bool = Field(False, description="no zero points")
    act_order: bool = Field(False, description="most active columns first")
    static_groups: bool = Field(False, description="scales from the weights before any correction")
    damp: float = Field(0.01, gt=0, description="added to the Hessian, as a share of its mean diagonal")
    clip: Literal["absmax", "mse"] = Field("mse", description="range of a grid: all, or least loss")
    block_size: int = Field(128, ge=1, description="columns between two updates of the rest")
    true_sequential: bool = Field(True, description="calibrate inside a block step by step")
    calibrate_on: Literal["quantized", "original"] = Field(
        "quantized", description="inputs from the model as quantized so far, or as it was"
    )
    targets: Targets = Field(None, description="regular expression of full layer names")
    ragged: Ragged = Field("raise", description="where the group size does not divide a layer")

    @field_validator("group_size")
    @classmethod
    def _not_zero(cls, value: int) -> int:
        if value == 0:
            raise ValueError("must be positive, or -1 for one scale per output row")
        return value


@torch.no_grad()
def transform(model: nn.Module, options: GptqOptions, context: Context) -> nn.Module:
    names, skipped = quantizable(
        model, group_size=options.group_size, ragged=options.ragged, targets=options.targets
    )
    if options.ragged == "skip":
        context.record("skipped_layers", len(skipped), "layers", ", ".join(skipped) or None)
    plan: dict[str, list[list[str]]] = {}  # by block the layers that read the same input, as they run
    for block, _ in blocks_of(model):
        inside = [name.removeprefix(f"{block}.") for name in names if name.startswith(f"{block}.")]
        plan[block] = sharing_input(inside, anatomy_of(model).sequential_groups)
    run = _on_original if options.calibrate_on == "original" else _on_quantized
    errors = run(model, plan, options, context)
    mean = sum(errors) / len(errors)
    context.record("gptq_relative_error", mean, "ratio", "squared error of layer outputs, mean of layers")
    return model


def _on_quantized(
    model: nn.Module, plan: dict[str, list[list[str]]], options: GptqOptions, context: Context
) -> list[float]:
    errors = []
    for block in context.blocks(model, context.calibration_batches()):
        groups = plan[block.name]
        for step in [[group] for group in groups] if options.true_sequential else [groups]:
            hessians = observe_hessians(block, [group[0] for group in step])
            for group in step:
                errors += _quantize_group(model, block.name, group, hessians.pop(group[0]), options)
    return errors


def _on_original(
    model: nn.Module, plan: dict[str, list[list[str]]], options: GptqOptions, context: Context
) -> list[float]:
    firsts = {block: [group[0] for group in groups] for block, groups in plan.items()}
    hessians = OriginalHessians(model, firsts, context)
    errors = []
    # From the last layer to the first: whatever must be computed again then still finds what it reads.
    order = [(block, list(reversed(groups))) for block, groups in reversed(plan.items())]
    wanted = [(block, group[0]) for block, groups in order for group in groups]
    with context.progress("blocks", len(plan)) as done, closing(hessians.of_each(wanted)) as each:
        for number, (block, groups) in enumerate(order, 1):
            for group in groups:
                errors += _quantize_group(model, block, group, next(each), options)
            done(number)
    return errors


def _quantize_group(
    model: nn.Module, block: str, group: list[str], hessian: torch.Tensor, options: GptqOptions
) -> list[float]:
    """Replace layers that read the same input; the relative squared output error of each."""
    names = [f"{block}.{name}" for name in group]
    linears = linears_of(model, names, "model")
    weights = [linear.weight.detach().float() for linear in linears]
    for name, weight in zip(names, weights, strict=True):
        if not bool(torch.isfinite(weight).all()):
            raise NumericalFailure(f"{name}: weights are NaN or infinite")
    rounding = Rounding(
        **options.model_dump(include={each.name for each in fields(Rounding)}),
        keep_zeros=any(is_pruned(weight) for weight in weights),
    )
    try:
        factor = factorise(hessian, damp=options.damp, act_order=options.act_order)
        results = quantize_stack(weights, factor, rounding)
    except NumericalFailure as error:
        raise NumericalFailure(f"{', '.join(names)}: {error}") from None
    errors = []
    for name, linear, weight, result in zip(names, linears, weights, results, strict=True):
        size = output_size(weight, hessian)
        difference = weight - result.quantized.dequantize()
        errors.append(output_error(difference, hessian) / size if size else 0.0)
        replace_module(model, name, pack_float_weight(linear, result.quantized))
    return errors


def applies(info: ModelInfo, options: GptqOptions) -> str | None:
    return refusal(info, group_size=options.group_size, ragged=options.ragged, targets=options.targets)


METHOD = Method(
    name="gptq",
    family="quantization",
    paper=Paper(
        title="GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        authors="Frantar, Ashkboos, Hoefler, Alistarh",
        year=2022,
        arxiv="2210.17323",
        venue="ICLR 2023",
    ),
    options=GptqOptions,
    transform=transform,
    needs=("calibration",),
    applies=applies,
    leaves_layers=leaves_layers,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
