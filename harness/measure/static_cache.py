"""A KV cache of fixed size whose decode step never asks the host anything.

A CUDA graph replays the same kernels on the same addresses, so everything that changes from step to
step must live in device memory. transformers' `StaticCache` nearly does that, at the price of three
tiny kernels a layer for its bookkeeping, and its sliding-window layers count on the host, which a
graph would freeze. Here one device tensor counts for all layers, and a window is a ring buffer.

The cache is written for the two calls that are timed: one prefill into the empty cache, which knows
on the host that it is empty, and then steps of one token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, StaticLayer, get_layer_types_and_kwargs

from harness.nn.ring_cache import ring_size

__all__ = ["FixedCache", "FullLayer", "LayerCache", "Ticker", "WindowLayer", "cache_problem"]

_LAYERS = ("full_attention", "sliding_attention")


@dataclass(slots=True)
class Ticker:
    """How many tokens the cache holds: on the host while it is empty, on the device afterwards."""

    length: torch.Tensor  # int64 [1], tokens stored before the current forward pass
    empty: bool = True


class FullLayer(StaticLayer):
    """Keys and values [batch, heads, max_len, head_dim] of all tokens."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, ticker: Ticker, max_len: int) -> None:
        super().__init__(max_cache_len=max_len)
        self.ticker = ticker

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # Not the parent's: marking addresses for torch.compile imports the compiler, 100 MB of it.
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        shape = (self.batch_size, self.num_heads, self.max_cache_len)
        self.keys = key_states.new_zeros((*shape, self.k_head_dim))
        self.values = value_states.new_zeros((*shape, self.v_head_dim))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new keys and values and return those to attend to.

        At prefill these are the new ones themselves, as with an empty growing cache, so that
        attention meets as many keys as queries and keeps its causal fast path.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.ticker.empty:
            self._store_prompt(key_states, value_states)
            return key_states, value_states
        slot = self._slot()
        self.keys.index_copy_(2, slot, key_states)
        self.values.index_copy_(2, slot, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self.ticker.empty else self.max_cache_len), 0

    def get_seq_length(self) -> Any:  # int at prefill, a tensor while decoding, as in StaticLayer
        return 0 if self.ticker.empty else self.ticker.length[0]

    def query_offset(self) -> Any:
        """The position of the query among the stored keys, for the mask."""
        return self.get_seq_length()

    def _store_prompt(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        length = keys.shape[-2]
        self.keys[:, :, :length].copy_(keys)
        self.values[:, :, :length].copy_(values)

    def _slot(self) -> torch.Tensor:
        return self.ticker.length


class WindowLayer(FullLayer):
    """The last `window` tokens, in a ring: token t is in slot ``t % window``.

    Attention does not depend on the order of the keys, and rotary positions are in them already, so
    the ring needs no unrolling. Until it is full, the causal mask hides the empty slots; from then on
    every slot is inside the window, which `query_offset` expresses by standing still.
    """

    is_sliding = True

    def query_offset(self) -> Any:
        if self.ticker.empty:
            return 0
        return self.ticker.length[0].clamp(max=self.max_cache_len - 1)

    def _store_prompt(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        length = keys.shape[-2]
        kept = min(length, self.max_cache_len)
        slots = torch.arange(length - kept, length, device=keys.device) % self.max_cache_len
        self.keys.index_copy_(2, slots, keys[:, :, -kept:])
        self.values.index_copy_(2, slots, values[:, :, -kept:])

    def _slot(self) -> torch.Tensor:
        return self.ticker.length % self.max_cache_len


class RingLayer(WindowLayer):
    """The last `ring_size` tokens for a local pattern of the harness, whose attention knows that key p
    is in slot ``p % ring_size`` and needs the query's true position (see `harness.nn.ring_cache`)."""

    def query_offset(self) -> Any:
        return self.get_seq_length()


class LayerCache:
    """One layer of a cache, for the block that it belongs to.

    Looks like the whole cache to that block but does not use the block's number, so that blocks that are
    compiled once can share what was compiled.
    """

    def __init__(self, layer: FullLayer) -> None:
        self.layer = layer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, _layer_idx: int = 0, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `FullLayer.update`."""
        return self.layer.update(key_states, value_states)

    def get_seq_length(self, _layer_idx: int = 0) -> Any:
        """As of the layer."""
        return self.layer.get_seq_length()

    def get_mask_sizes(self, query_length: int, _layer_idx: int = 0) -> tuple[int, int]:
        """As of the layer."""
        return self.layer.get_mask_sizes(query_length)

    def get_query_offset(self, _layer_idx: int = 0) -> Any:
        """As of the layer."""
        return self.layer.query_offset()


class FixedCache(Cache):
    """The cache of all layers of a model, for one prefill and the steps after it.

    Args:
        config: the model's configuration; its `layer_types` and `sliding_window` decide the layers.
        max_len: prompt and new tokens together.
    """

    def __init__(self, config: Any, max_len: int, device: torch.device) -> None:
        self.ticker = Ticker(torch.zeros(1, dtype=torch.int64, device=device))
        types, options = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        window = options.get("sliding_window") or max_len
        layers = [self._layer(kind, window, max_len) for kind in types]
        super().__init__(layers=[*layers])
        self._layer_caches = [LayerCache(layer) for layer in layers]

    def _layer(self, kind: str, window: int, max_len: int) -> FullLayer:
        if kind == "sliding_attention" and window < max_len:
            return WindowLayer(self.ticker, window)
        ring = ring_size(kind)
        if ring is not None and ring < max_len:
            return RingLayer(self.ticker, ring)
        return FullLayer(self.ticker, max_len)

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        layer = self.layers[layer_idx]
        assert isinstance(layer, FullLayer)
        return layer.query_offset()

    def layer_cache(self, layer_idx: int) -> LayerCache:
        """The cache as the block of one layer sees it; always the same object."""
        return self._layer_caches[layer_idx]

    def empty(self) -> None:
        """Forget everything; the next forward pass is a prefill. Memory and addresses stay."""
        self.ticker.empty = True

    def filled(self, tokens: int) -> None:
        """The prefill of so many tokens is stored; what follows are steps."""
        self.ticker.empty = False
        self.ticker.length.fill_(tokens)

    def advance(self) -> None:
        """One step more, counted on the device."""
        self.ticker.length.add_(1)


def cache_problem(model: nn.Module) -> str | None:
    """Why a model cannot use a `FixedCache`; None where it can."""
    config = getattr(model, "config", None)
    if config is None:
        return "the model has no configuration that describes its cache"
    types, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    unknown = sorted(kind for kind in {*types} - {*_LAYERS} if ring_size(kind) is None)
    return f"layers of type {', '.join(unknown)} have no cache of fixed size" if unknown else None
