"""Narrower blocks: attention heads and FFN channels that are taken out, not masked.

A key-value head leaves with all query heads that read it, so that the number of query heads a key-value
head serves stays the same; a channel of the FFN leaves with its row in every layer that makes it and its
column in the one that reads it. transformers' attention modules count their heads by the shapes of their
projections or by attributes, which are set here, so forward passes and caches need nothing else.

What transformers' own classes can be built with is written into the configuration. Where they cannot (a
different number of heads in each block; OPT, GPT-2 and BERT, whose width is heads times head size; Llama,
whose heads must divide the width) the configuration keeps the numbers of heads that it had and says in
`block_shapes` what every block has; `build_narrow` makes the empty model for such a checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from harness.errors import NotApplicable
from harness.nn.anatomy import Anatomy, anatomy_of, blocks_of
from harness.nn.surgery import conv1d_to_linear, linear_from, replace_module

__all__ = [
    "BlockShape",
    "add_to_bias",
    "block_shapes",
    "build_narrow",
    "describe_in_config",
    "keep_channels",
    "keep_heads",
    "require_described_heads",
]

_FFN_SIZES = ("intermediate_size", "ffn_dim", "n_inner")


@dataclass(frozen=True, slots=True)
class BlockShape:
    """What a block has: heads, key-value heads, FFN channels, and which of its linears have a bias."""

    heads: int
    kv_heads: int
    ffn: int
    head_dim: int
    biased: tuple[str, ...]


def block_shapes(model: nn.Module) -> list[BlockShape]:
    """The shapes of all blocks, read off their layers.

    Raises:
        NotApplicable: an unknown family, or a projection that is no `nn.Linear`.
    """
    anatomy = anatomy_of(model)
    return [_shape(block, name, anatomy) for name, block in blocks_of(model)]


def keep_heads(model: nn.Module, index: int, kept: torch.Tensor) -> None:
    """Keep only these key-value heads of a block, and the query heads that read them.

    Args:
        index: of the block.
        kept: int64, rising, on the device of the model; at least one.
    """
    name, block, anatomy = *blocks_of(model)[index], anatomy_of(model)
    shape = _shape(block, name, anatomy)
    shared = shape.heads // shape.kv_heads
    queries = (kept[:, None] * shared + torch.arange(shared, device=kept.device)).flatten()
    query_rows, kv_rows = _rows(queries, shape.head_dim), _rows(kept, shape.head_dim)
    if len(anatomy.qkv) == 1:
        query, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        fused = torch.cat([query_rows, query + kv_rows, query + narrow + kv_rows])
        _keep_rows(block, anatomy.qkv[0], fused)
    else:
        for part, rows in zip(anatomy.qkv, (query_rows, kv_rows, kv_rows), strict=True):
            _keep_rows(block, part, rows)
    _keep_columns(block, anatomy.out, query_rows)
    attention: Any = block.get_submodule(anatomy.attention)
    width = len(queries) * shape.head_dim
    counts = {
        "num_heads": len(queries),
        "num_attention_heads": len(queries),
        "num_key_value_heads": len(kept),
        "all_head_size": width,
        "split_size": width,
    }
    for attribute, value in counts.items():
        if hasattr(attention, attribute):
            setattr(attention, attribute, value)


def keep_channels(model: nn.Module, index: int, kept: torch.Tensor) -> None:
    """Keep only these FFN channels of a block: int64, rising, on the device of the model; at least one."""
    _, block = blocks_of(model)[index]
    anatomy = anatomy_of(model)
    for name in anatomy.ffn_in:
        _keep_rows(block, name, kept)
    _keep_columns(block, anatomy.ffn_out, kept)


@torch.no_grad()
def add_to_bias(block: nn.Module, name: str, change: torch.Tensor) -> None:
    """Add a vector [out] to the bias of a linear layer, which gets one where it has none."""
    linear = _linear(block, name)
    if linear.bias is not None:
        linear.bias.add_(change.to(linear.bias.dtype))
        return
    new = linear_from(linear.weight, change.to(linear.weight.dtype).clone())
    new.bias.requires_grad_(linear.weight.requires_grad)
    replace_module(block, name, new)


def describe_in_config(model: nn.Module) -> None:
    """Write the shapes of the blocks into the model's configuration; see the head of this module."""
    config: Any = model.config
    shapes = block_shapes(model)
    first, equal = shapes[0], all(shape == shapes[0] for shape in shapes)
    for name in _FFN_SIZES:
        if hasattr(config, name):
            setattr(config, name, max(shape.ffn for shape in shapes))
    described = equal
    if (first.heads, first.kv_heads) != _heads_of(config) or not equal:
        described = equal and _describe_heads(config, first, anatomy_of(model))
    described &= _describe_biases(config, shapes, anatomy_of(model))
    if described:
        if hasattr(config, "block_shapes"):
            del config.block_shapes
    else:
        config.block_shapes = [asdict(shape) for shape in shapes]


