"""From lm-eval's results to records with intervals and to items."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lm_eval.utils import handle_non_serializable

from harness.errors import ConfigError, NumericalFailure
from harness.evaluate.intervals import (
    RESAMPLES,
    bootstrap_ratio,
    bootstrap_statistic,
    bootstrap_weighted_mean,
    generator,
    percentile_interval,
    wilson,
)
from harness.evaluate.lm_tasks import LoadedTask
from harness.evaluate.metrics import metric_of, record_name
from harness.records import Item, Record

__all__ = ["items_of", "records_of"]

CORPUS_RESAMPLES = 100  # of statistics that are slow to compute (BLEU), as many as lm-eval takes
_HASH_DIGITS = 16
_TEXT_KEPT = 300  # characters of a response in an item's detail


@dataclass(frozen=True)
class _Scores:
    """All per-item values of one metric of one task, and lm-eval's way to one number."""

    task: str
    metric: str
    filter_name: str
    indices: tuple[int, ...]
    values: tuple[Any, ...]
    aggregate: Callable[[Sequence[Any]], float]

    @property
    def aggregation(self) -> str:
        return getattr(self.aggregate, "__name__", "")

    def value(self) -> float:
        try:
            value = float(self.aggregate(list(self.values)))
        except OverflowError:
            value = math.inf
        except ZeroDivisionError:  # nothing but empty documents
            value = math.nan
        if not math.isfinite(value) and self.aggregation != "nanmean":
            raise NumericalFailure(f"{self.metric} of {self.task} is {value}")
        return value

    def draws(self, seed: int, subtask: str = "") -> np.ndarray[Any, Any]:
        """Bootstrap draws of the value over the items."""
        name = f"{subtask}/{self.metric},{self.filter_name}"
        rng = generator(seed, name)
        if self.aggregation in ("mean", "perplexity") and _are_numbers(self.values):
            means = bootstrap_weighted_mean([float(value) for value in self.values], rng)
            return means if self.aggregation == "mean" else _exp(-means)
        if self.aggregation in ("weighted_perplexity", "bits_per_byte"):
            scores, weights = ([float(value[place]) for value in self.values] for place in (0, 1))
            means = bootstrap_ratio(scores, weights, rng)
            return _exp(-means) if self.aggregation == "weighted_perplexity" else -means / math.log(2)
        return bootstrap_statistic(self.values, self.aggregate, rng, CORPUS_RESAMPLES)

    def interval(self, seed: int) -> tuple[float, float] | tuple[None, None]:
        if len(self.values) < 2:
            return None, None
        if self.aggregation == "mean" and _are_binary(self.values):
            return wilson(round(sum(self.values)), len(self.values))
        with np.errstate(invalid="ignore"):  # between a number and infinity lies nothing
            lower, upper = percentile_interval(self.draws(seed))
        # One document may hold nearly all the loss: without it, or with it twice, there is no such number.
        return (lower, upper) if math.isfinite(lower) and math.isfinite(upper) else (None, None)

    @property
    def item_metric(self) -> str:
        """What `outcomes` are called."""
        name = "target_nll" if self.aggregation == "perplexity" else self.metric
        return record_name(name, self.filter_name)

    def outcomes(self) -> list[float | None] | None:
        """One number per item, or None where the metric exists of the whole only (F1, BLEU).

        For running text it is the metric of the one document: None for an empty one, infinite where a
        perplexity is beyond all numbers. For a perplexity of targets, whose value for one item may be
        astronomical, it is the target's loss in nats (`item_metric`).
        """
        if self.aggregation == "perplexity":
            return [-float(value) for value in self.values]
        if _are_numbers(self.values):
            return [float(value) for value in self.values]
        if self.aggregation in ("weighted_perplexity", "bits_per_byte", "brier_score"):
            return [self._alone(value) for value in self.values]
        return None

    def _alone(self, value: Any) -> float | None:
        try:
            return float(self.aggregate([value]))
        except OverflowError:
            return math.inf
        except ZeroDivisionError:
            return None


def records_of(
    loaded: LoadedTask, samples: Mapping[str, Sequence[Mapping[str, Any]]], seed: int, note: str | None
) -> list[Record]:
    """One record for each metric and filter; of a group its aggregates, then those of its members.

    Raises:
        NumericalFailure: a metric is not finite.
    """
    scores = {name: _scores_of(loaded, name, samples[name]) for name in loaded.tasks}
    if not loaded.is_group:
        return [_record(one, seed, note) for one in scores[next(iter(loaded.tasks))]]
    records = []
    for group in loaded.groups.values():
        records += _group_records(group, scores, seed, note, "" if group.name == loaded.name else group.name)
    for name, of_task in scores.items():
        records += [_record(one, seed, note, subtask=name) for one in of_task]
    return records


