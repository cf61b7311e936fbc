"""AWQ: scaling up the weights that read the most active channels protects them from 4-bit rounding.

Paper: AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration. Ji Lin, Jiaming
Tang, Haotian Tang, Shang Yang, Wei-Ming Chen, Wei-Chen Wang, Guangxuan Xiao, Xingyu Dang, Chuang Gan,
Song Han, 2023, arXiv:2306.00978.

Changes: each input channel j of the layers behind a norm, of the attention output and of the down
projection is multiplied by ``s_j = mean|x_j|^alpha`` in their weights and divided by it where it is
made (norm gain, rows of the value projection, rows of the up projection), which leaves the function as
it was. alpha is searched for each site: least squared error of the outputs on calibration tokens after
rounding; 0, no scale, is among the candidates. Then large weights are clipped where that lowers the
error of their group, and every linear layer inside the blocks is rounded to packed `bits` with zero
points. Block after block, each calibrated on inputs that the already quantized blocks produce.

Needs: calibration tokens. Norms whose output the residual branch reads as well (BERT) cannot be folded.

Knobs: `bits`; `group_size` (input columns per scale; -1: one per output row); `n_grid` (steps of alpha
from 0 to 1); `clip` (search clipping limits; never for queries and keys); `quantize` (by default only
as the last step of a chain: before another quantizer, which should have the same bits and groups, it
scales and leaves the rest to it); `ragged`.

Hurts: nothing that rounding does not; without outlier channels it gains little. At many rows the
weights are dequantized before the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field, field_validator

from harness import Method, Options, Paper, hookimpl
from harness.nn.anatomy import anatomy_of
from harness.nn.blocks import Block
from harness.nn.folding import (
    POST_NORM,
    linears_of,
    require_foldable_norms,
    require_unchanged,
    scale_norm_site,
    scale_up_down,
    scale_value_output,
)
from harness.nn.surgery import replace_module

from ._awq import ScaleSearch, SiteInputs, clip_weight, observe_inputs, search_scale
from ._weights import Ragged, WeightBits, pack_float_weight, quantizable, refusal, round_linear

if TYPE_CHECKING:
    from torch import nn

    from harness import Context, ModelInfo

__all__ = ["METHOD", "AwqOptions"]


class AwqOptions(Options):
    """`quantize` left out: yes where nothing follows in the chain."""

    bits: WeightBits = Field(4, description="bits of a weight")
    group_size: int = Field(128, ge=-1, description="input columns per scale; -1: one per output row")
    n_grid: int = Field(20, ge=1, description="steps of alpha between 0 and 1")
    clip: bool = Field(True, description="clip groups of weights where that lowers the error")
    quantize: bool | None = Field(None, description="clip and round after scaling")
    ragged: Ragged = Field("raise", description="where the group size does not divide a layer")

    @field_validator("group_size")
    @classmethod
    def _not_zero(cls, value: int) -> int:
        if value == 0:
            raise ValueError("must be positive, or -1 for one scale per output row")
        return value


@dataclass(frozen=True)
class _Site:
    """Layers that read the same input, and how to move a scale from them to what makes it."""

    consumers: tuple[str, ...]
    fold: Callable[[torch.Tensor], None]
    shared: Callable[[torch.Tensor], torch.Tensor] = lambda channels: channels
    spread: Callable[[torch.Tensor], torch.Tensor] = lambda channels: channels


@torch.no_grad()
def transform(model: nn.Module, options: AwqOptions, context: Context) -> nn.Module:
    names, skipped = quantizable(model, group_size=options.group_size, ragged=options.ragged, targets=None)
    require_foldable_norms(model)
    if options.ragged == "skip":
        context.record("skipped_layers", len(skipped), "layers", ", ".join(skipped) or None)
    quantizes = context.last_in_chain if options.quantize is None else options.quantize
    observed = tuple(group[0] for group in anatomy_of(model).sequential_groups)
    searches: list[ScaleSearch] = []
    for block in context.blocks(model):
        inside = {n.removeprefix(f"{block.name}.") for n in names if n.startswith(f"{block.name}.")}
        linears_of(block.module, anatomy_of(model).linears, block.name)
        inputs = observe_inputs(block, observed)
        sample = Block(block.index, block.name, block.module, block.inputs[:1])
        before = sample.run()
        for site in _sites(model, block, context.info.head_dim):
            searches += _scale(block, site, inputs, inside, options)
        require_unchanged(before, sample.run(), block.name)
        for group in anatomy_of(model).sequential_groups if quantizes else ():
            for name in group:
                if name in inside:
                    clips = options.clip and name not in anatomy_of(model).qkv[:2]
                    _quantize(block, name, inputs[group[0]].hessian if clips else None, options)
    if searches:
        ratios = [search.error / search.plain_error for search in searches if search.plain_error]
        context.record("awq_relative_error", sum(ratios) / max(1, len(ratios)), "ratio", "rounding = 1; mean")
        context.record("awq_alpha", sum(s.alpha for s in searches) / len(searches), "1", "mean over sites")
    return model


def _sites(model: nn.Module, block: Block, head_dim: int) -> Iterator[_Site]:
    """Where a scale can pass through in a block, in the order in which it runs."""
    anatomy, config, module = anatomy_of(model), getattr(model, "config", None), block.module
    attention, feed_forward = require_foldable_norms(model)
    yield _Site(attention.consumers, lambda s: scale_norm_site(module, attention, s, block.name))
    if len(anatomy.qkv) == 3:
        value, out = linears_of(module, (anatomy.qkv[-1], anatomy.out), block.name)
        width: int = getattr(config, "head_dim", None) or head_dim
        readers = out.in_features // value.out_features  # query heads that share a value head
        yield _Site(
            (anatomy.out,),
            lambda s: scale_value_output(module, anatomy, s, width, block.name),
            lambda channels: channels.view(-1, readers, width).mean(1).flatten(),
            lambda channels: channels.view(-1, 1, width).expand(-1, readers, -1).flatten(),
        )
    yield _Site(feed_forward.consumers, lambda s: scale_norm_site(module, feed_forward, s, block.name))
    if anatomy.family == "llama" or getattr(config, "activation_function", None) == "relu":
        yield _Site((anatomy.ffn_out,), lambda s: scale_up_down(module, anatomy, s, block.name))


def _scale(
    block: Block, site: _Site, inputs: dict[str, SiteInputs], inside: set[str], options: AwqOptions
) -> list[ScaleSearch]:
    """Search and fold the scale of a site; `inputs` are then those of the scaled layers."""
    read = site.consumers[0]
    names = [name for name in site.consumers if name in inside]
    weights = {
        f"{block.name}.{name}": linear.weight.float()
        for name, linear in zip(names, linears_of(block.module, names, block.name), strict=True)
    }
    if not weights:
        return []
    search = search_scale(
        weights,
        inputs[read],
        bits=options.bits,
        group_size=options.group_size,
        n_grid=options.n_grid,
        shared=site.shared,
        spread=site.spread,
    )
    if search.alpha:
        site.fold(search.scale)
        inputs[read] = inputs[read].divided(site.spread(search.scale))
    return [search]


def _quantize(block: Block, name: str, hessian: torch.Tensor | None, options: AwqOptions) -> None:
    """Clip (with the Hessian of its inputs), round and pack one layer."""
    (linear,) = linears_of(block.module, (name,), block.name)
    grid: dict[str, Any] = {"bits": options.bits, "group_size": options.group_size}
    weight = linear.weight.float()
    if hessian is not None:
        weight = clip_weight(weight, hessian, **grid)
    rounded = round_linear(f"{block.name}.{name}", weight, sym=False, **grid)
    replace_module(block.module, name, pack_float_weight(linear, rounded))


def applies(info: ModelInfo, options: AwqOptions) -> str | None:
    if info.family == "bert":
        return POST_NORM
    return refusal(info, group_size=options.group_size, ragged=options.ragged, targets=None)


METHOD = Method(
    name="awq",
    family="quantization",
    paper=Paper(
        title="AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
        authors="Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han",
        year=2023,
        arxiv="2306.00978",
        venue="MLSys 2024",
    ),
    options=AwqOptions,
    transform=transform,
    needs=("calibration",),
    applies=applies,
    # Before another quantizer it only scales; what `ragged` skips is left even where it quantizes.
    leaves_layers=lambda options: options.quantize is not True or options.ragged == "skip",
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
