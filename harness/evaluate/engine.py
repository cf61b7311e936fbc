"""Scoring the in-memory model: any task through lm-eval, running text by token perplexity as well.

Called in the worker on the very object that was timed. lm-eval's response cache is never used: its key
does not name the model. Same seed, same batch size, same tasks, same machine: same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from harness.cache import ContentCache
from harness.errors import NotApplicable, NumericalFailure
from harness.evaluate.embedding_tasks import EMBEDDING_TYPES
from harness.evaluate.index import ResolvedTask
from harness.evaluate.intervals import bootstrap_weighted_mean, generator, percentile_interval
from harness.evaluate.lm import InMemoryLM, evaluating, quiet, seeded
from harness.evaluate.lm_tasks import ROLLING, LoadedTask, load_task
from harness.evaluate.metrics import metric_of
from harness.evaluate.prepared import PreparedTask, prepare_task, samples_of, score_together
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

__all__ = ["Evaluation", "TaskEvaluator", "evaluate_task", "make_reference", "wants_reference"]


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
    """Score a model on one task; see `TaskEvaluator`."""
    evaluator = TaskEvaluator(model, tokenizer, info, limit=limit, seed=seed, batch_size=batch_size)
    return evaluator.evaluate(task, reference)


class TaskEvaluator:
    """Scores one model on any number of tasks, their log-likelihoods together.

    Args:
        model: on its device, whatever has been done to it; only called (and asked to `generate`).
        limit: the first so many documents of every task, or all.
        batch_size: how much is computed at a time, at most (`InMemoryLM`).
        cache: where tokenised requests are kept, or None.

    Raises:
        NotApplicable: an encoder, random weights, no tokenizer.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        info: ModelInfo,
        *,
        limit: int | None,
        seed: int,
        batch_size: int,
        cache: ContentCache | None = None,
    ) -> None:
        _check_applicable(info)
        self._model, self._tokenizer, self._info = model, tokenizer, info
        self._limit, self._seed, self._batch_size = limit, seed, batch_size
        with quiet():
            self._lm = InMemoryLM(model, tokenizer, info, batch_size=batch_size, cache=cache)
        self._prepared: dict[str, PreparedTask] = {}

    def prepare(self, task: ResolvedTask) -> None:
        """Load a task and tokenise its requests.

        Raises:
            NotApplicable: a task that the harness cannot do.
            ConfigError: the task's data cannot be loaded, or do not fit the model.
        """
        if task.output_type in EMBEDDING_TYPES:
            raise NotApplicable(
                f"{self._info.label} is a decoder; this task compares the embeddings of an encoder"
            )
        with self._surroundings():
            self._prepared[task.name] = prepare_task(task, self._lm, limit=self._limit, seed=self._seed)

    def score_prepared(self) -> Mapping[str, float]:
        """Score the requests of all prepared tasks in one pass; each task's share of its cost, adding to 1.

        Raises:
            torch.cuda.OutOfMemoryError, MemoryError: a single sequence does not fit.
        """
        waiting = [prepared for prepared in self._prepared.values() if not prepared.is_scored]
        with self._surroundings():
            score_together(waiting, self._lm)
        tokens = {prepared.name: prepared.tokens for prepared in waiting}
        whole = max(1, sum(tokens.values()))
        return {name: count / whole for name, count in tokens.items()}

    def evaluate(self, task: ResolvedTask, reference: ReferenceLogits | None = None) -> Evaluation:
        """What a task's cell stores; prepares and scores the task where that was not done before.

        Args:
            reference: the baseline's distributions, for `mean_kl` and `top1_agreement` of running text.

        Raises:
            NotApplicable, ConfigError: as `prepare`; a reference for other tokens.
            NumericalFailure: the model gives NaN or an infinite metric.
        """
        if task.name not in self._prepared:
            self.prepare(task)
        prepared = self._prepared.pop(task.name)
        with self._surroundings():
            if not prepared.is_scored:
                score_together([prepared], self._lm)
            samples = samples_of(prepared, self._lm, self._limit)
            loaded = prepared.loaded
            note = ", ".join(part for part in (self._limit and f"limit={self._limit}", prepared.note) if part)
            records = records_of(loaded, samples, self._seed, note or None)
            items = items_of(loaded, samples)
            if loaded.is_rolling:
                window_records, window_items = self._windows(loaded, reference)
                records += window_records
                items += window_items
        return Evaluation(tuple(records), tuple(items))

    def _windows(
        self, loaded: LoadedTask, reference: ReferenceLogits | None
    ) -> tuple[list[Record], list[Item]]:
        documents = loaded.documents(self._limit)
        windows = cut_windows(documents, self._tokenizer, window_length(self._info.max_positions))
        scores = score_windows(
            self._model,
            windows,
            vocab_size=self._info.vocab_size,
            batch_size=self._batch_size,
            reference=reference,
        )
        note = None if self._limit is None else f"limit={self._limit}"
        return _window_records(windows, scores, self._seed, note), _window_items(windows, scores)

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        with quiet(), seeded(self._seed, device_of(self._model)), evaluating(self._model):
            yield


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
