"""ZeroQuant: one scale per token makes int8 activations work without calibration, quantized in the norm.

Paper: ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers.
Zhewei Yao, Reza Yazdani Aminabadi, Minjia Zhang, Xiaoxia Wu, Conglin Li, Yuxiong He, 2022,
arXiv:2206.01861.

Changes: every linear layer inside the blocks multiplies int8 with int8, exactly, and applies scales and
bias to the sum (W8A8). Weights are rounded symmetrically, groups of output rows sharing a scale;
activations are rounded token by token, as they come. With fewer bits for the FFN its weights are stored
packed and unpacked to int8 for the product (W4A8). A norm that only linear layers read gives int8 and
scales itself, once for all of them. Where the residual branch reads it too (BERT, post-norm OPT) the norm
stays as it is, and query, key and value share one quantization of their input.

Needs: nothing.

Knobs: `w_bits_attn` and `w_bits_ffn`, `w_groups` (scales of a matrix; -1: one per output row), `a_bits`,
`fuse` (off: each layer quantizes its own input; the numbers are the same).

Hurts: with outlier channels, which every token has; with few `w_groups`, where rows differ in range. At
few rows W8A8 saves weight traffic only, and W4A8 unpacks its weights at every product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from harness import Method, hookimpl
from harness.nn.anatomy import blocks_of

from ._zeroquant import PAPER, BlockPacker, ZeroQuantLayout, misfit

if TYPE_CHECKING:
    from torch import nn

    from harness import Context

__all__ = ["METHOD", "ZeroQuantOptions"]


class ZeroQuantOptions(ZeroQuantLayout):
    """W8A8 with one scale per output row and per token."""


@torch.no_grad()
def transform(model: nn.Module, options: ZeroQuantLayout, context: Context) -> nn.Module:
    packer = BlockPacker.of(model, options)
    blocks = blocks_of(model)
    fused = 0
    with context.progress("quantize", len(blocks)) as done:
        for index, (name, block) in enumerate(blocks):
            fused += packer.pack(block, name)
            done(index + 1)
    packer.record(context, fused)
    return model


METHOD = Method(
    name="zeroquant",
    family="quantization",
    paper=PAPER,
    options=ZeroQuantOptions,
    transform=transform,
    applies=misfit,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
