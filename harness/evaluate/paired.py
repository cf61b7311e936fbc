"""Comparing two variants on the same items. Pure functions; no torch, no lm-eval.

`a` is always the baseline, `b` the variant, and items are matched by metric and index: an unpaired test
on such data throws away most of its power.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from statistics import NormalDist, fmean
from typing import NamedTuple

import numpy as np

from harness.errors import ConfigError
from harness.evaluate.intervals import (
    Floats,
    bootstrap_weighted_mean,
    changed_share,
    fallen_to,
    generator,
    percentile_interval,
    wilson,
)
from harness.records import Item, Record

__all__ = [
    "Difference",
    "PairedOutcome",
    "benjamini_hochberg",
    "choice_kl",
    "compare_paired",
    "detectable_mean_difference",
    "discordant",
    "flips",
    "match_items",
    "mcnemar",
    "minimum_detectable_effect",
    "paired_bootstrap_difference",
    "sign_flip_test",
    "wilson",
]

SIGN_FLIPS = 20_000
_EXACT_PAIRS = 12  # up to here all sign patterns are counted: 4,096
_FEW_FLIPS = 10  # below this a bootstrap of right and wrong answers covers too rarely
_NORMAL_PAIRS = 1_000  # from here on the distribution of the sum is normal
_ELEMENTS_AT_ONCE = 2_000_000


class Difference(NamedTuple):
    """A mean difference `b - a` with its 95 % interval."""

    value: float
    lower: float
    upper: float


class PairedOutcome(NamedTuple):
    """All that the same items say about two variants.

    `p` is the raw two-sided p-value of `test`; `detectable` the smallest true difference that this many
    items would show four times in five; `flips` the share of items that changed sides, None where an
    outcome is not right or wrong.
    """

    n: int
    difference: Difference
    p: float
    test: str
    detectable: float
    flips: float | None


def match_items(items_a: Sequence[Item], items_b: Sequence[Item], metric: str) -> list[tuple[Item, Item]]:
    """The items of `metric` in pairs, by index.

    Raises:
        ConfigError: there are none, or the two sides do not hold the same items (another limit,
            another revision of the task): then nothing may be compared.
    """
    of_a = {item.index: item for item in items_a if item.metric == metric}
    of_b = {item.index: item for item in items_b if item.metric == metric}
    if not of_a or not of_b:
        raise ConfigError(f"there are no items of {metric!r} to compare")
    if of_a.keys() != of_b.keys():
        raise ConfigError(
            f"the items of {metric!r} differ ({len(of_a)} and {len(of_b)}, "
            f"{len(of_a.keys() & of_b.keys())} in common): the two were not scored on the same data"
        )
    return [(of_a[index], of_b[index]) for index in sorted(of_a)]


def discordant(items_a: Sequence[Item], items_b: Sequence[Item], metric: str) -> tuple[int, int]:
    """How many items only `a` has right, and how many only `b`; an outcome of 0.5 or more is right."""
    pairs = [(a.outcome >= 0.5, b.outcome >= 0.5) for a, b in match_items(items_a, items_b, metric)]
    return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)


def flips(items_a: Sequence[Item], items_b: Sequence[Item], metric: str) -> Record:
    """The share of items whose correctness changed, either way (Dutta et al. 2024, arXiv:2407.09141).

    Two models of equal accuracy may disagree on many items; this counts them.
    """
    changed = sum(discordant(items_a, items_b, metric))
    n = len(match_items(items_a, items_b, metric))
    lower, upper = wilson(changed, n)
    return Record(f"{metric}_flips", changed / n, "fraction", lower, upper, n)


def mcnemar(b: int, c: int) -> float:
    """The exact two-sided McNemar test: the p-value of `b` against `c` discordant items.

    Under the null hypothesis each discordant item falls to either side with probability 1/2, so this
    is the binomial test. 1.0 where nothing is discordant.
    """
    n, smaller = b + c, min(b, c)
    term = total = 1
    for k in range(1, smaller + 1):
        term = term * (n - k + 1) // k
        total += term
    return min(1.0, float(Fraction(2 * total, 2**n)))


def paired_bootstrap_difference(
    a: Sequence[float], b: Sequence[float], seed: int, weights: Sequence[float] | None = None
) -> Difference:
    """The mean of `b - a` over the same items, with the 95 % percentile bootstrap interval.

    Args:
        weights: what an item counts (tokens of a window, bytes of a document); by default 1.
    """
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"paired values must be of one length, not {len(a)} and {len(b)}")
    difference = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    draws = bootstrap_weighted_mean(difference, generator(seed, "difference"), weights)
    return Difference(float(np.average(difference, weights=weights)), *percentile_interval(draws))


def compare_paired(
    a: Sequence[float],
    b: Sequence[float],
    weights: Sequence[float] | None = None,
    seed: int = 0,
    *,
    answers: bool = True,
) -> PairedOutcome:
    """Compare outcomes of the same items: right or wrong by McNemar's test, others by sign flips.

    The interval of the difference is the paired bootstrap's; where fewer than ten items went from right to
    wrong or back, the score interval (`changed_share`): with no such item every resample says 0, which is
    not to know that the difference is 0.

    Args:
        weights: what an item counts (tokens of a window, one over the size of its subtask). Weighted
            shares are tested by sign flips: McNemar's test counts items.
        answers: whether outcomes of 0 and 1 are wrong and right answers, and no numbers (losses, divergences)
            that happen to be 0 or 1.

    Raises:
        ValueError: the two are not of one length, or empty.
    """
    difference = paired_bootstrap_difference(a, b, seed, weights)
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    n = len(first)
    is_binary = answers and bool(np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all())
    lost, won = int((first > second).sum()), int((first < second).sum())
    flips_share = (lost + won) / n if is_binary else None
    of_few = None
    if is_binary and lost + won < _FEW_FLIPS:
        few = _counted(first, second, weights)
        difference = Difference(difference.value, *changed_share(*few))
        of_few = minimum_detectable_effect(few[2], (few[0] + few[1]) / few[2])
    if is_binary and (weights is None or len(set(weights)) == 1):
        detectable = minimum_detectable_effect(n, (lost + won) / n)
        return PairedOutcome(n, difference, mcnemar(lost, won), "McNemar", detectable, flips_share)
    changes = second - first
    p = sign_flip_test(changes, weights, seed)
    detectable = detectable_mean_difference(changes, weights) if of_few is None else of_few
    return PairedOutcome(n, difference, p, "sign flips", detectable, flips_share)


def _counted(a: Floats, b: Floats, weights: Sequence[float] | None) -> tuple[float, float, float]:
    """Items that only `a` has right, only `b`, and all: of weighted ones, as many as they amount to."""
    weight = np.ones_like(a) if weights is None else np.asarray(weights, dtype=np.float64)
    n = float(weight.sum() ** 2 / (weight**2).sum())
    lost, won = (float(np.average(side, weights=weight)) * n for side in (a > b, a < b))
    return lost, won, n


def sign_flip_test(
    differences: Sequence[float] | Floats, weights: Sequence[float] | None = None, seed: int = 0
) -> float:
    """Two-sided p-value of the weighted mean of paired differences, by flipping their signs (Fisher 1935).

    Where neither side is better, swapping the two outcomes of an item changes nothing, so every pattern
    of signs is equally likely. All patterns are counted for up to 12 differing pairs; 20,000 are drawn
    for up to 1,000 (p is then never below 1/20,001); beyond that the sum is normal.
    """
    values = np.asarray(differences, dtype=np.float64)
    terms = values if weights is None else values * np.asarray(weights, dtype=np.float64)
    terms = terms[terms != 0]
    if terms.size == 0:
        return 1.0
    observed = abs(float(terms.sum())) * (1 - 1e-12)  # a pattern as extreme counts, whatever the rounding
    if terms.size > _NORMAL_PAIRS:
        return math.erfc(abs(float(terms.sum())) / math.sqrt(2 * float((terms**2).sum())))
    if terms.size <= _EXACT_PAIRS:
        patterns = np.arange(2**terms.size)[:, None] >> np.arange(terms.size) & 1
        return float(np.mean(np.abs((2 * patterns - 1) @ terms) >= observed))
    rng, extreme = generator(seed, "sign flips"), 0
    step = max(1, _ELEMENTS_AT_ONCE // terms.size)
    for first in range(0, SIGN_FLIPS, step):
        signs = rng.integers(0, 2, size=(min(step, SIGN_FLIPS - first), terms.size), dtype=np.int8)
        extreme += int((np.abs((2.0 * signs - 1) @ terms) >= observed).sum())
    return (extreme + 1) / (SIGN_FLIPS + 1)


def detectable_mean_difference(
    differences: Sequence[float] | Floats,
    weights: Sequence[float] | None = None,
    alpha: float = 0.05,
    power: float = 0.8,
) -> float:
    """The smallest true mean difference that pairs which spread like these would show with this power.

    ``(z_alpha + z_beta)`` standard errors of the weighted mean. Infinite for a single pair, and for pairs
    that all differ by the same, which say nothing of the spread.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.size < 2:
        return math.inf
    weight = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    residuals = values - np.average(values, weights=weight)
    correction = values.size / (values.size - 1)
    error = math.sqrt(correction * float((weight**2 * residuals**2).sum())) / float(weight.sum())
    if error == 0:
        return math.inf
    normal = NormalDist()
    return (normal.inv_cdf(1 - alpha / 2) + normal.inv_cdf(power)) * error