def items_of(loaded: LoadedTask, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Item]:
    """The outcome of every document for every metric that has one per document.

    What explains an outcome (log-likelihoods, the response, the group) is kept with the first metric
    of a document, once. Documents of a group's members are numbered through.

    Raises:
        ConfigError: the documents lack the field that a task names as its `item_group`.
    """
    items: list[Item] = []
    start = 0
    for name in loaded.tasks:
        details = _details_of(loaded, name, samples[name])
        last = start
        for one in _scores_of(loaded, name, samples[name]):
            outcomes = one.outcomes()
            if outcomes is None:
                continue
            metric = one.item_metric
            for index, outcome in zip(one.indices, outcomes, strict=True):
                if outcome is None:
                    continue
                detail = details.pop((index, one.filter_name), {})
                if loaded.is_group:
                    detail = {"task": name, **detail}
                items.append(Item(start + index, metric, outcome, detail))
                last = max(last, start + index + 1)
        start = last
    return items


# --- reading lm-eval's samples -----------------------------------------------------------------------


def _scores_of(loaded: LoadedTask, name: str, samples: Sequence[Mapping[str, Any]]) -> list[_Scores]:
    aggregations = loaded.tasks[name].aggregation()
    values: dict[tuple[str, str], list[tuple[int, Any]]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            key = (metric, sample["filter"])
            values.setdefault(key, []).append((int(sample["doc_id"]), sample[metric]))
    return [
        _Scores(
            task=name,
            metric=metric,
            filter_name=filter_name,
            indices=tuple(index for index, _ in pairs),
            values=tuple(value for _, value in pairs),
            aggregate=aggregations.get(metric, _mean),
        )
        for (metric, filter_name), pairs in values.items()
    ]


def _details_of(
    loaded: LoadedTask, name: str, samples: Sequence[Mapping[str, Any]]
) -> dict[tuple[int, str], dict[str, Any]]:
    task = loaded.tasks[name]
    metadata = task.get_config("metadata")
    group_field = metadata.get("item_group") if isinstance(metadata, Mapping) else None
    details = {}
    for sample in samples:
        detail: dict[str, Any] = {"doc_hash": _document_hash(sample["doc"])}
        answers = sample["filtered_resps"]
        if task.OUTPUT_TYPE == "multiple_choice":
            # For mutual information each choice is asked for without its context too, after the others.
            choices = len(answers) // 2 if "acc_mutual_info" in sample["metrics"] else len(answers)
            detail["loglikelihoods"] = [float(score) for score, _ in answers[:choices]]
        elif task.OUTPUT_TYPE == "loglikelihood":
            detail["loglikelihood"] = float(answers[0][0])
        elif task.OUTPUT_TYPE == "loglikelihood_rolling":
            detail["loglikelihood"] = float(answers[0])
        elif answers and isinstance(answers[0], str):
            detail["response"] = answers[0][:_TEXT_KEPT]
        if isinstance(target := sample["target"], int):
            detail["target"] = target
        if group_field is not None:
            if group_field not in sample["doc"]:
                raise ConfigError(
                    f"the documents of task {name!r} have no field {group_field!r} (item_group)"
                )
            detail["group"] = sample["doc"][group_field]
        details[int(sample["doc_id"]), sample["filter"]] = detail
    return details


def _document_hash(document: Any) -> str:
    """The beginning of lm-eval's own hash of a document: its samples of the same document have it too."""
    text = json.dumps(document, indent=2, default=handle_non_serializable, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_DIGITS]


# --- records -----------------------------------------------------------------------------------------


def _record(one: _Scores, seed: int, note: str | None, subtask: str = "") -> Record:
    metric = record_name(one.metric, one.filter_name, subtask)
    unit = metric_of(metric).unit
    value = one.value()
    lower, upper = one.interval(seed)
    return Record(metric, value, unit, lower, upper, len(one.values), note=note)


def _group_records(
    group: Any, scores: Mapping[str, Sequence[_Scores]], seed: int, note: str | None, subtask: str
) -> list[Record]:
    """lm-eval's aggregate over the members; its interval resamples inside each member."""
    leaves = [task.task_name for task in group.get_all_tasks()]
    records = []
    for config in group.aggregate_metric_list or []:
        found = [one for name in leaves for one in scores[name] if one.metric == config.metric]
        for filter_name in config.filter_list or sorted({one.filter_name for one in found}):
            parts = [one for one in found if one.filter_name == filter_name]
            if not parts:
                continue
            sizes = np.array([len(one.values) if config.weight_by_size else 1 for one in parts])
            weights = sizes / sizes.sum()
            value = float(np.dot(weights, [one.value() for one in parts]))
            draws = [_resized(one.draws(seed, one.task)) for one in parts]
            lower, upper = percentile_interval(np.dot(weights, draws))
            n = sum(len(one.values) for one in parts)
            metric = record_name(config.metric, filter_name, subtask)
            records.append(Record(metric, value, metric_of(metric).unit, lower, upper, n, note=note))
    return records


def _resized(draws: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """As many draws for every member; the fewer ones of slow statistics are repeated."""
    return np.resize(draws, RESAMPLES)


def _mean(values: Sequence[Any]) -> float:
    """What lm-eval takes for a metric without an aggregation."""
    return float(np.mean(values))


_mean.__name__ = "mean"


def _exp(nats: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Infinite where it is beyond all numbers."""
    with np.errstate(over="ignore"):
        result: np.ndarray[Any, Any] = np.exp(nats)
    return result


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (bool, int, float, np.number)) for value in values)


def _are_binary(values: Sequence[Any]) -> bool:
    return _are_numbers(values) and all(value in (0, 1) for value in values)
