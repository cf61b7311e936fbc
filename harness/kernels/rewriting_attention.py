"""Putting the kernel for a decode step's attention where a traced model attends.

Works on the graph that torch.compile hands to its backend: a call of `scaled_dot_product_attention` with few
queries on many keys becomes `harness::decode_attention`. Query heads that share keys become queries of one
head there, and the copies of the keys that models make for them are passed over.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from harness.kernels import decode_attention
from harness.kernels.traced import Changes, example_of, operand_of

__all__ = ["rewrite_decode_attention"]

_ATTENTION = torch._C._nn.scaled_dot_product_attention
_WHOLE = slice(None, None, None)


@dataclass(frozen=True, slots=True)
class _Call:
    """The operands of a call that is to be replaced; `shared` query heads read the same keys."""

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    scale: float
    shared: int


def rewrite_decode_attention(module: fx.GraphModule) -> int:
    """Replace what `harness.kernels.decode_attention` can run; returns how many calls were replaced.

    Args:
        module: as dynamo traces it, with an ``example_value`` at every node.
    """
    changes = Changes(module.graph)
    calls = [
        call
        for node in module.graph.nodes
        if node.op == "call_function" and node.target is _ATTENTION
        if (call := _replaceable(node, changes)) is not None
    ]
    for call in calls:
        _replace(module.graph, call)
    if calls:
        module.graph.lint()
        module.recompile()
    return len(calls)


def _replaceable(node: fx.Node, changes: Changes) -> _Call | None:
    query, key, value = (operand_of(node, i, name) for i, name in enumerate(("query", "key", "value")))
    mask = operand_of(node, 3, "attn_mask")
    scale = operand_of(node, 6, "scale")
    plain = operand_of(node, 4, "dropout_p", 0.0) == 0.0 and operand_of(node, 5, "is_causal", False) is False
    if not plain or not (scale is None or isinstance(scale, float)):
        return None
    tensors = [example_of(each) for each in (query, key, value)]
    if any(each is None or each.dim() != 4 or not _is_known(each) for each in tensors):
        return None
    if mask is not None and ((seen := example_of(mask)) is None or not _is_known(seen)):
        return None
    q, k, _ = tensors
    assert q is not None and k is not None  # noqa: PT018 - for the type checker
    shared = _shared(query, key, value, mask, grouped=operand_of(node, 7, "enable_gqa", False) is True)
    if shared > 1 and k.shape[1] == q.shape[1]:
        copies = (key, value)
        key, value = map(_copied, copies)
        if any(changes.between(*each) for each in ((copies[0], node, [key]), (copies[1], node, [value]))):
            (key, value), shared = copies, 1  # the copies hold what was there before
    result = example_of(node)
    if result is None or result.dtype != q.dtype:
        return None  # under autocast
    call = _Call(node, query, key, value, mask, q.shape[3] ** -0.5 if scale is None else scale, shared)
    return call if _runs(call) else None


def _is_known(value: torch.Tensor) -> bool:
    return all(isinstance(size, int) for size in value.shape)


def _shared(query: fx.Node, key: fx.Node, value: fx.Node, mask: Any, *, grouped: bool) -> int:
    """How many query heads read the same keys, where their queries can be those of one head; else 1."""
    q, k = example_of(query), example_of(key)
    assert q is not None and k is not None  # noqa: PT018 - for the type checker
    seen = example_of(mask)
    if q.shape[2] != 1 or (seen is not None and seen.dim() > 2 and seen.shape[-3] != 1):
        return 1  # a mask of each head, or queries that come one after the other
    if grouped:
        return q.shape[1] // k.shape[1]
    sources = [_copied(each) for each in (key, value)]
    heads = {source.shape[1] for each in sources if (source := example_of(each)) is not None}
    return q.shape[1] // heads.pop() if None not in sources and len(heads) == 1 else 1


def _copied(node: fx.Node) -> Any:
    """The keys [batch, heads, keys, width] of which a node holds each head several times in a row, as
    `repeat_kv` of transformers makes them; None for any other node."""
    expanded = _argument_of(node, "call_method", "reshape")
    inserted = _argument_of(expanded, "call_method", "expand")
    source = _argument_of(inserted, "call_function", operator.getitem)
    if source is None or inserted.args[1] != (_WHOLE, _WHOLE, None, _WHOLE, _WHOLE):
        return None
    have, wide, made = (example_of(each) for each in (source, expanded, node))
    if have is None or wide is None or made is None or have.dim() != 4 or wide.dim() != 5:
        return None
    batch, heads, keys, width = have.shape
    repeats = wide.shape[2]
    is_copy = wide.shape == (batch, heads, repeats, keys, width)
    return source if is_copy and made.shape == (batch, heads * repeats, keys, width) else None


def _argument_of(node: Any, op: str, target: Any) -> Any:
    """The first argument of such a call; None for anything else."""
    return node.args[0] if isinstance(node, fx.Node) and (node.op, node.target) == (op, target) else None


def _runs(call: _Call) -> bool:
    query, key, value = (example_of(each) for each in (call.query, call.key, call.value))
    assert query is not None and key is not None and value is not None  # noqa: PT018 - for the type checker
    batch, heads, _, width = query.shape
    if call.shared > 1:
        query = query.new_empty(batch, heads // call.shared, call.shared, width)
    elif batch * heads > decode_attention.MOST_APART:
        return False
    return decode_attention.fits(query, key, value, example_of(call.mask))


def _replace(graph: fx.Graph, call: _Call) -> None:
    shape = tuple(call.node.meta["example_value"].shape)
    with graph.inserting_before(call.node):
        query: Any = call.query
        if call.shared > 1:
            batch, heads, _, width = call.query.meta["example_value"].shape
            query = graph.call_function(
                torch.reshape, (query, (batch, heads // call.shared, call.shared, width))
            )
        attended = graph.call_function(
            torch.ops.harness.decode_attention.default, (query, call.key, call.value, call.mask, call.scale)
        )
        shaped = graph.call_function(torch.reshape, (attended, shape))
        shaped.meta["example_value"] = call.node.meta["example_value"]
        call.node.replace_all_uses_with(shaped)
    graph.erase_node(call.node)
