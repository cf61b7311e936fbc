"""NormalFloat: 16 levels at the quantiles of a Gaussian lose less than 15 evenly spaced symmetric ones.

Paper: QLoRA: Efficient Finetuning of Quantized LLMs. Tim Dettmers, Artidoro Pagnoni, Ari Holtzman, Luke
Zettlemoyer, 2023, arXiv:2305.14314. The adapters are those of LoRA (Hu et al. 2021, arXiv:2106.09685).

Changes: every linear layer inside the blocks (`targets`: those whose full name contains the regular
expression). Each `group_size` input columns are divided by their largest magnitude, and every weight
becomes the nearest of 16 levels. `double_quant` stores those magnitudes in 8 bits around their mean, in
blocks of 256 (here whole numbers; the paper has 8-bit floats): 4.127 bits a weight, without it 4.5.
With `lora_r` adapters of that rank are trained over the frozen weights, and stay beside them.

Needs: nothing; training tokens with `lora_r`.

Knobs: `group_size`; `double_quant`; `lora_r`, `lora_alpha`, `steps` (the sweep's budget where left out)
and `lr` of the adapters; `targets`; `ragged` (a group size that does not divide a layer: raise, pad its
last group, or skip the layer).

Hurts: no integer kernel can read it. On CUDA up to 16 rows look the levels up as they multiply; for more,
and elsewhere, the matrix is written out before, which saves memory and no time. Groups with zero points
(rtn, hqq) are as good on Gaussian weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field, model_validator

from harness import Method, NumericalFailure, Options, Paper, hookimpl
from harness.nn.codebook import CodebookLinear
from harness.nn.codebook_weight import CodebookWeight, ScaleCodes, nearest_codes, quantize_scales
from harness.nn.lora import LoraLinear
from harness.nn.quantizer import padded_to_groups
from harness.nn.surgery import Targets, replace_module

from ._weights import Ragged, leaves_layers, quantizable, refusal

if TYPE_CHECKING:
    from torch import nn

    from harness import Context, ModelInfo

__all__ = ["METHOD", "Nf4Options", "nf4_levels", "nf4_quantize"]

_OUTERMOST_QUANTILE = 0.9677083


class Nf4Options(Options):
    group_size: int = Field(64, ge=1, description="input columns per scale")
    double_quant: bool = Field(True, description="store the scales in 8 bits")
    lora_r: int = Field(0, ge=0, description="rank of trained adapters; 0: none")
    lora_alpha: float = Field(16.0, gt=0, description="the adapters count alpha / r times")
    steps: int | None = Field(None, ge=0, description="training steps of the adapters; default: the sweep's")
    lr: float = Field(2e-4, gt=0, description="learning rate of the adapters")
    targets: Targets = Field(None, description="regular expression of full layer names")
    ragged: Ragged = Field("raise", description="where the group size does not divide a layer")

    aliases = {"blocksize": "group_size", "block_size": "group_size", "r": "lora_r"}  # noqa: RUF012

    @model_validator(mode="after")
    def _adapters(self) -> Nf4Options:
        if not self.lora_r and self.steps is not None:
            raise ValueError("steps trains adapters: give lora_r")
        return self


def nf4_levels() -> torch.Tensor:
    """The 16 levels, float32, from -1 to 1: eight quantiles above zero, seven below, and zero itself."""
    half = [torch.linspace(_OUTERMOST_QUANTILE, 0.5, n, dtype=torch.float64)[:-1] for n in (9, 8)]
    above, below = (torch.special.ndtri(probability) for probability in half)
    levels = torch.cat([-below, torch.zeros(1, dtype=torch.float64), above.flip(0)])
    return (levels / levels.max()).float()


@torch.no_grad()
def nf4_quantize(weight: torch.Tensor, *, group_size: int = 64, double_quant: bool = True) -> CodebookWeight:
    """A matrix [out, in] as levels and scales; columns are padded with zeros to whole groups.

    Levels are chosen for the scales as they are stored.

    Raises:
        NumericalFailure: a weight is NaN or infinite.
    """
    if not bool(torch.isfinite(weight).all()):
        raise NumericalFailure("weights to quantize are NaN or infinite")
    grouped = padded_to_groups(weight.detach().float(), group_size).unflatten(1, (-1, group_size))
    scales: torch.Tensor | ScaleCodes = grouped.abs().amax(-1).t().contiguous()  # [groups, out]
    stored = scales
    if double_quant:
        scales = quantize_scales(scales)
        stored = scales.dequantize()
    divisor = torch.where(stored == 0, torch.ones_like(stored), stored).t()[:, :, None]
    levels = nf4_levels().to(weight.device)
    codes = nearest_codes(grouped / divisor, levels).flatten(1)
    return CodebookWeight(codes, levels, 4, weight.shape[1], scales, group_size)


def transform(model: nn.Module, options: Nf4Options, context: Context) -> nn.Module:
    names, skipped = quantizable(
        model, group_size=options.group_size, ragged=options.ragged, targets=options.targets
    )
    if options.ragged == "skip":
        context.record("skipped_layers", len(skipped), "layers", ", ".join(skipped) or None)
    adapters: list[nn.Parameter] = []
    with context.progress("quantize", len(names)) as done:
        for position, name in enumerate(names):
            layer = _quantized(name, model.get_submodule(name), options)
            if options.lora_r:
                layer = LoraLinear(
                    layer,
                    rank=options.lora_r,
                    alpha=options.lora_alpha,
                    generator=context.generator(f"lora/{name}"),
                    dtype=context.dtype,
                    device=context.device,
                )
                adapters += [layer.lora_a, layer.lora_b]
            replace_module(model, name, layer)
            done(position + 1)
    if adapters:
        context.train(model, parameters=adapters, steps=options.steps, lr=options.lr)
    return model


def _quantized(name: str, linear: nn.Module, options: Nf4Options) -> nn.Module:
    try:
        weight = nf4_quantize(linear.weight, group_size=options.group_size, double_quant=options.double_quant)
    except NumericalFailure as error:
        raise NumericalFailure(f"{name}: {error}") from None
    return CodebookLinear.from_weight(weight, linear.bias)


def applies(info: ModelInfo, options: Nf4Options) -> str | None:
    if options.lora_r and info.kind == "encoder":
        return "encoders have no training objective here; leave lora_r at 0"
    return refusal(info, group_size=options.group_size, ragged=options.ragged, targets=options.targets)


METHOD = Method(
    name="nf4",
    family="quantization",
    paper=Paper(
        title="QLoRA: Efficient Finetuning of Quantized LLMs",
        authors="Dettmers, Pagnoni, Holtzman, Zettlemoyer",
        year=2023,
        arxiv="2305.14314",
        venue="NeurIPS 2023",
    ),
    options=Nf4Options,
    transform=transform,
    needs=lambda options: ("training",) if options.lora_r and options.steps != 0 else (),
    applies=applies,
    leaves_layers=leaves_layers,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
