"""Paired outcomes of the same items, weighted so that they explain the stored value. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from harness.comparability import Difference
from harness.evaluate.correlation import CORRELATIONS, compare_correlations
from harness.evaluate.paired import PairedOutcome, compare_paired
from harness.records import Item

__all__ = ["outcome_of", "weights_that_explain"]


def outcome_of(
    items_a: Sequence[Item], items_b: Sequence[Item], metric: str, value_a: float, value_b: float
) -> PairedOutcome | Difference | None:
    """What the items say about a metric.

    Returns:
        A `Difference` where the two were not scored on the same items; None where a metric has no
        items, fewer than two, or such that do not make up the stored values (F1, BLEU, the member of a
        group).
    """
    of_items = "cosine" if metric in CORRELATIONS else metric
    of_a = {item.index: item for item in items_a if item.metric == of_items}
    of_b = {item.index: item for item in items_b if item.metric == of_items}
    if not of_a or not of_b:
        return None
    if of_a.keys() != of_b.keys():
        common = len(of_a.keys() & of_b.keys())
        return Difference("items", f"{len(of_a)}", f"{len(of_b)} with {common} in common")
    order = sorted(of_a)
    if metric in CORRELATIONS:
        a, b = ([items[index].outcome for index in order] for items in (of_a, of_b))
        scores = [float(of_b[index].detail["target"]) for index in order]
        return compare_correlations(metric, a, b, scores)
    first, second = [of_a[index] for index in order], [of_b[index] for index in order]
    weights = weights_that_explain(first, second, value_a, value_b)
    if weights is None or len(order) < 2:
        return None
    a, b = [item.outcome for item in first], [item.outcome for item in second]
    even = len(set(weights)) == 1
    return compare_paired(a, b, None if even else weights)


def weights_that_explain(
    a: Sequence[Item], b: Sequence[Item], value_a: float, value_b: float
) -> list[float] | None:
    """What each item counts, so that the weighted means are the stored values; None where nothing fits.

    An item may count for itself, for its tokens, or so that each member of a group counts the same.
    """
    for weights in _weightings(b):
        means = [float(np.average([item.outcome for item in side], weights=weights)) for side in (a, b)]
        if all(
            math.isclose(mean, value, rel_tol=1e-6, abs_tol=1e-9)
            for mean, value in zip(means, (value_a, value_b), strict=True)
        ):
            return weights
    return None


def _weightings(items: Sequence[Item]) -> Iterator[list[float]]:
    tokens = [float(item.detail.get("tokens", 1)) for item in items]
    yield tokens
    if len(set(tokens)) > 1:
        yield [1.0] * len(items)
    sizes = Counter(item.detail.get("task") for item in items)
    if len(sizes) > 1:
        yield [1.0 / sizes[item.detail.get("task")] for item in items]
