"""Key-value caches that keep only what a local pattern can still see.

The key of position p lives in slot ``p mod size``; a new key overwrites the one that left the
window. For a single query the layers return the whole buffer in slot order. The position of slot s
is then ``cur - ((cur - s) mod buffer)`` with `cur` the query's own position: that one formula also
holds for transformers' growing and static caches, in which nothing has wrapped yet. For several
queries at once (prefill, in one piece or in chunks) they return the kept keys in the order of their
positions, followed by the new ones.

The static form keeps its counter on the device and never reads it back for a single query, so a
decode step captured in a CUDA graph stays right when it is replayed at later positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicLayer, StaticLayer

from harness.errors import NotApplicable

__all__ = ["DynamicRingLayer", "StaticRingLayer", "ring_layer_type", "ring_size", "use_ring_caches"]

_PREFIX = "harness_ring_"


class DynamicRingLayer(DynamicLayer):
    """Grows up to `ring_size` tokens, then wraps: [batch, heads, <= ring_size, d]."""

    keys: Any
    values: Any

    ring_size: ClassVar[int]
    is_sliding = True
    is_croppable = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self.cumulative_length = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seen = self.cumulative_length
        self.cumulative_length += key_states.shape[-2]
        self.keys, keys = self._updated(self.keys, key_states, seen)
        self.values, values = self._updated(self.values, value_states, seen)
        return keys, values

    def _updated(self, kept: torch.Tensor, new: torch.Tensor, seen: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(what is kept from now on, what this step's queries read)."""
        size, total = self.ring_size, seen + new.shape[-2]
        if new.shape[-2] == 1 and seen >= size:
            slot = torch.tensor([seen % size], device=kept.device)
            ring = kept.index_copy(2, slot, new)
            return ring, ring
        ordered = kept.roll(-(seen % size), dims=2) if seen > size else kept
        full = torch.cat([ordered, new], dim=2)
        if total <= size:
            return full, full
        return full[:, :, -size:].roll(total % size, dims=2), full

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        kept = min(self.cumulative_length, self.ring_size)
        return kept + query_length, self.cumulative_length - kept

    def get_max_length(self) -> int:
        return self.ring_size

    def reset(self) -> None:
        self.is_initialized = False
        self.cumulative_length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Roll back; only possible while nothing has been overwritten.

        Raises:
            NotApplicable: tokens have left the ring.
        """
        if self.cumulative_length > self.ring_size:
            raise NotApplicable(
                f"a ring cache of {self.ring_size} tokens cannot be rolled back after "
                f"{self.cumulative_length}: the older ones are gone"
            )
        super().crop(tokens_to_remove)
        self.cumulative_length = int(self.keys.shape[-2])


class StaticRingLayer(StaticLayer):
    """A buffer of ``min(ring_size, max_cache_len)`` slots: [batch, heads, slots, d]."""

    keys: Any
    values: Any
    cumulative_length: Any

    ring_size: ClassVar[int]
    is_sliding = True

    def __init__(self, max_cache_len: int, **kwargs: Any) -> None:
        super().__init__(max_cache_len=min(max_cache_len, self.ring_size), **kwargs)
        self.is_empty = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        seen = self.cumulative_length
        kept = min(new, self.max_cache_len)
        steps = torch.arange(new - kept, new, device=self.device)
        slots = (seen + steps) % self.max_cache_len
        result = (self.keys, self.values)
        if new > 1:
            result = self._in_order(key_states, value_states)
        self.keys.index_copy_(2, slots, key_states[:, :, new - kept :])
        self.values.index_copy_(2, slots, value_states[:, :, new - kept :])
        seen.add_(new)
        self.is_empty = False
        return result

    def _in_order(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The kept tokens in the order of their positions, then the new ones."""
        if self.is_empty:  # the usual prefill: no need to read the counter back from the device
            return keys, values
        seen = int(self.cumulative_length)
        kept = min(seen, self.max_cache_len)
        slots = torch.arange(seen - kept, seen, device=self.device) % self.max_cache_len
        return (
            torch.cat([self.keys.index_select(2, slots), keys], dim=2),
            torch.cat([self.values.index_select(2, slots), values], dim=2),
        )

    def reset(self) -> None:
        super().reset()
        self.is_empty = True


def ring_layer_type(size: int) -> str:
    """The name under which transformers' caches make ring layers of `size` tokens."""
    name = f"{_PREFIX}{size}"
    if name not in DYNAMIC_LAYER_TYPE_MAPPING:
        # Defining the class registers it under `_layer_type`.
        members = {"ring_size": size, "_layer_type": name, "__module__": __name__}
        type(f"DynamicRingLayer{size}", (DynamicRingLayer,), dict(members))
        type(f"StaticRingLayer{size}", (StaticRingLayer,), dict(members))
    return name


def ring_size(layer_type: str) -> int | None:
    """How many tokens a layer of this type keeps; None where it is no ring."""
    return int(layer_type.removeprefix(_PREFIX)) if layer_type.startswith(_PREFIX) else None


def use_ring_caches(config: Any, sizes: Sequence[int | None]) -> bool:
    """Make every cache that is built from `config` keep `sizes[l]` tokens in layer l (None: all).

    The checkpoint format has no name for such layers, and a reloaded model has its ordinary
    attention again; so the configuration is saved and validated as that of the ordinary model.

    Returns:
        False, and changes nothing, where the architecture reads the types of its layers itself.
    """
    if hasattr(config, "layer_types"):
        return False
    base = type(config)

    def without_rings(name: str) -> Callable[[Any], Any]:
        original = getattr(base, name)

        def method(self: Any) -> Any:
            layer_types = self.__dict__.pop("layer_types", None)
            try:
                return original(self)
            finally:
                if layer_types is not None:
                    self.__dict__["layer_types"] = layer_types

        return method

    members: dict[str, Any] = {name: without_rings(name) for name in ("to_dict", "validate")}
    config.__class__ = type(base.__name__, (base,), {**members, "__module__": base.__module__})
    config.layer_types = ["full_attention" if size is None else ring_layer_type(size) for size in sizes]
    return True
