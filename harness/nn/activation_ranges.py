"""Ranges of activation tensors, found by running calibration tokens through the model as it is."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from harness.errors import ConfigError
from harness.nn.activation_sites import Site, observe_sites

__all__ = ["ActivationRange", "RangeMethod", "least_squares_range", "observe_ranges"]

RangeMethod = Literal["running", "minmax", "mse"]

_BINS = 4096
_RATIOS = 100


@dataclass
class ActivationRange:
    """From `low` to `high`, float32: 0-d of a tensor, or [d] of every dimension of it.

    `elements` counts what was seen.
    """

    low: torch.Tensor
    high: torch.Tensor
    elements: int = 0

    @property
    def width(self) -> torch.Tensor:
        return self.high - self.low

    @property
    def whole(self) -> ActivationRange:
        """The range of the tensor as a whole."""
        return ActivationRange(self.low.amin(), self.high.amax(), self.elements)


def observe_ranges(
    model: nn.Module,
    sites: Iterable[Site],
    batches: Sequence[torch.Tensor],
    *,
    method: RangeMethod = "running",
    momentum: float = 0.9,
    per_dimension: Collection[Site] = (),
    bits: int = 8,
) -> dict[Site, ActivationRange]:
    """The range of each site over token ids [batch, tokens].

    ``minmax`` covers all that was seen. ``running`` starts with the first batch and then keeps `momentum`
    of the range so far for each batch, so that a single extreme does not set it. ``mse`` shrinks minmax
    to the range that rounds to `bits` with the least squared error; only for ranges of whole tensors.

    Raises:
        ConfigError: no calibration tokens, or ``mse`` per dimension.
    """
    if not batches:
        raise ConfigError("static ranges of activations need calibration tokens")
    if method == "mse" and per_dimension:
        raise ConfigError("range=mse is for one range per tensor")
    sites = list(sites)
    found: dict[Site, ActivationRange] = {}
    keep = momentum if method == "running" else None

    def see(site: Site, x: torch.Tensor) -> None:
        low, high = x.reshape(-1, x.shape[-1]).aminmax(dim=0) if site in per_dimension else x.aminmax()
        low, high = low.float(), high.float()
        before = found.setdefault(site, ActivationRange(low, high))
        before.elements += x.numel()
        if keep is None:
            before.low, before.high = torch.minimum(before.low, low), torch.maximum(before.high, high)
        else:
            before.low = keep * before.low + (1 - keep) * low
            before.high = keep * before.high + (1 - keep) * high

    observe_sites(model, sites, batches, see)
    unseen = [site.name for site in sites if site not in found]
    if unseen:
        raise ConfigError(f"no calibration tokens reached {', '.join(unseen[:3])}")
    return _shrunk(model, found, batches, bits) if method == "mse" else found


def _shrunk(
    model: nn.Module, found: dict[Site, ActivationRange], batches: Sequence[torch.Tensor], bits: int
) -> dict[Site, ActivationRange]:
    counts = {site: torch.zeros(_BINS, dtype=torch.float64) for site in found}

    def see(site: Site, x: torch.Tensor) -> None:
        low, high = float(found[site].low), float(found[site].high)
        counts[site] += torch.histc(x.float(), bins=_BINS, min=low, max=high).double().cpu()

    observe_sites(model, found, batches, see)
    for site, before in found.items():
        low, high = least_squares_range(counts[site], float(before.low), float(before.high), bits)
        device = before.low.device
        before.low, before.high = torch.tensor(low, device=device), torch.tensor(high, device=device)
    return found


def least_squares_range(counts: torch.Tensor, low: float, high: float, bits: int) -> tuple[float, float]:
    """The best of 100 fractions of [low, high], from the histogram of the values over it.

    By the squared error of an asymmetric grid of so many bits, rounding and clipping together.
    """
    if high <= low:
        return low, high
    edges = torch.linspace(low, high, counts.numel() + 1, dtype=torch.float64)
    centres = (edges[:-1] + edges[1:]) / 2
    best, least = 1.0, float("inf")
    for step in range(_RATIOS, 0, -1):
        ratio = step / _RATIOS
        bottom, top = min(low * ratio, 0.0), max(high * ratio, 0.0)
        scale = (top - bottom) / (2**bits - 1)
        zero = round(-bottom / scale)
        rounded = ((centres / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero) * scale
        error = float((counts * (centres - rounded).square()).sum())
        if error < least:
            best, least = ratio, error
    return low * best, high * best
