"""ZeroQuant with layer-by-layer distillation: low-bit weights trained block by block, without labels.

Paper: ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers.
Zhewei Yao, Reza Yazdani Aminabadi, Minjia Zhang, Xiaoxia Wu, Conglin Li, Yuxiong He, 2022,
arXiv:2206.01861.

Changes: as `zeroquant`, with another choice of weights. Each block in turn is copied, its copy computes
with rounded weights and activations, and Adam moves the weights behind the rounding until the copy gives
what the block gave (mean squared error); the best weights that were seen are stored. Gradients and
optimizer of one block are alive at a time.

Needs: calibration tokens; none for `data` random.

Knobs: `w_bits_attn` (8) and `w_bits_ffn` (4), `w_groups`, `a_bits`, `fuse` as of zeroquant; `iters` (Adam
steps a block; 0: zeroquant), `lr` (left out: 1e-4, from a hidden size of 1024 on 5e-6), `input_source`
(what a block reads: fp, the outputs of the original blocks before it; quantized, those of the stored
ones), `data` (train: calibration text; random: random tokens).

Hurts: at 8 bits, where there is nothing to repair; a lower error of a block is no lower loss of the model
where that loss is small already. Each step counts a batch of tokens as trained on, though it runs one
block only.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch.nn import functional

from harness import Method, NumericalFailure, hookimpl
from harness.nn.blocks import BlockInput, run_block
from harness.nn.pruned import held_zeros
from harness.nn.ste import SteLinear
from harness.nn.surgery import replace_module
from harness.tokens import RandomTokens

from . import zeroquant
from ._weights import WeightBits
from ._zeroquant import PAPER, BlockPacker, ZeroQuantLayout, misfit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from harness import Context, ModelInfo

__all__ = ["METHOD", "Distilled", "ZeroQuantLkdOptions", "distill"]

_LARGE = 1024  # hidden size from which on the paper's own rate is the default
_BATCH = 8


class ZeroQuantLkdOptions(ZeroQuantLayout):
    """The paper's W4/8 setting."""

    w_bits_ffn: WeightBits = Field(4, description="bits of a weight of the FFN")
    iters: int = Field(200, ge=0, description="Adam steps a block; 0: plain zeroquant")
    lr: float | None = Field(None, gt=0, le=1, description="of Adam; default by hidden size")
    input_source: Literal["fp", "quantized"] = Field("fp", description="blocks whose outputs a block reads")
    data: Literal["train", "random"] = Field("train", description="calibration text or random tokens")


@dataclass(frozen=True)
class Distilled:
    """What came of a block: its mean squared error as rounded, and with the best weights.

    `parameters` are float32 values by name, or None where rounding the original was best. `diverged`: the
    error became NaN or infinite, and nothing of the training is kept.
    """

    rounded_mse: float
    best_mse: float
    parameters: dict[str, torch.Tensor] | None
    diverged: bool = False


def distill(
    student: nn.Module,
    inputs: Sequence[BlockInput],
    targets: Sequence[torch.Tensor],
    *,
    iters: int,
    lr: float,
    generator: torch.Generator,
    on_step: Callable[[int], None] = lambda _tokens: None,
) -> Distilled:
    """Train a float32 block with rounded layers towards `targets` [batch, tokens, d], a batch a step.

    After every pass over the batches, in random order, the error over all of them decides what is best. Zeros
    of pruned matrices stay zero.

    Args:
        on_step: called after each step with the number of tokens it read.
    """
    trained = {name: p.requires_grad_() for name, p in student.named_parameters() if p.is_floating_point()}
    start = best_mse = _error(student, inputs, targets)
    diverged = Distilled(start, start, None, diverged=True)
    if not math.isfinite(start):
        return diverged
    best: dict[str, torch.Tensor] | None = None
    optimizer = torch.optim.Adam(trained.values(), lr=lr)
    with held_zeros(student) as held:
        held.start(optimizer)
        order: list[int] = []
        for step in range(iters):
            order = order or torch.randperm(len(inputs), generator=generator).tolist()
            index = order.pop()
            try:
                with torch.enable_grad():
                    loss = functional.mse_loss(run_block(student, inputs[index]), targets[index].float())
            except NumericalFailure:  # a weight that is not finite cannot be rounded
                return diverged
            if not bool(loss.isfinite()):
                return diverged
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            held.hold()
            on_step(targets[index][..., 0].numel())
            if order and step + 1 < iters:
                continue
            error = _error(student, inputs, targets)
            if not math.isfinite(error):
                return diverged
            if error < best_mse:
                best_mse = error
                best = {name: parameter.detach().clone() for name, parameter in trained.items()}
    return Distilled(start, best_mse, best)


