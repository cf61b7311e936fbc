"""Scoring the in-memory model: any task through lm-eval, running text by token perplexity as well.

Called in the worker on the very object that was timed. lm-eval's response cache is never used: its key
does not name the model. Same seed, same batch size, same machine: same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import evaluator
from torch import nn

from harness.errors import NotApplicable, NumericalFailure
from harness.evaluate.index import ResolvedTask
from harness.evaluate.intervals import bootstrap_weighted_mean, generator, percentile_interval
from harness.evaluate.lm import InMemoryLM, evaluating, quiet, seeded
from harness.evaluate.lm_tasks import ROLLING, load_task
from harness.evaluate.metrics import metric_of
from harness.evaluate.reference import (
    ReferenceLogits,
    compute_reference,
    save_reference,
)
from harness.evaluate.results import items_of, records_of
from harness.evaluate.windows import (
    TokenWindows,
    WindowScores,
    cut_windows,
    device_of,
    score_windows,
    window_length,
)
from harness.models.info import ModelInfo
from harness.records import Item, Record

__all__ = ["Evaluation", "evaluate_task", "make_reference", "wants_reference"]


@dataclass(frozen=True)
class Evaluation:
    """What a task cell stores."""

    records: tuple[Record, ...]
    items: tuple[Item, ...]


def evaluate_task(
    task: ResolvedTask,
    model: nn.Module,
    tokenizer: Any,
    info: ModelInfo,
    *,
    limit: int | None,
    seed: int,
    batch_size: int,
    reference: ReferenceLogits | None = None,
) -> Evaluation:
    """Score a model on a task.

    Args:
        model: on its device, whatever has been done to it; only called (and asked to `generate`).
        limit: the first so many documents of every task, or all.
        batch_size: at most; it is made smaller where the logits would not fit.
        reference: the baseline's distributions, for `mean_kl` and `top1_agreement` of running text.

    Raises:
        NotApplicable: an encoder, random weights, no tokenizer, a task that the model cannot do.
        ConfigError: the task's data cannot be loaded; a reference for other tokens.
        NumericalFailure: the model gives NaN or an infinite metric.
    """
    _check_applicable(info)
    note = None if limit is None else f"limit={limit}"
    with quiet(), seeded(seed, device_of(model)), evaluating(model):
        loaded = load_task(task, seed=seed)
        lm = InMemoryLM(model, tokenizer, info, batch_size=batch_size)
        try:
            results = evaluator.evaluate(
                lm,
                {"tasks": loaded.tasks, "groups": loaded.groups},
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
            )
        except OverflowError as error:  # exp of the mean of a model that is broken
            raise NumericalFailure(f"a perplexity of {task.name} is infinite") from error
        records = records_of(loaded, results["samples"], seed, note)
        items = items_of(loaded, results["samples"])
        if loaded.is_rolling:
            windows = cut_windows(loaded.documents(limit), tokenizer, window_length(info.max_positions))
            scores = score_windows(
                model,
                windows,
                vocab_size=info.vocab_size,
                batch_size=batch_size,
                reference=reference,
            )
            records += _window_records(windows, scores, seed, note)
            items += _window_items(windows, scores)
    return Evaluation(tuple(records), tuple(items))


def wants_reference(task: ResolvedTask) -> bool:
    """Whether a task compares distributions with the baseline's."""
    return task.output_type == ROLLING


def make_reference(
    task: ResolvedTask,
    model: nn.Module,
    tokenizer: Any,
    info: ModelInfo,
    *,
    limit: int | None,
    seed: int,
    batch_size: int,
    path: Path,
) -> ReferenceLogits:
    """Run the untouched model over a rolling task's windows and store its distributions at `path`.

    What decides the result, and so belongs in the key of `path`: the model's identity and dtype, the
    task's revision, and `limit`. Raises as `evaluate_task`.
    """
    _check_applicable(info)
    with quiet(), seeded(seed, device_of(model)), evaluating(model):
        documents = load_task(task, seed=seed).documents(limit)
        windows = cut_windows(documents, tokenizer, window_length(info.max_positions))
        reference = compute_reference(model, windows, vocab_size=info.vocab_size, batch_size=batch_size)
    save_reference(path, reference)
    return reference


def _check_applicable(info: ModelInfo) -> None:
    if info.kind == "encoder":
        raise NotApplicable(f"{info.label} is an encoder; this task scores text with a language model")
    if info.synthetic:
        raise NotApplicable(f"{info.label} has random weights: speed and memory only")


def _window_records(windows: TokenWindows, scores: WindowScores, seed: int, note: str | None) -> list[Record]:
    """Perplexity and divergence with bootstrap intervals over windows (one window has none)."""
    note = windows.note if note is None else f"{windows.note}, {note}"
    records = []
    value, lower, upper = _mean_over_windows(scores.nll, None, seed, "nll")
    records.append(_record("nll", value, lower, upper, windows.scored_tokens, note))
    bounds = (value, lower, upper)
    perplexity, low, high = (None if bound is None else _exp(bound) for bound in bounds)
    assert perplexity is not None
    records.append(_record("token_perplexity", perplexity, low, high, windows.scored_tokens, note))
    if scores.kl is not None and scores.agreement is not None and scores.positions is not None:
        n = int(scores.positions.sum())
        for metric, values in (("mean_kl", scores.kl), ("top1_agreement", scores.agreement)):
            bounds = _mean_over_windows(values, scores.positions, seed, metric)
            records.append(_record(metric, *bounds, n, note))
    return records


def _record(metric: str, value: float, lower: float | None, upper: float | None, n: int, note: str) -> Record:
    return Record(metric, value, metric_of(metric).unit, lower, upper, n, note=note)


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        raise NumericalFailure(f"a loss of {nats:.0f} nats per token has no finite perplexity") from None


def _mean_over_windows(
    values: torch.Tensor, weights: torch.Tensor | None, seed: int, name: str
) -> tuple[float, float | None, float | None]:
    array = values.numpy()
    weight = None if weights is None else weights.numpy()
    value = float(np.average(array, weights=weight))
    if len(array) < 2:
        return value, None, None
    return value, *percentile_interval(bootstrap_weighted_mean(array, generator(seed, name), weight))


def _window_items(windows: TokenWindows, scores: WindowScores) -> list[Item]:
    def items(metric: str, values: torch.Tensor | None, counts: Sequence[int]) -> list[Item]:
        outcomes = [] if values is None else values.tolist()
        return [
            Item(index, metric, outcome, {"tokens": count})
            for index, (outcome, count) in enumerate(zip(outcomes, counts, strict=True))
            if count > 0
        ]

    scored = [windows.seq_len - 1] * len(scores.nll)
    compared = [] if scores.positions is None else [int(n) for n in scores.positions]
    return [
        *items("nll", scores.nll, scored),
        *items("mean_kl", scores.kl, compared),
        *items("top1_agreement", scores.agreement, compared),
    ]
