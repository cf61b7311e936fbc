"""Local attention: each token attends only to nearby tokens, so time and cache stop growing with N.

Paper: Blockwise Self-Attention for Long Document Understanding. Jiezhong Qiu, Hao Ma, Omer Levy,
Scott Wen-tau Yih, Sinong Wang, Jie Tang, 2019, arXiv:1911.02972. The causal sliding form is the one
of Mistral 7B (arXiv:2310.06825).

Changes: which keys a query sees; no weight. `sliding`: the last `window` tokens. `block`: the own
block of `block_size` tokens. `lookback`: the own block and the `lookback` blocks before it.
Encoders get the two-sided forms. Decoders keep only the visible keys in their cache (a ring
buffer), except in families whose code fixes the kinds of its layers, where the cache stays full and
only reading it gets cheaper.

Needs: nothing; `steps` fine-tunes afterwards.

Knobs: `mode`, `window`, `block_size`, `lookback`, `dense_every` (every n-th layer stays dense),
`steps`.

Hurts: on anything farther away than layers times window (`block`: than the block), and it saves
nothing on inputs shorter than the window. On an H100 it starts to pay between 2048 and 8192 tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from harness import Method, Options, Paper, hookimpl
from harness.nn.attention import use_local_attention
from harness.nn.masks import Band

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from harness import Context, ModelInfo

__all__ = ["METHOD", "BlockLocalOptions", "band_of", "bands_of"]


class BlockLocalOptions(Options):
    """Sizes are in tokens."""

    aliases: ClassVar[Mapping[str, str]] = {"b": "block_size", "c": "lookback", "block": "block_size"}

    mode: Literal["sliding", "block", "lookback"] = "sliding"
    window: int = Field(256, ge=1, description="tokens that a query sees, its own included")
    block_size: int = Field(128, ge=1, description="tokens in a block")
    lookback: int = Field(1, ge=0, description="blocks before the own one")
    dense_every: int = Field(0, ge=0, description="every n-th layer keeps full attention; 0: none")
    steps: int = Field(0, ge=0, description="fine-tuning steps after the swap")


def band_of(options: BlockLocalOptions, *, causal: bool) -> Band:
    """The pattern of a local layer."""
    if options.mode == "sliding":
        return Band("sliding", options.window, causal=causal)
    lookback = options.lookback if options.mode == "lookback" else 0
    return Band("block", options.block_size, lookback, causal=causal)


def bands_of(options: BlockLocalOptions, num_layers: int, *, causal: bool) -> list[Band | None]:
    """The pattern of each layer; None where the layer stays dense."""
    band = band_of(options, causal=causal)
    every = options.dense_every
    return [None if every and (index + 1) % every == 0 else band for index in range(num_layers)]


def transform(model: nn.Module, options: BlockLocalOptions, context: Context) -> nn.Module:
    causal = context.info.kind == "decoder"
    config: Any = model.config
    bands = bands_of(options, config.num_hidden_layers, causal=causal)
    has_rings = use_local_attention(model, bands)
    if causal:
        reach = band_of(options, causal=True).reach
        note = "a ring of as many tokens" if has_rings else "the cache itself is kept full"
        context.record("attention_reach", reach, "tokens", f"key-value cache: {note}")
    if options.steps:
        context.train(model, steps=options.steps)
    return model


def applies(info: ModelInfo, options: BlockLocalOptions) -> str | None:
    if info.family == "other":
        return f"architecture {info.model_type!r} is not known"
    if options.dense_every == 1:
        return "dense_every=1 leaves every layer dense"
    if options.steps and info.kind == "encoder":
        return "encoders have no training objective here; leave steps at 0"
    return None


METHOD = Method(
    name="block-local",
    family="attention",
    paper=Paper(
        title="Blockwise Self-Attention for Long Document Understanding",
        authors="Qiu, Ma, Levy, Yih, Wang, Tang",
        year=2019,
        arxiv="1911.02972",
    ),
    options=BlockLocalOptions,
    transform=transform,
    needs=lambda options: ("training",) if options.steps else (),
    applies=applies,
    architectural=True,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
