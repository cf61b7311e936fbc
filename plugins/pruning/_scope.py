"""Sparsity over all layers together, of which each keeps some: what cannot be had is refused at once."""

from __future__ import annotations

__all__ = ["require_reachable"]

_WHOLE = 1 + 1e-9  # 0.9 + 0.1 may be a little more than 1


def require_reachable(sparsity: float, scope: str, min_layer_density: float) -> None:
    """For options: a method that trains first would find out after its training.

    Raises:
        ValueError: with ``scope=global``, layers that keep `min_layer_density` keep too much.
    """
    if scope == "global" and sparsity + min_layer_density > _WHOLE:
        raise ValueError(
            f"sparsity={sparsity:g} cannot be reached while every layer keeps "
            f"min_layer_density={min_layer_density:g} of its weights"
        )
