"""SmoothQuant: moving activation outliers into the weights makes int8 activations nearly lossless.

Paper: SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models.
Guangxuan Xiao, Ji Lin, Mickael Seznec, Hao Wu, Julien Demouth, Song Han, 2022, arXiv:2211.10438.

Changes: each channel between a norm and the layers that read it is divided by
``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` on the norm's side and multiplied on the weights' side,
which leaves the function as it was. Then every linear layer inside the blocks becomes W8A8.

Needs: calibration tokens. Norms whose output the residual branch reads as well (BERT) cannot be folded.

Knobs: `alpha` (how much of the difficulty moves into the weights; 0.5, and 0.8 to 0.85 for Llama-like
models), `level` (activation scales: O1 per token, O2 per tensor, O3 per tensor and fixed by
calibration), `w_gran` (one weight scale per output row, or per-tensor as in the paper), `vo` and
`up_down` (smooth the inputs of the attention output and of the down projection too), `quantize` (by
default only as the last step of a chain: before another method it smooths and leaves the rest to it).

Hurts: where outliers come from elsewhere than a norm; with a static scale, on text unlike the
calibration text. At few rows W8A8 saves weight traffic only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field

from harness import Method, NotApplicable, Options, Paper, hookimpl
from harness.nn.anatomy import anatomy_of, norm_sites
from harness.nn.blocks import Block
from harness.nn.folding import (
    POST_NORM,
    linears_of,
    require_foldable_norms,
    require_unchanged,
    scale_norm_site,
    scale_up_down,
    scale_value_output,
    value_channels,
)
from harness.nn.ranges import observe_clips, observe_peaks
from harness.nn.surgery import replace_module

from ._weights import UNTRAINED, pack_int8, quantizable

if TYPE_CHECKING:
    from torch import nn

    from harness import Context, ModelInfo
    from harness.nn.quantized import ActivationScale

__all__ = ["METHOD", "SmoothQuantOptions", "smoothing_scale"]

_LEVELS: dict[str, ActivationScale] = {
    "O1": "per-token",
    "O2": "per-tensor-dynamic",
    "O3": "per-tensor-static",
}
_SMALLEST = 1e-5


class SmoothQuantOptions(Options):
    """`quantize` left out: yes where nothing follows in the chain."""

    alpha: float = Field(0.5, ge=0, le=1, description="share of the range moved into the weights")
    level: Literal["O1", "O2", "O3"] = Field("O1", description="what shares an activation scale")
    w_gran: Literal["per-channel", "per-tensor"] = Field(
        "per-channel", description="what shares a weight scale"
    )
    vo: bool = Field(False, description="smooth between value and output projection")
    up_down: bool = Field(False, description="smooth between up and down projection")
    quantize: bool | None = Field(None, description="quantize to W8A8 after smoothing")


def smoothing_scale(activation_peak: torch.Tensor, weight_peak: torch.Tensor, alpha: float) -> torch.Tensor:
    """``s = a^alpha / w^(1 - alpha)`` for each channel [d], never below 1e-5 (equation 4)."""
    a, w = activation_peak.clamp(min=_SMALLEST), weight_peak.clamp(min=_SMALLEST)
    return (a**alpha / w ** (1 - alpha)).clamp(min=_SMALLEST)


@torch.no_grad()
def transform(model: nn.Module, options: SmoothQuantOptions, context: Context) -> nn.Module:
    names, _ = quantizable(model, group_size=-1, ragged="raise", targets=None)
    require_foldable_norms(model)
    config: Any = model.config
    if options.up_down and context.info.family != "llama" and config.activation_function != "relu":
        raise NotApplicable("up_down needs a gated FFN or ReLU: no scale passes through this activation")
    quantizes = context.last_in_chain if options.quantize is None else options.quantize
    is_static = quantizes and options.level == "O3"
    input_scales: dict[str, torch.Tensor] = {}
    for block in context.blocks(model):
        sample = Block(block.index, block.name, block.module, block.inputs[:1])
        before = sample.run()
        _smooth(block, model, options, getattr(config, "head_dim", None) or context.info.head_dim)
        require_unchanged(before, sample.run(), block.name)
        if is_static:
            inside = [n.removeprefix(f"{block.name}.") for n in names if n.startswith(f"{block.name}.")]
            found = observe_clips(block, inside, "absmax")
            input_scales |= {f"{block.name}.{name}": scale for name, scale in found.items()}
    for name in names if quantizes else ():
        (linear,) = linears_of(model, (name,), "model")
        layer = pack_int8(
            name,
            linear,
            per_tensor=options.w_gran == "per-tensor",
            a_gran=_LEVELS[options.level],
            input_scale=input_scales.get(name),
        )
        replace_module(model, name, layer)
    return model


def _smooth(block: Block, model: nn.Module, options: SmoothQuantOptions, head_dim: int) -> None:
    """Fold the scales of one block; the inputs of all its sites are those of the original model."""
    anatomy = anatomy_of(model)
    sites = norm_sites(model)
    observed = [site.consumers[0] for site in sites]
    observed += [anatomy.out] if options.vo else []
    observed += [anatomy.ffn_out] if options.up_down else []
    linears_of(block.module, observed, block.name)
    peaks = observe_peaks(block, observed)
    for site in sites:
        weight_peak = _column_peaks(block, site.consumers)
        scale = smoothing_scale(peaks[site.consumers[0]], weight_peak, options.alpha)
        scale_norm_site(block.module, site, scale, block.name)
    if options.vo:
        (value,) = linears_of(block.module, anatomy.qkv[-1:], block.name)
        activation_peak, weight_peak = (
            value_channels(each, value.out_features, head_dim)
            for each in (peaks[anatomy.out], _column_peaks(block, (anatomy.out,)))
        )
        scale = smoothing_scale(activation_peak, weight_peak, options.alpha)
        scale = torch.maximum(scale, _smallest_scale(value))
        scale_value_output(block.module, anatomy, scale, head_dim, block.name)
    if options.up_down:
        weight_peak = _column_peaks(block, (anatomy.ffn_out,))
        scale = smoothing_scale(peaks[anatomy.ffn_out], weight_peak, options.alpha)
        (up,) = linears_of(block.module, anatomy.ffn_in[-1:], block.name)
        scale = torch.maximum(scale, _smallest_scale(up))
        scale_up_down(block.module, anatomy, scale, block.name)


def _smallest_scale(producer: nn.Linear) -> torch.Tensor:
    """The scale [out] down to which a row may grow without widening the range of the whole matrix.

    A channel that calibration hardly reaches (a ReLU that stays off) asks for a tiny scale, and dividing
    its row by that would leave one large row to set the weight scale of all.
    """
    peaks = producer.weight.float().abs().amax(1)
    return (peaks / peaks.amax()).clamp(min=_SMALLEST)


def _column_peaks(block: Block, names: tuple[str, ...]) -> torch.Tensor:
    """The largest |W[:, j]| over all the named layers, float32 [in]."""
    layers = linears_of(block.module, names, block.name)
    return torch.stack([layer.weight.float().abs().amax(0) for layer in layers]).amax(0)


def applies(info: ModelInfo, options: SmoothQuantOptions) -> str | None:
    if info.family == "other":
        return f"architecture {info.model_type!r} is not known"
    if info.scratch:
        return UNTRAINED
    if info.family == "bert":
        return POST_NORM
    if info.family == "gpt2" and (options.vo or options.up_down):
        return "vo and up_down need a separate value projection and a ReLU or gated FFN; GPT-2 has neither"
    return None


METHOD = Method(
    name="smoothquant",
    family="quantization",
    paper=Paper(
        title="SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
        authors="Xiao, Lin, Seznec, Wu, Demouth, Han",
        year=2022,
        arxiv="2211.10438",
        venue="ICML 2023",
    ),
    options=SmoothQuantOptions,
    transform=transform,
    needs=("calibration",),
    applies=applies,
    leaves_layers=lambda options: options.quantize is not True,  # before another method it only smooths
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