def build_narrow(make: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    """An untrained model of the shapes that a configuration describes, for `load_state_dict`.

    Args:
        make: the class of the model, or a function that builds it from a configuration.
    """
    plain = copy.deepcopy(config)
    shapes = getattr(plain, "block_shapes", None)
    model = make(plain)
    conv1d_to_linear(model)
    for index, values in enumerate(shapes or ()):
        target = BlockShape(**{**values, "biased": tuple(values["biased"])})
        now = block_shapes(model)[index]
        if target.kv_heads < now.kv_heads:
            keep_heads(model, index, torch.arange(target.kv_heads))
        if target.ffn < now.ffn:
            keep_channels(model, index, torch.arange(target.ffn))
        _, block = blocks_of(model)[index]
        for name in anatomy_of(model).linears:
            linear = _linear(block, name)
            if name in target.biased and linear.bias is None:
                add_to_bias(block, name, torch.zeros(linear.out_features))
            if name not in target.biased and linear.bias is not None:
                replace_module(block, name, linear_from(linear.weight, None))
    return model


def require_described_heads(model: nn.Module) -> None:
    """For what goes by the configuration's numbers of heads.

    Raises:
        NotApplicable: the blocks have others.
    """
    if hasattr(model.config, "block_shapes"):
        raise NotApplicable(
            "heads were taken out of the blocks, which the model's configuration cannot describe"
        )


# --- the configuration -----------------------------------------------------------------------------


def _heads_of(config: Any) -> tuple[int, int]:
    heads = config.num_attention_heads
    return heads, getattr(config, "num_key_value_heads", None) or heads


def _describe_heads(config: Any, shape: BlockShape, anatomy: Anatomy) -> bool:
    """Write the numbers of heads where transformers can build a model with them; whether it can."""
    if anatomy.family != "llama":
        return False
    if config.model_type == "llama" and config.hidden_size % shape.heads:
        return False
    config.head_dim = shape.head_dim
    config.num_attention_heads, config.num_key_value_heads = shape.heads, shape.kv_heads
    return True


def _describe_biases(config: Any, shapes: Sequence[BlockShape], anatomy: Anatomy) -> bool:
    """Llama's own switches for biases set those of whole groups of layers; missing ones start as zeros."""
    described = True
    flags = (
        ("attention_bias", (*anatomy.qkv, anatomy.out)),
        ("mlp_bias", (*anatomy.ffn_in, anatomy.ffn_out)),
    )
    for flag, layers in flags if anatomy.family == "llama" else ():
        added = any(layers[-1] in shape.biased for shape in shapes) and not getattr(config, flag, False)
        if added and config.model_type == "llama":
            setattr(config, flag, True)
        else:
            described &= not added
    return described


# --- one block -------------------------------------------------------------------------------------


def _shape(block: nn.Module, name: str, anatomy: Anatomy) -> BlockShape:
    try:
        linears = {part: _linear(block, part) for part in anatomy.linears}
    except NotApplicable as error:
        raise NotApplicable(f"{name}.{error}") from None
    attention: Any = block.get_submodule(anatomy.attention)
    head_dim = getattr(attention, "head_dim", None) or attention.attention_head_size
    width = linears[anatomy.out].in_features
    made = sum(linears[part].out_features for part in anatomy.qkv)
    return BlockShape(
        heads=width // head_dim,
        kv_heads=(made - width) // (2 * head_dim),
        ffn=linears[anatomy.ffn_out].in_features,
        head_dim=head_dim,
        biased=tuple(part for part, linear in linears.items() if linear.bias is not None),
    )


def _linear(block: nn.Module, name: str) -> nn.Linear:
    try:
        module = block.get_submodule(name)
    except AttributeError:
        raise NotApplicable(f"{name} does not exist, so its heads or channels cannot be taken out") from None
    if not isinstance(module, nn.Linear):
        raise NotApplicable(f"{name} is no nn.Linear but {type(module).__name__}; prune before that")
    return module


def _rows(heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The rows of projections that belong to these heads."""
    return (heads[:, None] * head_dim + torch.arange(head_dim, device=heads.device)).flatten()


def _keep_rows(block: nn.Module, name: str, rows: torch.Tensor) -> None:
    linear = _linear(block, name)
    bias = None if linear.bias is None else _chosen(linear.bias, rows, 0)
    replace_module(block, name, linear_from(_chosen(linear.weight, rows, 0), bias))


def _keep_columns(block: nn.Module, name: str, columns: torch.Tensor) -> None:
    linear = _linear(block, name)
    replace_module(block, name, linear_from(_chosen(linear.weight, columns, 1), linear.bias))


def _chosen(tensor: torch.Tensor, places: torch.Tensor, dim: int) -> torch.Tensor:
    """A copy of some rows or columns; trainable where the whole was."""
    return tensor.detach().index_select(dim, places).requires_grad_(tensor.requires_grad)
