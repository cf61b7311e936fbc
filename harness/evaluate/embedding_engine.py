"""Judging an encoder by its sentence embeddings, on the very object that was timed.

Labelled sentences: a linear probe is fitted anew on the embeddings that this variant gives to the training
sentences (`harness.evaluate.probe`), and its accuracy is that on the judged ones. Scored pairs: the cosine of
the two embeddings against the human scores. Both: how far the embeddings are from the baseline's.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from harness.errors import ConfigError, NotApplicable
from harness.evaluate.correlation import CORRELATIONS, correlation, correlation_draws
from harness.evaluate.embedding import Embedder, Embeddings, cosine_distance
from harness.evaluate.embedding_tasks import EMBEDDING_TYPES, EmbeddingData, load_embedding_data
from harness.evaluate.engine import Evaluation
from harness.evaluate.index import ResolvedTask
from harness.evaluate.intervals import (
    RESAMPLES,
    bootstrap_weighted_mean,
    generator,
    percentile_interval,
    wilson,
)
from harness.evaluate.lm import evaluating, quiet, seeded
from harness.evaluate.metrics import metric_of
from harness.evaluate.probe import fit_probe
from harness.evaluate.reference import write_tensors
from harness.evaluate.windows import device_of
from harness.models.info import ModelInfo
from harness.records import Item, Record

__all__ = ["EmbeddingEvaluator", "load_embeddings"]

FORMAT = "1"


@dataclass
class _Prepared:
    """A task's data, and the embeddings once they are computed."""

    data: EmbeddingData
    judged: Embeddings | None = None
    training: Embeddings | None = None


class EmbeddingEvaluator:
    """Scores one encoder on any number of tasks; used as `TaskEvaluator` is.

    Args:
        model: on its device, whatever has been done to it; only called.
        limit: the first so many documents of every task, or all; the probe's training sentences are part
            of the task and stay all.
        batch_size: full-length sequences whose worth of tokens a batch may hold at most.

    Raises:
        NotApplicable: a decoder, random weights, no tokenizer.
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
    ) -> None:
        if info.kind != "encoder":
            raise NotApplicable(f"{info.label} is a decoder; this task compares the embeddings of an encoder")
        if info.synthetic:
            raise NotApplicable(f"{info.label} has random weights: speed and memory only")
        self._model, self._info, self._limit, self._seed = model, info, limit, seed
        self._embedder = Embedder(model, tokenizer, info, batch_size=batch_size)
        self._prepared: dict[str, _Prepared] = {}

    def prepare(self, task: ResolvedTask) -> None:
        """Load a task's data.

        Raises:
            NotApplicable: a task for language models.
            ConfigError: its data cannot be loaded.
        """
        if task.output_type not in EMBEDDING_TYPES:
            raise NotApplicable(
                f"{self._info.label} is an encoder; this task scores text with a language model"
            )
        with self._surroundings():
            self._prepared[task.name] = _Prepared(load_embedding_data(task, self._limit))

    def score_prepared(self) -> Mapping[str, float]:
        """Embed the sentences of all prepared tasks; each task's share of its cost, adding to 1."""
        costs = {}
        for name, prepared in self._prepared.items():
            sentences = [*_judged_sentences(prepared.data), *prepared.data.training_texts]
            costs[name] = sum(map(len, self._embedder.tokens(sentences)))
            self._embed(prepared)
        whole = max(1, sum(costs.values()))
        return {name: cost / whole for name, cost in costs.items()}

    def reference(self, task: ResolvedTask, path: Path | None = None) -> Embeddings:
        """This model's embeddings of the judged sentences, kept at `path` where that is given.

        Raises:
            NotApplicable, ConfigError, NumericalFailure: as `evaluate`.
        """
        if task.name not in self._prepared:
            self.prepare(task)
        prepared = self._prepared[task.name]
        if prepared.judged is None:
            with self._surroundings():
                prepared.judged = self._embedder.embed(_judged_sentences(prepared.data))
        if path is not None:
            metadata = {"format": FORMAT, "fingerprint": prepared.judged.fingerprint}
            write_tensors(path, {"vectors": prepared.judged.vectors}, metadata)
        return prepared.judged

    def evaluate(self, task: ResolvedTask, reference: Embeddings | None = None) -> Evaluation:
        """What a task's cell stores; prepares and embeds where that was not done before.

        Args:
            reference: the baseline's embeddings of the same sentences, for `embedding_distance`.

        Raises:
            NotApplicable, ConfigError: as `prepare`; a reference for other tokens.
            NumericalFailure: an embedding is NaN, or similarities do not vary.
        """
        if task.name not in self._prepared:
            self.prepare(task)
        prepared = self._prepared.pop(task.name)
        self._embed(prepared)
        data, judged = prepared.data, prepared.judged
        assert judged is not None
        notes = [f"limit={self._limit}" if self._limit else "", judged.note]
        if prepared.training is not None:
            notes.insert(0, f"probe of {len(data.training_texts)} sentences")
            records, items = _classified(data, judged, prepared.training)
        else:
            records, items = _compared(data, judged, self._seed)
        if reference is not None:
            distances = _distances(data, judged, reference)
            if distances is None:
                notes.append("no distance from the baseline, whose embeddings have another width")
            else:
                records.append(_mean_distance(distances, self._seed))
                items += [Item(i, "embedding_distance", float(d)) for i, d in enumerate(distances)]
        note = ", ".join(filter(None, notes)) or None
        return Evaluation(tuple(replace(record, note=note) for record in records), tuple(items))

    def _embed(self, prepared: _Prepared) -> None:
        with self._surroundings():
            if prepared.judged is None:
                prepared.judged = self._embedder.embed(_judged_sentences(prepared.data))
            if prepared.training is None and prepared.data.training_texts:
                prepared.training = self._embedder.embed(prepared.data.training_texts)

    def _surroundings(self) -> AbstractContextManager[Any]:
        stack = ExitStack()
        stack.enter_context(quiet())
        stack.enter_context(seeded(self._seed, device_of(self._model)))
        stack.enter_context(evaluating(self._model))
        return stack


