"""Paired outcomes of the same items, weighted so that they explain the stored value. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np

from harness.comparability import Difference
from harness.evaluate.correlation import CORRELATIONS, compare_correlations
from harness.evaluate.metrics import metric_of
from harness.evaluate.paired import PairedOutcome, compare_paired
from harness.records import Item

__all__ = ["HASH_DIGITS", "document_names", "outcome_of", "weights_that_explain"]

HASH_DIGITS = 16


def outcome_of(
    items_a: Sequence[Item],
    items_b: Sequence[Item],
    metric: str,
    value_a: float,
    value_b: float,
    *,
    same_data: bool = True,
) -> PairedOutcome | Difference | None:
    """What the items say about a metric.

    Args:
        same_data: both were scored on the same revision of the task's data, so an item is known by its
            place. Otherwise it is known by the hash of its document where both sides have such
            (`doc_hash` in the details), and by its place where neither has.

    Returns:
        A `Difference` where the two were not scored on the same items; None where a metric has no
        items, fewer than two, or such that do not make up the stored values (F1, BLEU, the member of a
        group).
    """
    of_items = "cosine" if metric in CORRELATIONS else metric
    names_a, names_b = ({}, {}) if same_data else (document_names(items_a), document_names(items_b))
    if bool(names_a) != bool(names_b):
        known = (
            "known by their documents" if names else "known by place only" for names in (names_a, names_b)
        )
        return Difference("items", *known)
    of_a = {names_a.get(item.index, item.index): item for item in items_a if item.metric == of_items}
    of_b = {names_b.get(item.index, item.index): item for item in items_b if item.metric == of_items}
    if not of_a or not of_b:
        return None
    if of_a.keys() != of_b.keys():
        common = len(of_a.keys() & of_b.keys())
        return Difference("items", f"{len(of_a)}", f"{len(of_b)} with {common} in common")
    order = sorted(of_a, key=lambda name: of_a[name].index)
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
    return compare_paired(a, b, None if even else weights, answers=_are_answers(metric))


def _are_answers(metric: str) -> bool:
    """Whether an outcome of 0 or 1 is a wrong or a right answer; else it is a number like any other."""
    return metric != "top1_agreement" and metric_of(metric).unit in ("", "fraction")


def document_names(items: Sequence[Item]) -> dict[int, Hashable]:
    """What each item is known by, by its place: the hash of its document, and which of several alike it is.

    Empty where any document has no hash. Of lm-eval's hashes (SHA-256) the first sixteen digits count.
    """
    hashes = {item.index: item.detail["doc_hash"] for item in items if "doc_hash" in item.detail}
    if any(item.index not in hashes for item in items):
        return {}
    seen: Counter[tuple[str, Any]] = Counter()
    names: dict[int, Hashable] = {}
    tasks = {item.index: item.detail.get("task") for item in items if "doc_hash" in item.detail}
    for index in sorted(hashes):
        short = str(hashes[index])[:HASH_DIGITS], tasks[index]
        names[index] = (*short, seen[short])
        seen[short] += 1
    return names


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