@torch.no_grad()
def _error(student: nn.Module, inputs: Sequence[BlockInput], targets: Sequence[torch.Tensor]) -> float:
    """Mean squared error over all batches; NaN where a weight is not finite."""
    try:
        total = sum(
            functional.mse_loss(run_block(student, item), target.float(), reduction="sum").double()
            for item, target in zip(inputs, targets, strict=True)
        )
    except NumericalFailure:
        return math.nan
    return float(total) / sum(target.numel() for target in targets)


def student_of(block: nn.Module, name: str, packer: BlockPacker) -> nn.Module:
    """A float32 copy of a block whose linear layers compute with rounded weights and tokens."""
    student = copy.deepcopy(block).float().requires_grad_(False)
    for inside, linear, bits in list(packer.linears(student, name)):
        replace_module(student, inside, SteLinear(linear, bits=bits, row_groups=packer.layout.w_groups))
    return student


@torch.no_grad()
def transform(model: nn.Module, options: ZeroQuantLkdOptions, context: Context) -> nn.Module:
    if options.iters == 0 or context.info.synthetic:  # random weights: training them says nothing
        return zeroquant.transform(model, options, context)
    packer = BlockPacker.of(model, options)
    rate = options.lr or (5e-6 if context.info.hidden_size >= _LARGE else 1e-4)
    generator = context.generator("zeroquant-lkd")
    ratios: list[float] = []
    restored: list[str] = []
    fused = 0
    with context.progress("distill", context.info.num_layers * options.iters) as done:
        before = context.trained_steps

        def on_step(tokens: int) -> None:
            context.trained_tokens += tokens
            context.trained_steps += 1
            done(context.trained_steps - before)

        from_originals = options.input_source == "fp"
        for block in context.blocks(model, _batches(options, context), from_originals=from_originals):
            targets = block.outputs or block.run()
            if not all(bool(item.hidden.isfinite().all()) for item in block.inputs):
                raise NumericalFailure(f"{block.name}: calibration activations are NaN or infinite")
            inputs = [_as_float32(item) for item in block.inputs]
            student = student_of(block.module, block.name, packer)
            result = distill(
                student, inputs, targets, iters=options.iters, lr=rate, generator=generator, on_step=on_step
            )
            del student, inputs, targets
            if result.parameters is not None:
                packed = {f"{inside}.weight" for inside, *_ in packer.linears(block.module, block.name)}
                _adopt(block.module, result.parameters, packed)
            if result.diverged:
                restored.append(block.name)
            ratios.append(1.0 if result.parameters is None else result.best_mse / result.rounded_mse)
            fused += packer.pack(block.module, block.name)
    packer.record(context, fused)
    context.record("lkd_error_ratio", sum(ratios) / len(ratios), "ratio", "of rounding's, mean of blocks")
    note = f"diverged, so rounded as they were: {', '.join(restored)}" if restored else None
    context.record("lkd_restored_blocks", len(restored), "blocks", note)
    return model


def _batches(options: ZeroQuantLkdOptions, context: Context) -> list[torch.Tensor]:
    """Token ids [<= 8, tokens]: calibration text, or as many random ones."""
    if options.data == "train":
        return context.calibration_batches(_BATCH)
    seq_len = min(context.calibration_len, context.info.max_positions)
    source = RandomTokens(context.info.vocab_size)
    tokens = source.windows(context.calibration_samples, seq_len, context.generator("random tokens"))
    return list(tokens.split(_BATCH))


def _as_float32(item: BlockInput) -> BlockInput:
    def cast(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.float() if value.is_floating_point() else value
        return type(value)(map(cast, value)) if type(value) in (tuple, list) else value

    args = tuple(map(cast, item.args))
    return BlockInput(item.hidden.float(), args, {name: cast(value) for name, value in item.kwargs.items()})


def _adopt(block: nn.Module, parameters: dict[str, torch.Tensor], packed: set[str]) -> None:
    """Give a block the trained values; those of `packed`, which are rounded next, stay in float32."""
    for name, parameter in block.named_parameters():
        value = parameters[name]
        parameter.data = value if name in packed else value.to(parameter.dtype)


def applies(info: ModelInfo, options: ZeroQuantLkdOptions) -> str | None:
    if options.data == "random" and info.vocab_size < 1:
        return "data=random draws tokens from the vocabulary, whose size the configuration does not give"
    return misfit(info, options)


METHOD = Method(
    name="zeroquant-lkd",
    family="quantization",
    paper=PAPER,
    options=ZeroQuantLkdOptions,
    transform=transform,
    needs=lambda options: ("calibration",) if options.iters and options.data == "train" else (),
    applies=applies,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