def load_embeddings(path: Path) -> Embeddings | None:
    """The stored reference, or None where there is none that can be read: then make it again."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                return None
            return Embeddings(file.get_tensor("vectors"), metadata["fingerprint"], "")
    except (OSError, SafetensorError, KeyError):
        return None


# --- what is measured --------------------------------------------------------------------------------


def _judged_sentences(data: EmbeddingData) -> list[str]:
    """All sentences of the documents, those of a pair next to each other."""
    return [sentence for texts in data.texts for sentence in texts]


def _classified(
    data: EmbeddingData, judged: Embeddings, training: Embeddings
) -> tuple[list[Record], list[Item]]:
    features = training.vectors.double().numpy()
    probe = fit_probe(features, np.array(data.training_targets), len(data.labels))
    log_p = probe.log_probabilities(judged.vectors.double().numpy())  # [documents, classes]
    targets = np.array(data.targets, dtype=np.int64)
    right = log_p.argmax(axis=1) == targets
    items = [
        Item(
            index,
            "acc",
            float(right[index]),
            {"loglikelihoods": log_p[index].tolist(), "target": int(target), **_group(data, index)},
        )
        for index, target in enumerate(targets)
    ]
    n = len(right)
    lower, upper = wilson(int(right.sum()), n) if n > 1 else (None, None)
    return [Record("acc", float(right.mean()), metric_of("acc").unit, lower, upper, n)], items


def _compared(data: EmbeddingData, judged: Embeddings, seed: int) -> tuple[list[Record], list[Item]]:
    pairs = judged.vectors.double().view(len(data.texts), 2, -1)  # [documents, 2, width]
    cosines = (pairs[:, 0] * pairs[:, 1]).sum(dim=1).numpy()
    scores, n = np.array(data.targets), len(data.targets)
    records = []
    for kind in CORRELATIONS:
        chosen = generator(seed, kind).integers(0, n, size=(RESAMPLES, n))
        bounds = percentile_interval(correlation_draws(kind, cosines, scores, chosen))
        value = correlation(kind, cosines, scores)
        records.append(Record(kind, value, metric_of(kind).unit, *bounds, n))
    items = [
        Item(index, "cosine", float(cosine), {"target": float(scores[index]), **_group(data, index)})
        for index, cosine in enumerate(cosines)
    ]
    return records, items


def _distances(data: EmbeddingData, judged: Embeddings, reference: Embeddings) -> torch.Tensor | None:
    """Cosine distance to the baseline's embeddings, float64 [documents]: of a pair the mean of both.

    None where the baseline's embeddings have another width.
    """
    if judged.fingerprint != reference.fingerprint:
        raise ConfigError(
            "the baseline's embeddings were made from other tokens than the variant's "
            "(another tokenizer or limit)"
        )
    if judged.vectors.shape != reference.vectors.shape:
        return None
    each = cosine_distance(judged.vectors, reference.vectors)
    return each.view(len(data.texts), -1).mean(dim=1)


def _mean_distance(distances: torch.Tensor, seed: int) -> Record:
    values = distances.numpy()
    bounds: tuple[float | None, float | None] = (None, None)
    if len(values) > 1:
        bounds = percentile_interval(bootstrap_weighted_mean(values, generator(seed, "embedding_distance")))
    unit = metric_of("embedding_distance").unit
    return Record("embedding_distance", float(values.mean()), unit, *bounds, len(values))


def _group(data: EmbeddingData, index: int) -> dict[str, Any]:
    return {} if data.groups is None else {"group": data.groups[index]}
