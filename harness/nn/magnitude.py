"""Which weights are the smallest: exact counts, ties broken by place, over one layer or many.

All functions take weights of any shape, float32 or narrower, and return keep masks: bool, True
where the weight stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from harness.errors import ConfigError

__all__ = [
    "count_of",
    "global_keep_masks",
    "keep_largest",
    "keep_largest_of_rows",
    "keep_masks",
    "live_magnitudes",
]

_HIGH_BUCKETS, _LOW_BUCKETS = 1 << 15, 1 << 16  # of the 31 bits below the sign


def count_of(share: float, total: int) -> int:
    """``floor(share * total)``, without losing one where the product is a whole number but for
    rounding.

    >>> count_of(0.29, 100)
    29
    """
    # The product of large numbers is rounded more coarsely: of 1e8 weights by 1e-8, of 1e10 by 1e-6.
    return math.floor(share * total + max(1e-9, 1e-15 * total))


def keep_largest(weights: Sequence[torch.Tensor], pruned: int) -> list[torch.Tensor]:
    """Keep masks that drop exactly the `pruned` smallest magnitudes over all `weights` together.

    Of equal magnitudes the first ones (in the order of the weights, then of their elements) go.
    """
    threshold, ties = _threshold(weights, pruned)
    masks = []
    for weight in weights:
        bits = _magnitude_bits(weight)
        keep = (bits >= threshold).contiguous()  # a transposed weight gives a transposed mask
        if ties:
            tied = (bits == threshold).flatten().nonzero().squeeze(1)[:ties]
            keep.view(-1)[tied] = False
            ties -= len(tied)
        masks.append(keep)
    return masks


def keep_largest_of_rows(weight: torch.Tensor, pruned: int) -> torch.Tensor:
    """The same within every row of a matrix [out, in]: `pruned` weights of each row go."""
    order = weight.detach().abs().sort(dim=1, stable=True).indices
    keep = torch.ones_like(weight, dtype=torch.bool)
    return keep.scatter_(1, order[:, :pruned], False)


def global_keep_masks(
    weights: Sequence[torch.Tensor], sparsity: float, min_density: float
) -> list[torch.Tensor]:
    """One threshold for all layers, but each layer keeps at least `min_density` of its weights.

    A layer that would lose more keeps its largest weights, and what it was spared is taken from the
    others, so that the total is exact. Where the two shares add up to 1, what each layer keeps is rounded
    down to whole weights instead of up: rounded up, the layers would keep a few more than may stay.

    Raises:
        ConfigError: the layers cannot lose that many weights.
    """
    sizes = [weight.numel() for weight in weights]
    total = count_of(sparsity, sum(sizes))
    caps = [size - math.ceil(min_density * size) for size in sizes]
    if total > sum(caps):
        caps = [size - count_of(min_density, size) for size in sizes]
    if total > sum(caps):
        raise ConfigError(
            f"sparsity={sparsity} cannot be reached while every layer keeps "
            f"min_layer_density={min_density} of its weights"
        )
    capped: set[int] = set()
    while True:
        free = [index for index in range(len(weights)) if index not in capped]
        pruned = total - sum(caps[index] for index in capped)
        masks = dict(zip(free, keep_largest([weights[i] for i in free], pruned), strict=True))
        over = [index for index in free if int((~masks[index]).sum()) > caps[index]]
        if not over:
            break
        capped.update(over)
    for index in capped:
        masks[index] = keep_largest([weights[index]], caps[index])[0]
    return [masks[index] for index in range(len(weights))]


def keep_masks(
    weights: Mapping[str, torch.Tensor],
    sparsity: float,
    scope: str = "layer",
    min_layer_density: float = 0.01,
) -> dict[str, torch.Tensor]:
    """Bool masks, True where a weight [out, in] stays: the largest magnitudes, in exact number."""
    if scope == "global":
        masks = global_keep_masks(list(weights.values()), sparsity, min_layer_density)
        return dict(zip(weights, masks, strict=True))
    if scope == "row":
        return {
            name: keep_largest_of_rows(weight, count_of(sparsity, weight.shape[1]))
            for name, weight in weights.items()
        }
    return {
        name: keep_largest([weight], count_of(sparsity, weight.numel()))[0]
        for name, weight in weights.items()
    }


def live_magnitudes(
    weights: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Magnitudes, float32, by which what is pruned comes first again: masks of them are nested.

    A pruned weight is below every other, also below one that is zero by itself.
    """
    smallest = torch.finfo(torch.float32).tiny
    return {
        name: weight.detach().abs().float().clamp(min=smallest) * masks[name]
        for name, weight in weights.items()
    }


def _threshold(weights: Sequence[torch.Tensor], count: int) -> tuple[int, int]:
    """The bits of the magnitude below which everything goes, and how many of that very magnitude
    go.

    Magnitudes of floats sort like their bits, so the `count`-th smallest is found by counting:
    first by the high bits, then by the low bits within one bucket. No sort, no copy of all layers.
    """
    if count == 0:
        return 0, 0
    high = torch.zeros(_HIGH_BUCKETS, dtype=torch.int64)
    for weight in weights:
        buckets = _magnitude_bits(weight).flatten() >> 16
        high += torch.bincount(buckets, minlength=_HIGH_BUCKETS).cpu()
    bucket, before = _bucket_of(high, count)
    low = torch.zeros(_LOW_BUCKETS, dtype=torch.int64)
    for weight in weights:
        bits = _magnitude_bits(weight).flatten()
        inside = bits[bits >> 16 == bucket] & (_LOW_BUCKETS - 1)
        low += torch.bincount(inside, minlength=_LOW_BUCKETS).cpu()
    rest, before_in_bucket = _bucket_of(low, count - before)
    return bucket << 16 | rest, count - before - before_in_bucket


def _bucket_of(counts: torch.Tensor, count: int) -> tuple[int, int]:
    """The bucket that holds the `count`-th element, and how many elements lie before the bucket."""
    cumulative = counts.cumsum(0)
    bucket = int(torch.searchsorted(cumulative, count))
    return bucket, int(cumulative[bucket] - counts[bucket])


def _magnitude_bits(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().abs().float().view(torch.int32)
