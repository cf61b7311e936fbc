"""Whole attention heads and FFN channels are taken out, so every kernel has less to do.

Papers: Are Sixteen Heads Really Better than One? Paul Michel, Omer Levy, Graham Neubig, 2019,
arXiv:1905.10650 (heads by the gradient of a gate); LLM-Pruner: On the Structural Pruning of Large Language
Models. Xinyin Ma, Gongfan Fang, Xinchao Wang, 2023, arXiv:2305.11627 (parts that only make sense together);
FLAP, Fluctuation-based Adaptive Structured Pruning. An et al., 2023, arXiv:2312.11983 (means of what is gone
move into the bias).

Changes: a key-value head goes with the query heads that read it (rows of the query, key and value
projections, columns of the output projection); a channel with its rows in the layers that make it and its
column in the down projection. Nothing is masked: matrices, key-value cache and time shrink on any hardware.
The numbers are rounded so that no more goes than asked; what is left is recorded. A model that transformers
cannot build says so in its configuration (`block_shapes`); `harness.nn.narrowing.build_narrow` can.

Needs: calibration tokens, as labels too for `criterion` taylor; none for magnitude and random without
compensation. With `steps` it trains on.

Knobs: `head_ratio` and `ffn_ratio`, shares that go; `criterion` (taylor: change of the loss to first order;
activation: size of what is passed on, without labels; magnitude: of the weights; random: the control);
`scope` (layer: the same number in each block; global: blocks compete, each keeps some); `multiple_of`, of
the FFN's width that is left; `compensate` (lstsq: the output and down projections are refitted to the block's
old outputs, block after block; bias: the mean of what is gone moves into their bias; none); `damp`, how
strongly a refit is pulled to the weights as they were (share of the mean diagonal of the inputs' second
moment); `steps`.

Hurts: without retraining far more than unstructured zeros at the same share. With fewer calibration tokens
than FFN channels a refit fits those tokens and can be worse than none. For channels, `criterion` magnitude is
no better than random. A model with one key-value head keeps all its heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from harness import ConfigError, Method, NotApplicable, NumericalFailure, Options, Paper, hookimpl
from harness.nn.anatomy import anatomy_of
from harness.nn.folding import linears_of
from harness.nn.hessian import observe_hessians
from harness.nn.narrowing import add_to_bias, block_shapes, describe_in_config, keep_channels, keep_heads

from ._structures import (
    Scores,
    activation_scores,
    choose_kept,
    lost_block,
    magnitude_scores,
    random_scores,
    refit,
    removable,
    taylor_scores,
)

if TYPE_CHECKING:
    from torch import nn

    from harness import Context, ModelInfo
    from harness.nn.blocks import Block
    from harness.nn.narrowing import BlockShape

__all__ = ["METHOD", "StructuredOptions"]


class StructuredOptions(Options):
    head_ratio: float = Field(0.25, ge=0, lt=1, description="share of the heads of a block that go")
    ffn_ratio: float = Field(0.25, ge=0, lt=1, description="share of the FFN channels that go")
    criterion: Literal["taylor", "activation", "magnitude", "random"] = "taylor"
    scope: Literal["layer", "global"] = Field("layer", description="parts of a block compete, or of all")
    multiple_of: int = Field(64, ge=1, description="the FFN width that is left is a multiple of it")
    compensate: Literal["lstsq", "bias", "none"] = Field("lstsq", description="what makes up for the loss")
    damp: float = Field(0.1, gt=0, description="pull of a refit to the old weights, of the mean diagonal")
    steps: int = Field(0, ge=0, description="training steps afterwards")


def transform(model: nn.Module, options: StructuredOptions, context: Context) -> nn.Module:
    before = block_shapes(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    scores = _scores(model, options, context)
    everywhere = options.scope == "global"
    heads = choose_kept(
        [each.heads for each in scores], options.head_ratio, name="head_ratio", everywhere=everywhere
    )
    channels = choose_kept(
        [each.channels for each in scores],
        options.ffn_ratio,
        name="ffn_ratio",
        multiple_of=options.multiple_of,
        everywhere=everywhere,
    )
    del scores
    left = [(len(h), len(c)) for h, c in zip(heads, channels, strict=True)]
    if left == [(shape.kv_heads, shape.ffn) for shape in before] and (
        options.head_ratio or options.ffn_ratio
    ):
        raise NotApplicable(_nothing(options, before[0].kv_heads, before[0].ffn))
    if options.compensate == "none":
        for index, (kept_heads, kept_channels) in enumerate(zip(heads, channels, strict=True)):
            _cut(model, index, before[index], kept_heads, kept_channels)
    else:
        for block in context.blocks(model, context.calibration_batches()):
            index = block.index
            if len(heads[index]) < before[index].kv_heads:
                shared = before[index].heads // before[index].kv_heads * before[index].head_dim
                columns = (heads[index][:, None] * shared + _counting(shared, heads[index])).flatten()
                _cut_and_compensate(model, block, anatomy_of(model).out, heads[index], columns, options)
            if len(channels[index]) < before[index].ffn:
                kept = channels[index]
                _cut_and_compensate(model, block, anatomy_of(model).ffn_out, kept, kept, options)
    describe_in_config(model)
    _record(context, model, before, parameters, options)
    if options.steps:
        context.train(model, steps=options.steps)
    return model.eval()


def _scores(model: nn.Module, options: StructuredOptions, context: Context) -> list[Scores]:
    if options.criterion == "magnitude":
        return magnitude_scores(model)
    if options.criterion == "random":
        return random_scores(model, context.generator("structured-prune"))
    batches = context.calibration_batches()
    return (taylor_scores if options.criterion == "taylor" else activation_scores)(model, batches)


def _counting(size: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(size, device=like.device)


def _cut(
    model: nn.Module, index: int, shape: BlockShape, heads: torch.Tensor, channels: torch.Tensor
) -> None:
    if len(heads) < shape.kv_heads:
        keep_heads(model, index, heads)
    if len(channels) < shape.ffn:
        keep_channels(model, index, channels)


@torch.no_grad()
def _cut_and_compensate(
    model: nn.Module,
    block: Block,
    reader: str,
    kept: torch.Tensor,
    columns: torch.Tensor,
    options: StructuredOptions,
) -> None:
    """Take parts out of a block; `reader` is the layer that read them, `columns` those of its that stay."""
    (linear,) = linears_of(block.module, [reader], block.name)
    weight = linear.weight.detach().float()
    change = new = None
    if options.compensate == "bias":
        gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        gone[columns] = False
        change = weight[:, gone] @ _mean_input(block, reader)[gone]
    else:
        hessian = observe_hessians(block, [reader])[reader]
        try:
            new = refit(weight, hessian, columns, damp=options.damp)
        except NumericalFailure as error:
            raise NumericalFailure(f"{block.name}.{reader}: {error}") from None
    keep = keep_heads if reader == anatomy_of(model).out else keep_channels
    keep(model, block.index, kept)
    if new is not None:
        (linear,) = linears_of(block.module, [reader], block.name)  # another one by now
        linear.weight.copy_(new)
    if change is not None:
        add_to_bias(block.module, reader, change)


def _mean_input(block: Block, name: str) -> torch.Tensor:
    """E[x], float32 [in], of the inputs of a layer over the calibration tokens."""
    total, tokens = torch.zeros(()), 0

    def see(_name: str, x: torch.Tensor) -> None:
        nonlocal total, tokens
        flat = x.reshape(-1, x.shape[-1])
        total, tokens = total.to(x.device) + flat.float().sum(0), tokens + len(flat)

    block.observe([name], see)
    if not tokens:
        raise ConfigError(f"{block.name}.{name}: no calibration tokens reached the layer")
    mean = total / tokens
    if not bool(torch.isfinite(mean).all()):
        raise NumericalFailure(f"{block.name}.{name}: calibration activations are NaN or infinite")
    return mean


def _record(
    context: Context,
    model: nn.Module,
    before: list[BlockShape],
    parameters: int,
    options: StructuredOptions,
) -> None:
    after = block_shapes(model)
    heads, channels = sum(shape.heads for shape in before), sum(shape.ffn for shape in before)
    left = sum(parameter.numel() for parameter in model.parameters())
    rounded = f"whole groups of {before[0].heads // before[0].kv_heads} query heads"
    removed = 1 - sum(shape.heads for shape in after) / heads
    note = None if abs(removed - options.head_ratio) < 1e-9 else f"{rounded}; asked {options.head_ratio:g}"
    context.record("removed_head_share", removed, "1", note)
    removed = 1 - sum(shape.ffn for shape in after) / channels
    note = f"multiples of {options.multiple_of} are left; asked {options.ffn_ratio:g}"
    if abs(removed - options.ffn_ratio) < 1e-9:
        note = None
    context.record("removed_channel_share", removed, "1", note)
    context.record("removed_parameter_share", 1 - left / parameters, "1")
    context.record("fewest_heads", min(shape.heads for shape in after), "heads", "of any block")
    context.record("fewest_channels", min(shape.ffn for shape in after), "channels", "of any block")


def _nothing(options: StructuredOptions, kv_heads: int, ffn: int) -> str:
    return (
        f"head_ratio={options.head_ratio:g} of {kv_heads} key-value heads and ffn_ratio="
        f"{options.ffn_ratio:g} of {ffn} channels in multiples of {options.multiple_of} remove nothing"
    )


def _lost_block(info: ModelInfo, options: StructuredOptions) -> str | None:
    heads, channels = [info.num_kv_heads] * info.num_layers, [info.ffn_size] * info.num_layers
    return lost_block(heads, options.head_ratio, name="head_ratio") or lost_block(
        channels, options.ffn_ratio, name="ffn_ratio", multiple_of=options.multiple_of
    )


def applies(info: ModelInfo, options: StructuredOptions) -> str | None:
    if info.family == "other":
        return f"architecture {info.model_type!r} is not known"
    if info.kind == "encoder" and options.criterion == "taylor":
        return "an encoder has no training objective here; choose criterion=activation"
    if info.kind == "encoder" and options.steps:
        return "encoders have no training objective here; leave steps at 0"
    if options.scope == "global":
        return _lost_block(info, options)
    removed = removable(info.num_kv_heads, options.head_ratio) + removable(
        info.ffn_size, options.ffn_ratio, options.multiple_of
    )
    if not removed and (options.head_ratio or options.ffn_ratio):
        return _nothing(options, info.num_kv_heads, info.ffn_size)
    return None


def _needs(options: StructuredOptions) -> tuple[str, ...]:
    needs = ["training"] if options.steps else []
    if options.criterion in ("taylor", "activation") or options.compensate != "none":
        needs.append("calibration")
    return tuple(needs)


METHOD = Method(
    name="structured-prune",
    family="pruning",
    paper=Paper(
        title="Are Sixteen Heads Really Better than One?",
        authors="Michel, Levy, Neubig",
        year=2019,
        arxiv="1905.10650",
        venue="NeurIPS 2019",
    ),
    options=StructuredOptions,
    transform=transform,
    needs=_needs,
    applies=applies,
    leaves_layers=lambda _options: True,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
