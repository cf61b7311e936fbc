"""Swapping the attention of a transformers model, through its own registries.

transformers dispatches attention by name (`AttentionInterface`) and builds the mask for it by the
same name (`AttentionMaskInterface`). A swap registers a function under a name of its own and points
one model's configuration at it: no method is patched and no other model is touched.

The mask that is registered with it is no tensor. It is a `PositionMask`: where the queries stand
and which tokens are padding, from which each layer derives what its pattern needs. So one model can
mix patterns by layer, and nothing of size n² is built where a pattern does not need it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from harness.errors import NotApplicable
from harness.nn.local_attention import flex_attention_in_band, gathered_attention
from harness.nn.masks import Band
from harness.nn.sdpa import shared_heads_sdpa

__all__ = ["PositionMask", "attend_in_band", "keep_bands", "swap_attention", "use_local_attention"]

Attend = Callable[..., tuple[torch.Tensor, None]]

_PREFIX, _LOCAL = "harness_", "local_"
_FLEX_FROM = 1024  # tokens; below it a masked dense kernel is as fast and needs no compiling
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # other terms of a score than q·k
_EVERYTHING = 2**40  # a window that no sequence leaves
_BAND = "local_band"  # on an attention module: blocks that are compiled once must not ask for their number


@dataclass(eq=False)
class PositionMask:
    """What the mask of one forward pass follows from.

    Args:
        offset: position of the first query; a 0-d tensor where only the device knows it.
        padding: bool [batch, positions], False where there is no token; None where all are tokens.
        base: bool [batch, 1, q, kv] that holds as well (packed sequences), or None.
        built: what layers have built from it, by pattern and shape.
    """

    offset: int | torch.Tensor
    padding: torch.Tensor | None
    base: torch.Tensor | None
    built: dict[Any, Any] = field(default_factory=dict)

    ndim = 4  # models look at this to see whether a mask is already prepared

    @property
    def starts_at_zero(self) -> bool:
        return isinstance(self.offset, int) and self.offset == 0

    @property
    def shift(self) -> torch.Tensor | int:
        """Padding left of the first token, [batch, 1, 1, 1]: blocks are counted from there."""
        if self.padding is None:
            return 0
        return (self.padding.cumsum(-1) == 0).sum(-1)[:, None, None, None]


def swap_attention(model: nn.Module, name: str, attend: Attend, mask: str | None = None) -> None:
    """Make `model` compute its attention with `attend`, registered under `name`.

    Args:
        name: decides what is computed: whoever registers it again registers the same function.
        attend: ``attend(module, query, key, value, mask, *, dropout, scaling, **kwargs)``, as
            transformers calls it, but with a `PositionMask`; returns the output
            [batch, q, heads, d] and None.
        mask: transformers' name of the masks that `attend` takes instead (``sdpa``: bool tensors).

    Raises:
        NotApplicable: the model does not dispatch its attention.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if not isinstance(model, PreTrainedModel) or not model._can_set_attn_implementation():
        raise NotApplicable(f"{type(model).__name__} has its attention built in: it cannot be swapped")
    name = _PREFIX + name
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, attend)
        make_mask = ALL_MASK_ATTENTION_FUNCTIONS[mask] if mask else _position_mask
        AttentionMaskInterface.register(name, make_mask)
    model.set_attn_implementation(name)


def use_local_attention(model: nn.Module, bands: Sequence[Band | None]) -> bool:
    """Give layer l the pattern ``bands[l]`` (None: as it was).

    Returns:
        Whether caches that are built from the model's configuration now keep only what is visible.

    Raises:
        NotApplicable: the model has local layers of its own, or its attention cannot be swapped.
    """
    from harness.nn.ring_cache import use_ring_caches

    config: Any = model.config
    # First: such a step may have left types of layers that look like the model's own.
    if str(config._attn_implementation).startswith(_PREFIX + _LOCAL):
        raise NotApplicable("the attention was already made local by another step of the chain")
    own_types = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if own_types or getattr(config, "sliding_window", None) is not None:
        raise NotApplicable("the model already has local attention layers of its own")
    bands = tuple(bands)

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: PositionMask | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        layer: Any = module
        if extra := [name for name in _UNSUPPORTED if kwargs.get(name) is not None]:
            raise NotApplicable(f"the model's attention also has {', '.join(extra)}")
        band = getattr(layer, _BAND, None)
        if band is None:
            band = _band_of(layer, bands)
        return attend_in_band(query, key, value, attention_mask, band, dropout=dropout, scaling=scaling), None

    for module in model.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "is_causal"):
            setattr(module, _BAND, _band_of(module, bands))
    digest = hashlib.sha256(repr(bands).encode()).hexdigest()[:12]
    swap_attention(model, _LOCAL + digest, attend)
    if not all(band is None or band.causal for band in bands):
        return False
    return use_ring_caches(config, [band.reach if band else None for band in bands])


