"""Products of a few rows with 2:4 weights, joined in a traced module where they read the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from harness.kernels import semi_structured, sparse_rows  # noqa: F401 - the first registers the products
from harness.kernels.selection import MOST_MATRICES
from harness.kernels.traced import example_of, is_input, join, join_groups, same_values, value_read

__all__ = ["join_sparse"]

_OF_16_BITS = torch.ops.harness.semi_structured_linear.default
_OF_8_BITS = torch.ops.harness.semi_structured_few_8_bit.default


def join_sparse(module: fx.GraphModule) -> int:
    """Give products with 2:4 weights that read the same rows one launch (`sparse_rows.multiply_several`);
    how many were joined.

    Args:
        module: as dynamo traces it, with an ``example_value`` at every node.
    """
    return join_groups(module, _groups(module.graph), MOST_MATRICES, _join)


def _groups(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """Calls that one launch can take: the same rows, weights of one type, and biases of one type or none."""
    values = same_values(graph)
    groups: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in (_OF_16_BITS, _OF_8_BITS):
            continue
        x, rows, tensors, bias = _parts(node)
        value, result = example_of(x), example_of(node)
        if value is None or result is None or not all(map(is_input, tensors)):
            continue
        if _is_few(node, value):
            own = example_of(bias)
            key = (
                values[node][1],
                value_read(values, x, node),
                None if rows is None else value_read(values, rows, node),
                result.dtype,
                value.dtype,
                None if own is None else own.dtype,
            )
            groups.setdefault(key, []).append(node)
    yield from groups.values()


def _parts(node: fx.Node) -> tuple[Any, Any, list[Any], Any]:
    """x, its scales, what is stored of the matrix, and the bias, which is stored as well."""
    if node.target is _OF_16_BITS:
        x, packed, bias = node.args[:3]
        return x, None, [packed, *([] if bias is None else [bias])], bias
    x, packed, rows, columns, bias = node.args[:5]
    return x, rows, [packed, columns, *([] if bias is None else [bias])], bias


def _is_few(node: fx.Node, x: torch.Tensor) -> bool:
    """Whether it is the project's kernel that multiplies; of 8 bits it has an operator of its own."""
    if not isinstance(x.shape[0], int) or x.shape[0] > sparse_rows.MOST_ROWS:
        return False
    return node.target is _OF_8_BITS or bool(node.args[5])


def _join(graph: fx.Graph, calls: Sequence[fx.Node]) -> None:
    packed = [call.args[1] for call in calls]
    biases = [bias for call in calls if (bias := _parts(call)[3]) is not None]
    x = calls[0].args[0]
    if calls[0].target is _OF_16_BITS:
        target = torch.ops.harness.semi_structured_linears.default
        arguments: tuple[Any, ...] = (x, packed, biases, [call.args[3] for call in calls])
    else:
        target = torch.ops.harness.semi_structured_few_8_bit_several.default
        _, _, rows, _, _, dtype = calls[0].args
        arguments = (x, packed, rows, [call.args[3] for call in calls], biases, dtype)
    join(graph, calls, target, arguments)
