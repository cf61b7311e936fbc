"""Putting channels into another order without changing what the model computes.

A channel between two layers may move if the rows that make it and the columns that read it move together.
Four places allow it: the hidden channels of the FFN; the value channels inside a head, which the output
projection reads (heads that share a value head move alike); the query and key channels inside a head, where
no rotary position pairs them; and the residual stream, which every block reads and writes.

Orders are int64: channel i of the result is channel ``order[i]`` of what was there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from harness.errors import NotApplicable
from harness.nn.anatomy import Anatomy, anatomy_of, blocks_of, find
from harness.nn.folding import linears_of

__all__ = [
    "head_channels",
    "order_columns",
    "order_ffn",
    "order_query_key",
    "order_residual",
    "order_rows",
    "order_value_output",
    "residual_readers",
    "value_heads",
]

_POSITIONS = {"opt": "embed_positions", "gpt2": "wpe"}  # beside the token embedding


@torch.no_grad()
def order_rows(linear: nn.Linear, order: torch.Tensor, first: int = 0) -> None:
    """Rows ``first, …`` of a weight [out, in] and its bias."""
    rows = slice(first, first + len(order))
    linear.weight[rows] = linear.weight[rows][order]
    if linear.bias is not None:
        linear.bias[rows] = linear.bias[rows][order]


@torch.no_grad()
def order_columns(linear: nn.Linear, order: torch.Tensor) -> None:
    """The columns of a weight [out, in]."""
    linear.weight.copy_(linear.weight[:, order])


def order_ffn(block: nn.Module, anatomy: Anatomy, order: torch.Tensor, where: str) -> None:
    """The hidden channels [ffn]: rows of gate and up, columns of down.

    Raises:
        NotApplicable: a layer is missing or no `nn.Linear` (as for all functions here).
    """
    *producers, consumer = linears_of(block, (*anatomy.ffn_in, anatomy.ffn_out), where)
    for linear in producers:
        order_rows(linear, order)
    order_columns(consumer, order)


def value_heads(block: nn.Module, anatomy: Anatomy, where: str) -> tuple[int, int, int]:
    """The value heads of a block, the query heads that share one, and the channels of a head.

    Read off the block: a method before may have left it fewer heads than the model had.
    """
    value, out = linears_of(block, (anatomy.qkv[-1], anatomy.out), where)
    attention: Any = block.get_submodule(anatomy.attention)
    head_dim: int = getattr(attention, "head_dim", None) or attention.attention_head_size
    is_fused = len(anatomy.qkv) == 1  # rows of query, as many as `out` reads, then of key and of value
    rows = (value.out_features - out.in_features) // 2 if is_fused else value.out_features
    return rows // head_dim, out.in_features // rows, head_dim


def order_value_output(block: nn.Module, anatomy: Anatomy, order: torch.Tensor, where: str) -> None:
    """The value channels, `order` [value heads, head_dim] inside each: rows of V, columns of the output."""
    value, out = linears_of(block, (anatomy.qkv[-1], anatomy.out), where)
    kv_heads, sharing, head_dim = value_heads(block, anatomy, where)
    first = value.out_features - kv_heads * head_dim  # the last rows where they are fused
    order_rows(value, head_channels(order, head_dim), first)
    order_columns(out, head_channels(order.repeat_interleave(sharing, 0), head_dim))


def order_query_key(block: nn.Module, anatomy: Anatomy, order: torch.Tensor, heads: int, where: str) -> None:
    """Query and key channels, `order` [heads, head_dim] inside each head: rows of both.

    Raises:
        NotApplicable: rotary positions turn pairs of channels, each by its own angle.
    """
    if anatomy.positions == "rope":
        raise NotApplicable(f"{where}: rotary positions fix the order of query and key channels")
    layers = linears_of(block, anatomy.qkv[:2], where)
    rows = head_channels(order, layers[-1].weight.shape[0] // (3 if len(anatomy.qkv) == 1 else 1) // heads)
    for index in range(2):
        fused = len(anatomy.qkv) == 1
        order_rows(layers[0 if fused else index], rows, index * len(rows) if fused else 0)


def head_channels(order: torch.Tensor, head_dim: int) -> torch.Tensor:
    """An order inside each head [heads, head_dim] as one over all channels."""
    starts = torch.arange(len(order), device=order.device)[:, None] * head_dim
    return (order + starts).flatten()


def residual_readers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linear layers inside the blocks that read the residual stream (through a norm), by full name."""
    anatomy = anatomy_of(model)
    names = (*anatomy.qkv, *anatomy.ffn_in)
    return [
        (f"{where}.{name}", linear)
        for where, block in blocks_of(model)
        for name, linear in zip(names, linears_of(block, names, where), strict=True)
    ]


@torch.no_grad()
def order_residual(model: nn.Module, order: torch.Tensor) -> None:
    """The channels of the residual stream, `order` [d]: one for the whole model.

    Raises:
        NotApplicable: an encoder, whose outputs are these channels, or a model with a projection beside
            its embedding.
    """
    anatomy = anatomy_of(model)
    embedding = find(model, anatomy.embedding)
    head = find(model, anatomy.head)
    if anatomy.family == "bert" or embedding is None or head is None:
        raise NotApplicable("the residual stream is an output of this model: its channels cannot move")
    name, table = embedding
    parent: Any = model.get_submodule(name.rpartition(".")[0])
    if getattr(parent, "project_in", None) is not None:
        raise NotApplicable("a projection beside the embedding reads the residual stream")
    tables = [table, *([getattr(parent, _POSITIONS[anatomy.family])] if anatomy.family in _POSITIONS else [])]
    if head[1].weight is not table.weight:
        tables.append(head[1])
    for module in tables:
        weight: Any = module.weight
        weight.copy_(weight[:, order])
    for _, linear in residual_readers(model):
        order_columns(linear, order)
    norms = [found[1]] if (found := find(model, anatomy.final_norm)) else []
    for where, block in blocks_of(model):
        for linear in linears_of(block, (anatomy.out, anatomy.ffn_out), where):
            order_rows(linear, order)
        norms += [block.get_submodule(site.norm) for site in anatomy.norm_sites]
    for norm in norms:
        for parameter in norm.parameters():
            parameter.copy_(parameter[order])