def keep_bands(old: nn.Module, new: nn.Module) -> None:
    """Give what takes the place of a model, or of a module, its local patterns, attention by attention.

    By their numbers alone they would find those of other layers where some have been left out since.
    """
    for name, module in old.named_modules():
        if (band := getattr(module, _BAND, None)) is not None:
            setattr(new.get_submodule(name), _BAND, band)


def _band_of(layer: Any, bands: Sequence[Band | None]) -> Band:
    return bands[layer.layer_idx] or Band("sliding", _EVERYTHING, causal=layer.is_causal)


def attend_in_band(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: PositionMask | None,
    band: Band,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
) -> torch.Tensor:
    """Attention of queries [batch, heads, q, d] to keys [batch, kv_heads, kv, d].

    Keys are in the order of `harness.nn.ring_cache`: by slot for a single query, else by position.

    Returns:
        [batch, q, heads, d].

    Raises:
        NotApplicable: the caller prepared a 4-D mask, which says nothing about positions.
    """
    if mask is None:
        mask = PositionMask(0, None, None)
    if not isinstance(mask, PositionMask):
        raise NotApplicable("local attention needs a 2-D mask of tokens, not a prepared 4-D mask")
    q_len, kv_len = query.shape[2], key.shape[2]
    if q_len == 1:
        return _one_query(query, key, value, mask, band, dropout, scaling)
    if mask.base is None and (q_len == kv_len or mask.starts_at_zero):
        # A static cache that was just filled returns its whole buffer; the rest of it is empty.
        key, value = key[:, :, :q_len], value[:, :, :q_len]
        sees_all = band.first(q_len - 1) <= 0 and (band.causal or band.last(0) >= q_len - 1)
        if mask.padding is None and sees_all:
            return shared_heads_sdpa(
                query, key, value, is_causal=band.causal, dropout=dropout, scaling=scaling
            )
        is_long = q_len >= max(_FLEX_FROM, 2 * band.reach)
        if mask.padding is None and query.is_cuda and is_long and dropout == 0:
            return flex_attention_in_band(query, key, value, band, scaling=scaling)
        if not sees_all and q_len > 2 * band.tiling.tile and not _blocks_shift(mask, band):
            return gathered_attention(
                query, key, value, band, scaling=scaling, dropout=dropout, padding=mask.padding
            )
    layout = _Layout("ordered", key.shape[2], key.shape[2])
    allowed = _dense_mask(mask, band, q_len, layout, query.device)
    return shared_heads_sdpa(query, key, value, allowed, dropout=dropout, scaling=scaling)


