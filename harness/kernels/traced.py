"""Reading the graph that torch.compile hands to its backend, and joining calls in it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

__all__ = ["example_of", "is_input", "join", "operand_of", "several", "source_of"]


def example_of(node: Any) -> torch.Tensor | None:
    """The tensor that stands for a node's value while it is traced; None for anything else."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def operand_of(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """What a call is given for a parameter, by place or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def is_input(node: Any) -> bool:
    """Whether a node is an input of the graph, which exists before anything is computed."""
    return isinstance(node, fx.Node) and node.op in ("placeholder", "get_attr")


def source_of(node: Any) -> tuple[Any, ...]:
    """The tensor behind a reshaped one, with the shape it has got: layers flatten the same x each for
    itself."""
    value = example_of(node)
    while isinstance(node, fx.Node) and node.op == "call_method" and node.target in ("reshape", "view"):
        node = node.args[0]
    return node, None if value is None else tuple(value.shape)


def several(groups: Iterable[Sequence[fx.Node]], most: int) -> Iterator[Sequence[fx.Node]]:
    """Groups of calls in parts of at most `most`; what is left of one alone is no part."""
    for calls in list(groups):  # read before anything is joined
        for start in range(0, len(calls), most):
            if len(some := calls[start : start + most]) > 1:
                yield some


def join(
    graph: fx.Graph, calls: Sequence[fx.Node], target: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """Put one call, which has a list of their results, where the first of several calls is."""
    with graph.inserting_before(calls[0]):
        products = graph.call_function(target, arguments)
        for position, call in enumerate(calls):
            product = graph.call_function(operator.getitem, (products, position))
            product.meta["example_value"] = call.meta["example_value"]
            call.replace_all_uses_with(product)
    for call in calls:
        graph.erase_node(call)
