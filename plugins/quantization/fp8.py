"""FP8: 8-bit floats keep outliers that 8-bit integers cannot, at the speed of the hardware's own type.

Paper: FP8 Formats for Deep Learning. Paulius Micikevicius, Dusan Stosic, Neil Burgess, Marius Cornea,
Pradeep Dubey, Richard Grisenthwaite and others, 2022, arXiv:2209.05433.

Changes: every linear layer inside the blocks (or those whose full name matches `targets`) stores float8
weights, rounds its input to float8, and multiplies the two. A scale in float32 maps the largest value to
the largest of the format; values are clamped before they are cast. Layers with a size that is no
multiple of 16, which no float8 kernel multiplies, stay as they are and are recorded by name.

Needs: nothing; calibration tokens for `a_gran` per-tensor-static. On CUDA compute capability 8.9 or
newer (Ada, Hopper).

Knobs: `fmt` (e4m3: three bits of mantissa, up to 448, as the paper has it for weights and activations;
e5m2: two bits, up to 57344, meant for gradients and without a kernel on CUDA), `w_gran` (a scale per
output row, or per-tensor), `a_gran` (a scale per token, per tensor, or per tensor and fixed by
calibration), `sparse` (after nm-prune: of every four codes two are stored, for sparse tensor cores: 0.625 of
the bytes; layers that cannot be stay dense float8 and are recorded by name).

Hurts: where nothing is an outlier, int8 with a scale per row rounds three times as finely at the same
size. A fixed scale clamps text unlike the calibration text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from harness import Method, NotApplicable, NumericalFailure, Options, Paper, hookimpl
from harness.kernels.fp8 import ALIGNMENT, FORMATS, device_problem
from harness.nn.fp8 import Fp8Format, Fp8Linear
from harness.nn.quantized import ActivationScale
from harness.nn.ranges import observe_peaks
from harness.nn.sparse_8_bit import SparseFp8Linear
from harness.nn.surgery import Targets, replace_module

from ._weights import left_dense, quantizable, refusal

if TYPE_CHECKING:
    from harness import Context, ModelInfo

__all__ = ["METHOD", "Fp8Options"]


class Fp8Options(Options):
    """E4M3 with a scale per output row and per token."""

    fmt: Fp8Format = Field("e4m3", description="format of weights and activations")
    w_gran: Literal["per-channel", "per-tensor"] = Field(
        "per-channel", description="what shares a weight scale"
    )
    a_gran: ActivationScale = Field("per-token", description="what shares an activation scale")
    targets: Targets = Field(None, description="regular expression of full layer names")
    sparse: bool = Field(False, description="store 2:4 weights as such; e4m3, scales per row and token")

    @model_validator(mode="after")
    def _consistent(self) -> Fp8Options:
        if self.sparse and (self.fmt, self.w_gran, self.a_gran) != ("e4m3", "per-channel", "per-token"):
            raise ValueError(
                "sparse=true needs fmt=e4m3, w_gran=per-channel and a_gran=per-token: that form has a kernel"
            )
        return self


@torch.no_grad()
def transform(model: nn.Module, options: Fp8Options, context: Context) -> nn.Module:
    if problem := device_problem(context.device):
        raise NotApplicable(problem)
    found, _ = quantizable(model, group_size=-1, ragged="raise", targets=options.targets)
    names = [name for name in found if Fp8Linear.fits(_linear(model, name))]
    skipped = [name for name in found if name not in names]
    if not names:
        raise NotApplicable(f"no linear layer has both sizes divisible by {ALIGNMENT}")
    if skipped:
        context.record("skipped_layers", len(skipped), "layers", ", ".join(skipped))
    scales: dict[str, torch.Tensor] = {}
    if options.a_gran == "per-tensor-static":
        scales = _static_scales(model, names, options, context)
    dense = left_dense(model, names, FORMATS[options.fmt], context) if options.sparse else {}
    with context.progress("quantize", len(names)) as done:
        for index, name in enumerate(names):
            linear, sparse = _linear(model, name), options.sparse and name not in dense
            replacement = _quantized(name, linear, options, scales.get(name), sparse=sparse)
            replace_module(model, name, replacement)
            done(index + 1)
    return model


def _linear(model: nn.Module, name: str) -> nn.Linear:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _quantized(
    name: str, linear: nn.Linear, options: Fp8Options, input_scale: torch.Tensor | None, *, sparse: bool
) -> nn.Module:
    try:
        if sparse:
            return SparseFp8Linear.from_float(linear.weight, linear.bias)
        return Fp8Linear.from_float(
            linear.weight.detach(),
            linear.bias,
            fmt=options.fmt,
            per_tensor=options.w_gran == "per-tensor",
            a_gran=options.a_gran,
            input_scale=input_scale,
        )
    except NumericalFailure as error:
        raise NumericalFailure(f"{name}: {error}") from None


def _static_scales(
    model: nn.Module, names: list[str], options: Fp8Options, context: Context
) -> dict[str, torch.Tensor]:
    """The scale [1] of each layer's input: the largest |x| on calibration tokens is the largest float8."""
    largest = torch.finfo(FORMATS[options.fmt]).max
    scales: dict[str, torch.Tensor] = {}
    for block in context.blocks(model):
        prefix = f"{block.name}."
        inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        for name, peaks in observe_peaks(block, inside).items():
            scale = peaks.amax().view(1) / largest
            scales[prefix + name] = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scales


def applies(info: ModelInfo, options: Fp8Options) -> str | None:
    return refusal(info, group_size=-1, ragged="raise", targets=options.targets)


METHOD = Method(
    name="fp8",
    family="quantization",
    paper=Paper(
        title="FP8 Formats for Deep Learning",
        authors="Micikevicius et al.",
        year=2022,
        arxiv="2209.05433",
    ),
    options=Fp8Options,
    transform=transform,
    needs=lambda options: ("calibration",) if options.a_gran == "per-tensor-static" else (),
    applies=applies,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