def _one_query(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: PositionMask,
    band: Band,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """A decode step: reads at most `band.reach` keys, and no value back from the device."""
    current, kv_len = mask.offset, key.shape[2]
    count = min(kv_len, band.reach) if band.causal else kv_len
    if count == kv_len:
        layout = _Layout("slots", kv_len, count)
    elif isinstance(current, int) and kv_len == current + 1:
        layout = _Layout("tail", kv_len, count)
        key, value = key[:, :, -count:], value[:, :, -count:]
    else:
        layout = _Layout("gathered", kv_len, count)
        slots = _positions(mask, 1, layout, query.device) % kv_len
        key, value = key.index_select(2, slots), value.index_select(2, slots)
    sees_all = (
        isinstance(current, int)
        and mask.padding is None
        and max(band.first(current), 0) <= current - count + 1
    )
    allowed = None if sees_all else _dense_mask(mask, band, 1, layout, query.device)
    return shared_heads_sdpa(query, key, value, allowed, dropout=dropout, scaling=scaling)


# --- positions ------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """How `keys` of a cache of `kv_len` lie: ``ordered`` by position, the last one being the last
    query's (or filling a buffer from its front); all ``slots`` of a buffer; the ``tail`` of an
    ordered cache, or the same keys ``gathered`` from their slots."""

    kind: str
    kv_len: int
    keys: int


def _positions(mask: PositionMask, q_len: int, layout: _Layout, device: torch.device) -> torch.Tensor:
    """Positions [keys] of the keys; below zero where a slot is still empty."""
    if layout not in mask.built:
        steps = torch.arange(layout.keys, device=device)
        current: Any = mask.offset + (q_len - 1)
        if layout.kind == "slots":
            mask.built[layout] = current - (current - steps) % layout.kv_len
        else:
            oldest = current - (layout.keys - 1)
            if layout.kind == "ordered":
                oldest = oldest.clamp(min=0) if torch.is_tensor(oldest) else max(oldest, 0)
            mask.built[layout] = oldest + steps
    positions: torch.Tensor = mask.built[layout]
    return positions


def _dense_mask(
    mask: PositionMask, band: Band, q_len: int, layout: _Layout, device: torch.device
) -> torch.Tensor:
    """bool [batch or 1, 1, q, keys]; a row without a key sees itself, so that no row is empty."""
    if (band, layout) not in mask.built:
        positions = _positions(mask, q_len, layout, device)
        i = mask.offset + torch.arange(q_len, device=device)[:, None]
        shift = mask.shift
        allowed = band.visible(i - shift, positions - shift) & (positions >= 0)
        allowed = allowed.view(-1, 1, q_len, layout.keys)
        if mask.padding is not None:
            last = mask.padding.shape[1] - 1
            present = mask.padding[:, positions.clamp(0, last)][:, None, None, :]
            allowed = (allowed & present) | (i == positions)
        if mask.base is not None:
            allowed = allowed & mask.base
        mask.built[band, layout] = allowed
    built: torch.Tensor = mask.built[band, layout]
    return built


def _blocks_shift(mask: PositionMask, band: Band) -> bool:
    """Whether rows of the batch may have their blocks at different places (padding on the left)."""
    if mask.padding is None or band.kind == "sliding":
        return False
    return not _can_look(mask.padding, 2) or not bool(mask.padding[:, 0].all())


# --- transformers' side ---------------------------------------------------------------------------


def _position_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: torch.Tensor | PositionMask | None = None,
    **kwargs: Any,
) -> PositionMask:
    """What transformers calls to build the mask of one forward pass."""
    from transformers import masking_utils

    plain = (None, masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function)
    if isinstance(attention_mask, PositionMask):  # prepared ahead by `generate`
        return attention_mask
    offset: Any = q_offset
    if isinstance(q_offset, torch.Tensor):
        # The cache adds to its counter in place while the layers run: keep the value of now.
        offset = int(q_offset) if _can_look(q_offset, q_length) else q_offset.clone()
    padding = None if attention_mask is None else attention_mask.bool()
    # transformers' own question, so that who knows the answer without reading the mask answers here
    # too. Not for a single token: it would be read back from the device at every step.
    if q_length > 1:
        if mask_function is masking_utils.bidirectional_mask_function:
            hides_nothing = masking_utils._ignore_bidirectional_mask_sdpa(padding, kv_length)
        else:
            hides_nothing = masking_utils._ignore_causal_mask_sdpa(
                padding, q_length, kv_length, offset, kv_offset
            )
        padding = None if hides_nothing else padding
    base = None
    if mask_function not in plain:
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        where = (batch_size, q_length, kv_length, q_offset, kv_offset)
        base = masking_utils.sdpa_mask(*where, mask_function, **{**kwargs, **skips})
    return PositionMask(offset, padding, base)


def _can_look(tensor: torch.Tensor, q_length: int) -> bool:
    """Whether a value may be read back from the device: not for a single token or in a capture."""
    if q_length == 1 or torch.compiler.is_compiling():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
