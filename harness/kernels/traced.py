"""Reading the graph that torch.compile hands to its backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

__all__ = ["example_of", "is_input", "operand_of", "source_of"]


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