def minimum_detectable_effect(n: float, discordance: float, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest difference in accuracy that McNemar's test on `n` pairs finds with this power.

    Solves the sample-size formula of Connor (1987, Biometrics 43),
    ``n d^2 = (z_alpha sqrt(q) + z_beta sqrt(q - d^2))^2``, for the difference `d`, where `q` is the
    share of discordant pairs. Where so few flips would be missed even if all went to one side, it is the
    difference that brings enough flips with it, all to one side (binomial). Infinite for so few pairs that
    no outcome is significant: fewer than six at 5 %.

    Args:
        discordance: the share of discordant pairs; below one pair it is taken as one pair, because
            none in `n` is no proof of none.
    """
    # Flips to one side whose exact p, 2^(1 - k), is below alpha.
    enough = math.floor(1 - math.log2(alpha)) + 1
    if n < enough:
        return math.inf
    q = max(discordance, 1 / n)
    z_alpha = NormalDist().inv_cdf(1 - alpha / 2)
    z_beta = NormalDist().inv_cdf(power)
    # A quadratic in d once the root of q - d^2 is isolated and squared.
    inner = n - z_alpha**2 + z_beta**2
    d = math.sqrt(q) * (math.sqrt(n) * z_alpha + z_beta * math.sqrt(inner)) / (n + z_beta**2)
    if d <= q:
        return d
    return _share_of_enough(int(n), enough, power)


def _share_of_enough(n: int, enough: int, power: float) -> float:
    """The share at which `n` items hold `enough` with this probability."""

    def fewer(share: float) -> float:
        return sum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(enough))

    return fallen_to(1 - power, fewer, 0.0, 1.0)


def benjamini_hochberg(pvalues: Sequence[float]) -> list[float]:
    """P-values adjusted for the false discovery rate (Benjamini and Hochberg 1995), in their order."""
    count = len(pvalues)
    adjusted = [1.0] * count
    smallest = 1.0
    by_size = sorted(range(count), key=lambda index: pvalues[index])
    for rank in range(count, 0, -1):
        index = by_size[rank - 1]
        smallest = min(smallest, pvalues[index] * count / rank)
        adjusted[index] = smallest
    return adjusted


def choice_kl(items_a: Sequence[Item], items_b: Sequence[Item], metric: str = "acc", seed: int = 0) -> Record:
    """Mean KL(a || b) in nats per item between the two distributions over the choices.

    A distribution is the softmax of the log-likelihoods of an item's choices, as they are kept in the
    items' detail.

    Raises:
        ConfigError: the items do not match, or carry no log-likelihoods of choices.
    """
    values = []
    for a, b in match_items(items_a, items_b, metric):
        p, q = (item.detail.get("loglikelihoods") for item in (a, b))
        if not p or not q or len(p) != len(q):
            raise ConfigError(f"the items of {metric!r} carry no log-likelihoods of choices")
        values.append(_kl(_log_softmax(p), _log_softmax(q)))
    lower = upper = None
    if len(values) > 1:
        draws = bootstrap_weighted_mean(values, generator(seed, "choice_kl"))
        lower, upper = percentile_interval(draws)
    return Record("choice_kl", fmean(values), "nats/item", lower, upper, len(values))


def _log_softmax(logits: Sequence[float]) -> list[float]:
    highest = max(logits)
    log_sum = highest + math.log(math.fsum(math.exp(value - highest) for value in logits))
    return [value - log_sum for value in logits]


def _kl(log_p: Sequence[float], log_q: Sequence[float]) -> float:
    terms = (math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True) if p > -math.inf)
    return max(0.0, math.fsum(terms))  # rounding may leave a tiny negative sum
