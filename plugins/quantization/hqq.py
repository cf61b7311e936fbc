"""HQQ: a zero point that need not be a whole number, found without data, repairs rounding at few bits.

Paper: Half-Quadratic Quantization of Large Machine Learning Models. Hicham Badri, Appu Shaji, 2023
(Mobius Labs, mobiusml.github.io/hqq_blog).

Changes: every linear layer inside the blocks (`targets`: those whose full name contains the regular
expression). The scale of each `group_size` input columns is that of their range; the zero point z
minimises the sum of ``|w - s (q - z)|^p`` by half-quadratic splitting: in turn the codes q, the errors e
that a shrinkage with the weight `beta` leaves, and z as the mean of ``q - (w - e) / s``, with beta
growing by `kappa`, `iters` times. Each group keeps the zero point with the smallest mean error, that of
plain rounding included. z is stored as float16: 4.5 bits a weight at 4 bits in groups of 64.

Needs: nothing.

Knobs: `bits`; `group_size` (-1: one per output row); `p`, `beta`, `kappa`, `iters`; `targets`; `ragged`
(a group size that does not divide a layer: raise, pad its last group, or skip the layer).

Hurts: a weight of exactly zero does not stay zero. `beta` weighs errors in the unit of the weights. A
zero point takes 16 bits, four times as many as a whole one of 4 bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field, field_validator

from harness import ConfigError, Method, NumericalFailure, Options, Paper, hookimpl
from harness.nn.quantizer import QuantizedWeight, group_grid, padded_to_groups
from harness.nn.surgery import Targets, replace_module

from ._weights import Ragged, WeightBits, leaves_layers, pack_float_weight, quantizable, refusal

if TYPE_CHECKING:
    from torch import nn

    from harness import Context, ModelInfo

__all__ = ["METHOD", "HqqOptions", "hqq_quantize"]


class HqqOptions(Options):
    bits: WeightBits = Field(4, description="bits of a weight")
    group_size: int = Field(64, ge=-1, description="input columns per scale; -1: one per output row")
    p: float = Field(0.7, gt=0, le=1, description="exponent of the error")
    beta: float = Field(10.0, gt=0, description="weight of the splitting; higher: larger steps")
    kappa: float = Field(1.01, ge=1, description="growth of beta in an iteration")
    iters: int = Field(20, ge=0, description="iterations; 0: plain rounding")
    targets: Targets = Field(None, description="regular expression of full layer names")
    ragged: Ragged = Field("raise", description="where the group size does not divide a layer")

    @field_validator("group_size")
    @classmethod
    def _some_columns(cls, value: int) -> int:
        if value == 0:
            raise ValueError("a group has columns: give a positive number, or -1 for one group a row")
        return value


@torch.no_grad()
def hqq_quantize(
    weight: torch.Tensor,
    *,
    bits: int = 4,
    group_size: int = 64,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iters: int = 20,
) -> QuantizedWeight:
    """A matrix [out, in] with float16 zero points; columns are padded with zeros to whole groups.

    Raises:
        ConfigError, NumericalFailure: as `harness.nn.quantizer.group_grid`.
    """
    padded = padded_to_groups(weight.detach().float(), group_size)
    grid = group_grid(padded, bits=bits, group_size=group_size, sym=False)
    assert grid.zero is not None
    scale = grid.scale.float()[:, :, None]
    values = padded.unflatten(1, (scale.shape[1], -1))  # [out, groups, size]
    steps = values / scale
    best = grid.zero.float()[:, :, None]  # that of rounding to nearest
    least = _mean_error(steps, best, bits)
    zero = (-values.amin(-1, keepdim=True).clamp(max=0) / scale) if iters else best
    for iteration in range(iters + 1):
        zero = zero.half().float()  # as it is stored
        error = _mean_error(steps, zero, bits)
        best, least = torch.where(error < least, zero, best), torch.minimum(error, least)
        if iteration < iters:
            codes = _codes(steps, zero, bits)
            residual = values - scale * (codes - zero)
            shrunk = (residual.abs() - residual.abs().pow(p - 1) / beta).clamp_(min=0)
            zero = (codes - (values - residual.sign() * shrunk) / scale).mean(-1, keepdim=True)
            beta *= kappa
    codes = _codes(steps, best, bits).to(torch.uint8).flatten(1)
    return QuantizedWeight(codes, grid.scale, best[:, :, 0].half(), bits, group_size, weight.shape[1])


def _codes(steps: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    return (steps + zero).round_().clamp_(0, 2**bits - 1)


def _mean_error(steps: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """The mean magnitude of the errors of each group in units of its scale, [out, groups, 1]."""
    return (steps - (_codes(steps, zero, bits) - zero)).abs_().mean(-1, keepdim=True)


@torch.no_grad()
def transform(model: nn.Module, options: HqqOptions, context: Context) -> nn.Module:
    names, skipped = quantizable(
        model, group_size=options.group_size, ragged=options.ragged, targets=options.targets
    )
    if options.ragged == "skip":
        context.record("skipped_layers", len(skipped), "layers", ", ".join(skipped) or None)
    with context.progress("quantize", len(names)) as done:
        for position, name in enumerate(names):
            linear = model.get_submodule(name)
            replace_module(model, name, pack_float_weight(linear, _quantized(name, linear.weight, options)))
            del linear
            done(position + 1)
    return model


def _quantized(name: str, weight: torch.Tensor, options: HqqOptions) -> QuantizedWeight:
    try:
        return hqq_quantize(
            weight,
            bits=options.bits,
            group_size=options.group_size,
            p=options.p,
            beta=options.beta,
            kappa=options.kappa,
            iters=options.iters,
        )
    except (ConfigError, NumericalFailure) as error:
        raise type(error)(f"{name}: {error}") from None


def applies(info: ModelInfo, options: HqqOptions) -> str | None:
    return refusal(info, group_size=options.group_size, ragged=options.ragged, targets=options.targets)


METHOD = Method(
    name="hqq",
    family="quantization",
    paper=Paper(
        title="Half-Quadratic Quantization of Large Machine Learning Models",
        authors="Badri, Shaji",
        year=2023,
        venue="Mobius Labs blog",
    ),
    options=HqqOptions,
    transform=transform,
    applies=applies,
    leaves_layers=leaves_layers,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
