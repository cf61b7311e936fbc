"""Residual sums of one row as the biases of the products before them, in a traced module.

A product of one row takes some microseconds, and to add the residual branch to it a kernel of its own one or
two more, most of which is starting it. The kernels for one row add a bias in float32 before they round, which
the residual may as well be: one rounding less than two steps have.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from harness.kernels import (  # noqa: F401 - they register the products
    dense,
    fp8,
    int8,
    semi_structured,
    weight_only,
)
from harness.kernels.traced import Changes, example_of, operand_of

__all__ = ["fold_residuals"]

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_DENSE = torch.ops.harness.linears.default
_SPARSE = torch.ops.harness.semi_structured_linear.default
_BIASES = {
    torch.ops.harness.weight_only_linear.default: 4,
    torch.ops.harness.int8_linear.default: 3,
    torch.ops.harness.int8_linear_of_codes.default: 4,
    torch.ops.harness.float8_linear_of_codes.default: 4,
    torch.ops.harness.semi_structured_few_8_bit.default: 4,
    _SPARSE: 2,
}
"""Which argument of a product is its bias."""


def fold_residuals(module: fx.GraphModule) -> int:
    """Give products of one row what is added to them as a bias; how many sums are gone.

    Args:
        module: as `harness.kernels.rewriting.rewrite_linears` leaves it, with an ``example_value`` at every
            node that dynamo made.
    """
    place = {node: index for index, node in enumerate(module.graph.nodes)}
    changes = Changes(module.graph)
    folded = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in _ADDITIONS or node.kwargs or len(node.args) != 2:
            continue
        # In place the first one is changed, which others may read.
        orders = [node.args] if node.target is operator.iadd else [node.args, node.args[::-1]]
        for product, residual in orders:
            found = _product_of(product)
            if found is not None and _can_be_bias(found, product, residual, node, place):
                if changes.between(found, node, [residual]):
                    continue  # the product would read it too early
                _fold(module.graph, found, product, residual, node)
                folded += 1
                break
    if folded:
        module.graph.lint()
        module.recompile()
    return folded


def _product_of(node: Any) -> fx.Node | None:
    """The product without a bias whose only use `node` is, perhaps in another shape."""
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if node.op == "call_function" and node.target in _BIASES:
            is_free = operand_of(node, _BIASES[node.target], "bias") is None
            return node if is_free and _adds_before_it_rounds(node) else None
        if node.op == "call_function" and node.target is operator.getitem and node.args[1] == 0:
            of = node.args[0]
            if not isinstance(of, fx.Node) or of.target is not _DENSE or len(of.users) != 1:
                return None
            _, weights, biases = of.args
            return of if len(list(weights)) == 1 and not biases else None  # type: ignore[arg-type]
        is_shape = (node.op, node.target) in (
            ("call_function", torch.reshape),
            ("call_method", "reshape"),
            ("call_method", "view"),
        )
        node = node.args[0] if is_shape else None
    return None


def _adds_before_it_rounds(product: fx.Node) -> bool:
    """Whether a product adds its bias in float32; of 2:4 weights the library may round its own sums first."""
    return product.target is not _SPARSE or bool(operand_of(product, 5, "reads_rows"))


def _can_be_bias(
    found: fx.Node, product: Any, residual: Any, total: fx.Node, place: dict[fx.Node, int]
) -> bool:
    value, added, result = example_of(product), example_of(residual), example_of(total)
    x = example_of(found.args[0])
    if not isinstance(residual, fx.Node) or any(each is None for each in (value, added, result, x)):
        return False
    assert value is not None and added is not None and result is not None and x is not None  # noqa: PT018
    is_one_row = isinstance(x.shape[0], int) and x.shape[0] == 1 and value.numel() == value.shape[-1]
    is_like_it = value.shape == added.shape == result.shape and value.dtype == added.dtype == result.dtype
    return is_one_row and is_like_it and residual in place and place[residual] < place.get(found, -1)


def _fold(graph: fx.Graph, found: fx.Node, product: Any, residual: fx.Node, total: fx.Node) -> None:
    with graph.inserting_before(found):
        # Kernels read neighbours; where these are, nothing is copied.
        bias = graph.call_method("contiguous", (graph.call_function(torch.reshape, (residual, (-1,))),))
    if found.target is _DENSE:
        found.args = (*found.args[:2], [bias])
    else:
        place = _BIASES[found.target]  # type: ignore[index]
        found.args = (*found.args[:place], bias, *found.args[place + 1 :])
    total.replace_all_uses_with(product)
    graph.erase_node(total)
