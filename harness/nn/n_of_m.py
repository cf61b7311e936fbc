"""N:M sparsity: of every M consecutive inputs the N with the largest scores stay."""

from __future__ import annotations

import torch

from harness.errors import ConfigError

__all__ = ["keep_n_of_m"]


def keep_n_of_m(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Bool mask [out, in], True for the `n` largest of every `m` consecutive scores of a row.

    Of equal scores the first ones go, as everywhere in this family.

    Args:
        scores: [out, in], finite.

    Raises:
        ConfigError: not 1 <= n <= m, or `m` does not divide the number of columns.
    """
    rows, columns = scores.shape
    if not 1 <= n <= m:
        raise ConfigError(f"of {m} consecutive weights between 1 and {m} can stay, not {n}")
    if columns < m:
        raise ConfigError(f"a layer of {columns} input columns is narrower than one group of {m}")
    if columns % m:
        raise ConfigError(f"groups of {m} do not divide the {columns} input columns of the layer")
    order = scores.detach().reshape(rows, columns // m, m).sort(dim=-1, stable=True).indices
    keep = torch.ones(order.shape, dtype=torch.bool, device=scores.device)
    return keep.scatter_(-1, order[..., : m - n], False).view(rows, columns)
