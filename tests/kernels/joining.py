"""Modules whose products are joined when they are traced, and how many of them each call has then."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx, nn


class Beside(nn.Module):
    """Layers that read the same x."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1)


def products_of_calls(
    module: nn.Module,
    x: torch.Tensor,
    rewrite: Callable[[fx.GraphModule], int],
    joined: Sequence[Callable],
    weights_at: int,
    alone: Sequence[Callable],
) -> list[int]:
    """How many products each call of the traced and rewritten module has; its result must not change.

    Args:
        joined: operators of several products. weights_at: the place of their weights.
        alone: operators of one product.
    """
    found: list[int] = []

    def backend(graph, _inputs):
        rewrite(graph)
        for node in graph.graph.nodes:
            if node.target in joined:
                found.append(len(node.args[weights_at]))
            elif node.target in alone:
                found.append(1)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        y = torch.compile(module, backend=backend, dynamic=False)(x)
        assert torch.equal(y, module(x))
    return found
