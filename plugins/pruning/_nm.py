"""Which weights stay where N of every M in a row may."""

from __future__ import annotations

import torch

from harness import ConfigError

__all__ = ["keep_n_of_m"]


def keep_n_of_m(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """The keep mask, bool [out, in], of the `n` largest scores in every run of `m` along the inputs.

    Of equal scores the first ones go, so every run keeps exactly `n`.

    Args:
        scores: [out, in], of any floating type; larger is more worth keeping.

    Raises:
        ConfigError: not ``1 <= n <= m``, or `m` does not divide the width.
    """
    if not 1 <= n <= m:
        raise ConfigError(f"n:m must keep from 1 to {m} of {m} weights, not {n}")
    rows, width = scores.shape
    if width == 0 or width % m:
        raise ConfigError(f"{n}:{m} needs a width that {m} divides, not {width}")
    order = scores.detach().view(rows, width // m, m).sort(dim=-1, stable=True).indices
    keep = torch.ones_like(order, dtype=torch.bool)
    return keep.scatter_(-1, order[..., : m - n], False).view(rows, width)
