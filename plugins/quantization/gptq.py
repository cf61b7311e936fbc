"""GPTQ: rounding one column after the other and correcting the rest halves the damage of 3 and 2 bits.

Paper: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers. Elias Frantar,
Saleh Ashkboos, Torsten Hoefler, Dan Alistarh, 2022, arXiv:2210.17323; after OBQ, arXiv:2208.11580.

Changes: every linear layer inside the blocks (or those whose full name matches `targets`) is stored in
packed `bits`. Columns are rounded in one fixed order for all rows; each rounding error is spread over
the columns still to come so that the layer's output on calibration data changes least (squared error).
Block after block, each calibrated on inputs that the already quantized blocks produce.

Needs: calibration tokens.

Knobs: `bits`, `group_size` (input columns per scale; -1: one per output row), `sym` (no zero points),
`act_order` (columns by falling activity; without `static_groups` they are stored in that order and the
input is gathered), `static_groups` (scales from the weights as they were), `damp` (share of the mean
diagonal added to the Hessian), `clip` (mse: each scale clips its range where that lowers the loss, as
the authors' code can; absmax: never, as in the paper), `block_size` (columns per lazy update: speed
only), `true_sequential` (inside a block, q/k/v, then output, then FFN see each other's rounding),
`ragged`, `targets`.

Hurts: with few calibration tokens or tokens of another kind it fits them and not the task; at 8 bits
it gains nothing over plain rounding. At many rows the weights are dequantized before the product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, field_validator

from harness import Method, NumericalFailure, Options, Paper, hookimpl
from harness.nn.anatomy import anatomy_of
from harness.nn.folding import linears_of
from harness.nn.hessian import InputHessian, inverse_root, output_error
from harness.nn.quantizer import Grid, QuantizedWeight, group_grid, padded_to_groups
from harness.nn.surgery import replace_module

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
    from harness.nn.blocks import Block

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
    targets: str | None = Field(None, description="regular expression of full layer names")
    ragged: Ragged = Field("raise", description="where the group size does not divide a layer")

    @field_validator("group_size")
    @classmethod
    def _not_zero(cls, value: int) -> int:
        if value == 0:
            raise ValueError("must be positive, or -1 for one scale per output row")
        return value


@dataclass(frozen=True)
class GptqResult:
    """A quantized matrix, its loss ``tr((W - Q)(H + damp)(W - Q)^T)`` and the damping that was used."""

    quantized: QuantizedWeight
    loss: float
    damp: float


@torch.no_grad()
def gptq_quantize(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    *,
    bits: int,
    group_size: int = -1,
    sym: bool = False,
    act_order: bool = False,
    damp: float = 0.01,
    block_size: int = 128,
    static_groups: bool = False,
    clip: Literal["absmax", "mse"] = "absmax",
) -> GptqResult:
    """Quantize a matrix [out, in] given ``mean(x x^T)`` [in, in] of its inputs; float32 or float64.

    A group's grid follows from the weights as corrected up to its first column (`static_groups`: as
    given), with ``clip="mse"`` by the least loss of its own columns. Columns that no token ever reaches
    (``H_jj = 0``) become zeros. The result does not depend on `block_size`; the last group may be shorter.

    Raises:
        NumericalFailure: weights or Hessian are not finite, or the Hessian cannot be factorised.
    """
    weight, hessian = weight.detach().clone(), hessian.to(weight.dtype).clone()
    if not bool(torch.isfinite(weight).all()):
        raise NumericalFailure("weights are NaN or infinite")
    (out, columns), device = weight.shape, weight.device
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    order = torch.arange(columns, device=device)
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    root, damp = inverse_root(hessian[order][:, order], damp)
    importance = root.diagonal() ** -2  # what a squared rounding error in each column costs
    width = columns if group_size == -1 else group_size
    # Grids of the weights as given: the ones to use, or only the type and shape of what is stored.
    is_static = static_groups or group_size == -1
    searched = padded_to_groups(importance[torch.argsort(order)][None], width)[0]
    given = group_grid(
        padded_to_groups(weight, width),
        bits=bits,
        group_size=group_size,
        sym=sym,
        importance=searched if clip == "mse" and is_static else None,
    )
    scale, zero = given.scale.clone(), None if given.zero is None else given.zero.clone()
    weight = weight[:, order]
    groups: list[int] = ((order if is_static else torch.arange(columns)) // width).tolist()
    # A block never straddles the start of a group, so every correction has arrived by then.
    starts = sorted({*range(0, columns, block_size), *(() if is_static else range(0, columns, width))})
    codes = torch.empty(out, columns, dtype=torch.uint8, device=device)
    loss = 0.0
    for start, end in zip(starts, [*starts[1:], columns], strict=True):
        if not is_static and start % width == 0:
            grid = group_grid(
                weight[:, start : start + width],
                bits=bits,
                sym=sym,
                scale_dtype=scale.dtype,
                importance=importance[start : start + width] if clip == "mse" else None,
            )
            scale[:, groups[start]] = grid.scale[:, 0]
            if zero is not None and grid.zero is not None:
                zero[:, groups[start]] = grid.zero[:, 0]
        block, errors = weight[:, start:end].clone(), torch.zeros_like(weight[:, start:end])
        local = root[start:end, start:end]
        for j in range(end - start):
            group = groups[start + j]
            grid = Grid(bits, scale[:, group], None if zero is None else zero[:, group])
            code = grid.encode(block[:, j])
            error = (block[:, j] - grid.decode(code, weight.dtype)) / local[j, j]
            block[:, j + 1 :] -= torch.outer(error, local[j, j + 1 :])
            codes[:, start + j], errors[:, j] = code, error
        weight[:, end:] -= errors @ root[start:end, end:]
        loss += float((errors**2).sum())
    stored_order = order.to(torch.int32) if act_order and not is_static else None
    if stored_order is None:
        codes = codes[:, torch.argsort(order)]
    codes = padded_to_groups(codes, width)
    quantized = QuantizedWeight(codes, scale, zero, bits, group_size, columns, stored_order)
    return GptqResult(quantized, loss, damp)


@torch.no_grad()
def transform(model: nn.Module, options: GptqOptions, context: Context) -> nn.Module:
    names, skipped = quantizable(
        model, group_size=options.group_size, ragged=options.ragged, targets=options.targets
    )
    if options.ragged == "skip":
        context.record("skipped_layers", len(skipped), "layers", ", ".join(skipped) or None)
    errors: list[float] = []
    for block in context.blocks(model):
        prefix = f"{block.name}."
        inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        steps = sharing_input(inside, anatomy_of(model).sequential_groups)
        for step in [[group] for group in steps] if options.true_sequential else [steps]:
            errors += _quantize_step(block, step, options)
    mean = sum(errors) / len(errors)
    context.record("gptq_relative_error", mean, "ratio", "squared error of layer outputs, mean of layers")
    return model


def _quantize_step(block: Block, step: list[list[str]], options: GptqOptions) -> list[float]:
    """Calibrate and replace some layers of a block; the relative squared output error of each."""
    hessians = {
        group[0]: InputHessian(linear.in_features, linear.weight.device)
        for group in step
        for linear in linears_of(block.module, group[:1], block.name)
    }
    block.observe(list(hessians), lambda name, x: hessians[name].add(x))
    errors = []
    for group in step:
        hessian = hessians[group[0]].matrix(f"{block.name}.{group[0]}")
        for name, linear in zip(group, linears_of(block.module, group, block.name), strict=True):
            weight = linear.weight.detach().float()
            try:
                result = gptq_quantize(weight, hessian, **options.model_dump(include=_CORE_OPTIONS))
            except NumericalFailure as error:
                raise NumericalFailure(f"{block.name}.{name}: {error}") from None
            difference = weight - result.quantized.dequantize()
            size = output_error(weight, hessian)
            errors.append(output_error(difference, hessian) / size if size else 0.0)
            replace_module(block.module, name, pack_float_weight(linear, result.quantized))
        hessians.pop(group[0])
    return errors


_CORE_OPTIONS = {"bits", "group_size", "sym", "act_order", "damp", "block_size", "static_groups", "clip"}


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
