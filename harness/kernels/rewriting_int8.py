"""Int8 products of one row, joined in a traced module where they read the same row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from harness.kernels import int8
from harness.kernels.selection import MOST_MATRICES
from harness.kernels.traced import Groups, example_of, is_input, join, join_groups, source_of

__all__ = ["join_int8"]

_OF_FLOATS = torch.ops.harness.int8_linear.default
_OF_CODES = torch.ops.harness.int8_linear_of_codes.default


def join_int8(module: fx.GraphModule) -> int:
    """Give products that read the same row one launch (`harness.kernels.int8.linears`); how many were joined.

    Args:
        module: as dynamo traces it, with an ``example_value`` at every node.
    """
    return join_groups(module, _groups(module.graph), MOST_MATRICES, _join)


def _groups(graph: fx.Graph) -> Groups:
    """Calls that one launch can take: the same row, rounded alike, and weights stored alike."""
    groups = Groups(graph)
    for node in graph.nodes:
        if node.op == "call_function" and node.target in (_OF_FLOATS, _OF_CODES):
            x, scale, weight, weight_scale, bias, dtype = _parts(node)
            tensors = (weight, weight_scale, *([] if bias is None else [bias]))
            if all(map(is_input, tensors)) and _shares(x, weight):
                own = example_of(weight_scale)
                one_scale = own is not None and own.numel() == 1
                rounded = None if scale is None else source_of(scale)
                key = (node.target, source_of(x), rounded, one_scale, bias is None, dtype)
                groups.add(key, node)
    return groups


def _parts(node: fx.Node) -> tuple[Any, ...]:
    """x, its scale, the weight, its scale, the bias and the type of the result."""
    if node.target is _OF_CODES:
        x, scale, weight, weight_scale, bias, dtype = node.args
        return x, scale, weight, weight_scale, bias, dtype
    x, weight, weight_scale, bias, _, scale = node.args
    value = example_of(x)
    return x, scale, weight, weight_scale, bias, None if value is None else value.dtype


def _shares(x: Any, weight: Any) -> bool:
    value, matrix = example_of(x), example_of(weight)
    if value is None or matrix is None or not isinstance(value.shape[0], int):
        return False
    return int8.share_a_launch(value.shape[0], matrix.shape[0], matrix.shape[1], matrix.device)


def _join(graph: fx.Graph, calls: Sequence[fx.Node]) -> None:
    parts = [_parts(call) for call in calls]
    x, scale, _, _, first_bias, dtype = parts[0]
    weights, weight_scales, biases = ([each[place] for each in parts] for place in (2, 3, 4))
    arguments = (x, scale, weights, weight_scales, [] if first_bias is None else biases, dtype)
    join(graph, calls, torch.ops.harness.int8_linears.default, arguments)
