"""The largest eigenvalue of a Hessian that is never formed: power iteration with Hessian-vector products.

A product needs the gradient's own gradient, which fused attention does not have: calls run under
`twice_differentiable`, where attention is plain matrix products.

Source: Shen, Dong, Ye et al. 2020, "Q-BERT" (arXiv:1909.05840), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.errors import NumericalFailure

__all__ = ["TopEigenvalue", "hessian_product", "top_eigenvalue", "twice_differentiable"]

Vector = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class TopEigenvalue:
    """The eigenvalue of largest magnitude, whatever its sign; `converged` if it moved by less than asked."""

    value: float
    iterations: int
    converged: bool


def twice_differentiable() -> AbstractContextManager[None]:
    """Inside, `scaled_dot_product_attention` is computed in a form that has second derivatives."""
    manager: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return manager


def hessian_product(
    loss: torch.Tensor, parameters: Sequence[torch.Tensor]
) -> tuple[Vector, Callable[[Vector], Vector]]:
    """The gradient of a loss, and ``v -> H v`` for its Hessian H in these parameters.

    Every product goes through the same graph, which lives as long as the function that is returned.
    """
    gradient = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    curved = [each for each in gradient if each.requires_grad]

    def product(vector: Vector) -> Vector:
        if not curved:  # a loss that is linear in all of them
            return tuple(torch.zeros_like(each) for each in parameters)
        directions = [v for v, each in zip(vector, gradient, strict=True) if each.requires_grad]
        return torch.autograd.grad(curved, parameters, directions, retain_graph=True, materialize_grads=True)

    return tuple(each.detach() for each in gradient), product


def top_eigenvalue(
    product: Callable[[Vector], Vector],
    like: Sequence[torch.Tensor],
    generator: torch.Generator,
    *,
    iterations: int,
    tolerance: float,
) -> TopEigenvalue:
    """Power iteration from a random direction.

    Args:
        product: the symmetric operator, on one tensor for each of `like`.
        generator: of the CPU; draws the start.
        tolerance: stops where the estimate moves by less than this share of itself.

    Raises:
        NumericalFailure: a product is NaN or infinite.
    """
    drawn = [torch.randn(each.shape, generator=generator).to(each) for each in like]
    vector = _divided(drawn, _norm(drawn))
    value = 0.0
    for done in range(1, iterations + 1):
        image = product(vector)
        before, value = value, float(sum((v * w).sum() for v, w in zip(vector, image, strict=True)))
        norm = _norm(image)
        if not torch.isfinite(norm):
            raise NumericalFailure("a Hessian-vector product is NaN or infinite")
        if norm == 0:
            return TopEigenvalue(0.0, done, True)
        if done > 1 and abs(value - before) <= tolerance * abs(value):
            return TopEigenvalue(value, done, True)
        vector = _divided(image, norm)
    return TopEigenvalue(value, iterations, False)


def _norm(vector: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([each.float().square().sum() for each in vector]).sum().sqrt()


def _divided(vector: Sequence[torch.Tensor], by: torch.Tensor) -> Vector:
    return tuple(each / by for each in vector)
