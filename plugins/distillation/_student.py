"""Making a shallower model out of a deep one's own layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from harness import ConfigError
from harness.nn.anatomy import blocks_of
from harness.nn.fresh import reinitialised
from harness.nn.surgery import replace_module

__all__ = ["NoTokenTypes", "drop_token_types_and_pooler", "keep_layers", "reinitialised", "spread"]


def spread(num_layers: int, kept: int) -> tuple[int, ...]:
    """`kept` of `num_layers` layers, evenly spread, the first and the last among them.

    >>> spread(12, 6)
    (0, 2, 4, 7, 9, 11)
    """
    return tuple(int(i) for i in torch.linspace(0, num_layers - 1, kept, dtype=torch.float64).round())


def checked_map(layer_map: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """The map itself, if it rises strictly within the model's layers.

    Raises:
        ConfigError: it does not.
    """
    rising = all(a < b for a, b in pairwise(layer_map))
    if not layer_map or not rising or layer_map[0] < 0 or layer_map[-1] >= num_layers:
        raise ConfigError(f"layer_map {tuple(layer_map)} must rise strictly within 0..{num_layers - 1}")
    return tuple(layer_map)


def keep_layers(model: nn.Module, layer_map: Sequence[int]) -> nn.Module:
    """Keep only these blocks, in place; the rest of the model stays. Returns the model.

    Every module that knows its place in the stack (`layer_idx`, which also names its slot in the
    key-value cache) is told its new one, and the configuration its new depth.
    """
    names = [name for name, _ in blocks_of(model)]
    container_name = names[0].rpartition(".")[0]
    container = model.get_submodule(container_name)
    assert isinstance(container, nn.ModuleList)
    kept = nn.ModuleList([container[index] for index in layer_map])
    for index, block in enumerate(kept):
        for module in block.modules():
            if getattr(module, "layer_idx", None) is not None:
                module.layer_idx = index  # type: ignore[assignment]
    replace_module(model, container_name, kept)
    config: Any = model.config
    for name in ("layer_types", "no_rope_layers", "block_shapes"):  # one entry a layer
        if isinstance(entries := getattr(config, name, None), list):
            setattr(config, name, [entries[index] for index in layer_map])
    config.num_hidden_layers = len(kept)
    return model


class NoTokenTypes(nn.Module):
    """Stands where the token-type embedding was, and adds nothing."""

    def forward(self, token_type_ids: torch.Tensor) -> torch.Tensor:  # -> []
        return torch.zeros((), device=token_type_ids.device)  # 0-d: keeps the others' dtype


def drop_token_types_and_pooler(model: nn.Module) -> nn.Module:
    """BERT without what DistilBERT leaves out; returns the model.

    The embedding of type 0, which every single-sentence input gets, moves into the positions, so
    such inputs are embedded as before.
    """
    for prefix in ("bert.", ""):
        name = f"{prefix}embeddings.token_type_embeddings"
        if name in dict(model.named_modules()):
            embeddings: Any = model.get_submodule(f"{prefix}embeddings")
            with torch.no_grad():
                embeddings.position_embeddings.weight.add_(embeddings.token_type_embeddings.weight[0])
            embeddings.token_type_embeddings = NoTokenTypes()
            encoder: Any = model.get_submodule(prefix.rstrip(".")) if prefix else model
            encoder.pooler = None
            break
    return model
