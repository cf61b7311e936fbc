"""Putting the kernel for one row where a traced model calls `linear`.

Works on the graph that torch.compile hands to its backend, so every model and every method gets it,
whatever its modules are called: a call of `torch.nn.functional.linear` with one row becomes
`harness::linears`, and calls that read the same input become one.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from harness.kernels import dense

__all__ = ["rewrite_linears"]

_LINEAR = torch._C._nn.linear


def rewrite_linears(module: fx.GraphModule) -> int:
    """Replace what `harness.kernels.dense` can run; returns how many products were replaced.

    Args:
        module: as dynamo traces it, with an ``example_value`` at every node.
    """
    replaced = 0
    for calls in list(_groups(module.graph)):
        for start in range(0, len(calls), dense.MOST_MATRICES):
            _replace(module.graph, calls[start : start + dense.MOST_MATRICES])
        replaced += len(calls)
    if replaced:
        module.graph.lint()
        module.recompile()
    return replaced


def _groups(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """Calls that the kernel can run, those with the same input and the same kind of bias together."""
    groups: dict[tuple[fx.Node, bool], list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target is _LINEAR and _is_replaceable(node):
            x, _, bias = _operands(node)
            groups.setdefault((x, bias is None), []).append(node)
    yield from groups.values()


def _operands(node: fx.Node) -> tuple[Any, Any, Any]:
    def operand(position: int, name: str) -> Any:
        return node.args[position] if len(node.args) > position else node.kwargs.get(name)

    return operand(0, "input"), operand(1, "weight"), operand(2, "bias")


def _is_replaceable(node: fx.Node) -> bool:
    x, weight, bias = _operands(node)
    # Only weights and biases that are inputs of the graph: a computed one may not exist yet where the
    # first of its group stands.
    if not all(_is_input(each) for each in (weight, *([] if bias is None else [bias]))):
        return False
    value, matrix = x.meta.get("example_value"), weight.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or not isinstance(matrix, torch.Tensor):
        return False
    width = value.shape[-1]
    if not isinstance(width, int) or not isinstance(value.numel(), int) or not width:
        return False  # of unknown size
    return value.dtype == matrix.dtype and dense.fits(value.numel() // width, matrix)


def _is_input(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op in ("placeholder", "get_attr")


def _replace(graph: fx.Graph, calls: list[fx.Node]) -> None:
    x, _, first_bias = _operands(calls[0])
    shape = x.meta["example_value"].shape
    weights = [_operands(call)[1] for call in calls]
    biases = [] if first_bias is None else [_operands(call)[2] for call in calls]
    with graph.inserting_before(calls[0]):
        flat = graph.call_function(torch.reshape, (x, (-1, shape[-1])))
        products = graph.call_function(torch.ops.harness.linears.default, (flat, weights, biases))
        for position, call in enumerate(calls):
            product = graph.call_function(operator.getitem, (products, position))
            out = call.meta["example_value"].shape
            shaped = graph.call_function(torch.reshape, (product, tuple(out)))
            shaped.meta["example_value"] = call.meta["example_value"]
            call.replace_all_uses_with(shaped)
    for call in calls:
        graph.erase_node(call)
