"""Putting the kernels for one row where a traced model multiplies, and one launch where several share x.

Works on the graph that torch.compile hands to its backend, so every model and every method gets it,
whatever its modules are called: a call of `torch.nn.functional.linear` with one row becomes
`harness::linears`, and calls that read the same input become one. Products with packed weights that read
the same input become one as well, `harness::weight_only_linears`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from harness.kernels import dense, weight_only
from harness.kernels.selection import MOST_MATRICES
from harness.kernels.stored import stored
from harness.kernels.traced import Groups, example_of, is_input, join, operand_of, several, source_of
from harness.nn.packing import PackedWeight

__all__ = ["rewrite_linears"]

_LINEAR = torch._C._nn.linear


def rewrite_linears(module: fx.GraphModule) -> int:
    """Replace what `harness.kernels.dense` can run, and join what `harness.kernels.weight_only` can run
    together; returns how many products were replaced.

    Args:
        module: as dynamo traces it, with an ``example_value`` at every node.
    """
    replaced = 0
    for calls in list(_groups(module.graph)):
        for start in range(0, len(calls), dense.MOST_MATRICES):
            _replace(module.graph, calls[start : start + dense.MOST_MATRICES])
        replaced += len(calls)
    for some in several(_packed_groups(module.graph), MOST_MATRICES):
        _join_packed(module.graph, some)
        replaced += len(some)
    if replaced:
        module.graph.lint()
        module.recompile()
    return replaced


def _groups(graph: fx.Graph) -> Groups:
    """Calls that the kernel can run, those with the same input and the same kind of bias together."""
    groups = Groups(graph)
    for node in graph.nodes:
        if node.op == "call_function" and node.target is _LINEAR and _is_replaceable(node):
            x, _, bias = _operands(node)
            groups.add((x, bias is None), node)
    return groups


def _operands(node: fx.Node) -> tuple[Any, Any, Any]:
    return operand_of(node, 0, "input"), operand_of(node, 1, "weight"), operand_of(node, 2, "bias")


def _is_replaceable(node: fx.Node) -> bool:
    x, weight, bias = _operands(node)
    # Only weights and biases that are inputs of the graph: a computed one may not exist yet where the
    # first of its group stands.
    if not all(is_input(each) for each in (weight, *([] if bias is None else [bias]))):
        return False
    value, matrix, result = example_of(x), example_of(weight), example_of(node)
    if value is None or matrix is None or result is None:
        return False
    added = example_of(bias)
    if bias is not None and (added is None or not dense.fits_bias(added, matrix)):
        return False
    width = value.shape[-1]
    if not isinstance(width, int) or not isinstance(value.numel(), int) or not width:
        return False  # of unknown size
    # Under autocast the result has another type than what is multiplied.
    is_of_one_type = value.dtype == matrix.dtype == result.dtype
    return is_of_one_type and dense.fits(value.numel() // width, matrix)


def _packed_groups(graph: fx.Graph) -> Groups:
    """Products with packed weights that one launch can take: the same rows, weights stored alike."""
    groups = Groups(graph)
    for node in graph.nodes:
        if node.op == "call_function" and node.target is torch.ops.harness.weight_only_linear.default:
            x, *tensors, bits, group_size, tile, in_features = node.args
            if all(each is None or is_input(each) for each in tensors) and _shares(node):
                alike = tuple(None if each is None else _storage(each) for each in tensors[1:])
                key = (source_of(x), alike, bits, group_size, tile, in_features)
                groups.add(key, node)
    return groups


def _shares(node: fx.Node) -> bool:
    x, codes, scales, zeros = map(example_of, node.args[:4])
    if x is None or codes is None or scales is None or not isinstance(x.shape[0], int):
        return False
    bits, group_size, tile, in_features = node.args[5:]
    weight = PackedWeight(codes, scales, zeros, bits, group_size, tile, in_features, codes.shape[1])  # type: ignore[arg-type]
    return weight_only.share_a_launch(stored(weight).form, x.shape[0], x.dtype, codes.device)


def _storage(node: fx.Node) -> tuple[Any, ...]:
    """What kernels tell scales, zero points and biases apart by: the type, and one for all rows or each."""
    value = example_of(node)
    return (None,) if value is None else (value.dtype, value.dim(), value.shape[-1] == 1)


def _join_packed(graph: fx.Graph, calls: Sequence[fx.Node]) -> None:
    x, _, _, first_zeros, first_bias, *form = calls[0].args
    codes, scales, zeros, biases = ([call.args[place] for call in calls] for place in (1, 2, 3, 4))
    zeros, biases = [] if first_zeros is None else zeros, [] if first_bias is None else biases
    join(
        graph, calls, torch.ops.harness.weight_only_linears.default, (x, codes, scales, zeros, biases, *form)
    )


def _replace(graph: fx.Graph, calls: list[fx.Node]) -> None:
    x, _, first_bias = _operands(calls[0])
    shape = x.meta["example_value"].shape
    weights = [_operands(call)[1] for call in calls]
    biases = [] if first_bias is None else [_operands(call)[2] for call in calls]
    with graph.inserting_before(calls[0]):
        flat = graph.call_function(torch.reshape, (x, (-1, shape[-1])))
        flat.meta["example_value"] = x.meta["example_value"].reshape(-1, shape[-1])
        products = graph.call_function(torch.ops.harness.linears.default, (flat, weights, biases))
        for position, call in enumerate(calls):
            product = graph.call_function(operator.getitem, (products, position))
            out = call.meta["example_value"].shape
            shaped = graph.call_function(torch.reshape, (product, tuple(out)))
            shaped.meta["example_value"] = call.meta["example_value"]
            call.replace_all_uses_with(shaped)
    for call in calls:
        graph.erase_node(call)
