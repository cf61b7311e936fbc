"""Between lm-eval's numbers and ours: names of metrics, intervals, outcomes of items. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from harness.evaluate.intervals import bootstrap_weighted_mean, generator, percentile_interval, wilson
from harness.evaluate.metrics import metric_of, record_name
from harness.store.lm_eval_layout import Sample

__all__ = ["UNSCORED", "record_values", "sample_outcomes", "split_record", "standard_error"]

UNSCORED = "unscored"
"""The metric of an item that keeps a sample without any score."""

_STDERR = "_stderr"
_SEED = 0


def record_values(
    metrics: Mapping[str, Any], samples: Sequence[Sample], n: int | None
) -> Iterator[dict[str, Any]]:
    """A record of each ``metric,filter`` that is a number, with the interval that can be given.

    A standard error is no interval. Where the samples are there and their mean is the value, the interval is
    computed from them (Wilson's for right and wrong, else a bootstrap); without them it is the value ± 1.96
    standard errors. The note says which.
    """
    for key, value in metrics.items():
        metric, _, filter_name = key.partition(",")
        if metric.endswith(_STDERR) or not _is_number(value):
            continue
        filter_name = filter_name or "none"
        name = record_name(metric, filter_name)
        error = metrics.get(f"{metric}{_STDERR},{filter_name}", metrics.get(f"{metric}{_STDERR}"))
        scores = [
            each.value(metric) for each in samples if each.filter == filter_name and metric in each.metrics
        ]
        lower, upper, note = _interval(name, float(value), error, scores)
        yield {
            "metric": name, "value": float(value), "unit": metric_of(name).unit, "lower": lower,
            "upper": upper, "n": len(scores) or n or 0, "note": note,
        }  # fmt: skip


def _interval(
    name: str, value: float, error: Any, scores: Sequence[Any]
) -> tuple[float | None, float | None, str | None]:
    if len(scores) > 1 and all(map(_is_number, scores)):
        numbers = [float(score) for score in scores]
        if math.isclose(fmean(numbers), value, rel_tol=1e-6, abs_tol=1e-9):
            note = f"interval computed from {len(numbers)} samples"
            if set(numbers) <= {0.0, 1.0}:
                return *wilson(round(sum(numbers)), len(numbers)), note
            return *percentile_interval(bootstrap_weighted_mean(numbers, generator(_SEED, name))), note
    if _is_number(error) and math.isfinite(error) and error >= 0 and math.isfinite(value):
        return value - 1.96 * error, value + 1.96 * error, "interval: value ± 1.96 × lm-eval's standard error"
    return None, None, None


def sample_outcomes(sample: Sample) -> Iterator[tuple[str, float]]:
    """The metrics of a sample that are one number a document, named as the harness stores items."""
    found = False
    for metric in dict.fromkeys(sample.metrics):
        outcome = _outcome(metric, sample.value(metric))
        if outcome is None:
            continue
        found = True
        yield record_name("target_nll" if metric == "perplexity" else metric, sample.filter), outcome
    if not found:
        yield record_name(UNSCORED, sample.filter), math.nan


def _outcome(metric: str, value: Any) -> float | None:
    if _is_number(value):
        return -float(value) if metric == "perplexity" else float(value)
    is_pair = isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))
    if is_pair and metric in ("word_perplexity", "byte_perplexity", "bits_per_byte") and value[1]:
        loss = -float(value[0]) / float(value[1])
        try:
            return loss / math.log(2) if metric == "bits_per_byte" else math.exp(loss)
        except OverflowError:
            return math.inf
    return None


def split_record(name: str) -> tuple[str, str, str]:
    """lm-eval's metric, filter and subtask of a stored metric.

    >>> split_record("exact_match,strict-match"), split_record("acc/mmlu_anatomy")
    (('exact_match', 'strict-match', ''), ('acc', 'none', 'mmlu_anatomy'))
    """
    whole, _, subtask = name.partition("/")
    metric, _, filter_name = whole.partition(",")
    return "perplexity" if metric == "target_perplexity" else metric, filter_name or "none", subtask


def standard_error(value: float, outcomes: Sequence[float]) -> float | None:
    """lm-eval's standard error of a mean; None where the value is not the mean of the outcomes."""
    if len(outcomes) < 2 or not math.isclose(fmean(outcomes), value, rel_tol=1e-6, abs_tol=1e-9):
        return None
    return stdev(outcomes) / math.sqrt(len(outcomes))


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**1000)
