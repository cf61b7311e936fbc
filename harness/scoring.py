"""Scoring a variant on a task, compared with the baseline's distributions or embeddings of the same text."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cache import ContentCache
from harness.errors import NotApplicable
from harness.evaluate.embedding import Embeddings
from harness.evaluate.embedding_engine import EmbeddingEvaluator, load_embeddings
from harness.evaluate.engine import Evaluation, TaskEvaluator, make_reference, wants_reference
from harness.evaluate.reference import ReferenceLogits, load_reference
from harness.transforming import load_original

if TYPE_CHECKING:
    from torch import nn

    from harness.evaluate.index import ResolvedTask
    from harness.job import VariantJob
    from harness.plugins import LoadedPlugins
    from harness.transforming import MadeVariant

__all__ = ["VariantScorer"]


class VariantScorer:
    """Evaluates a variant's in-memory model on the tasks of its cells.

    Raises:
        NotApplicable: the model has no tokenizer, or is none whose text can be scored.
    """

    def __init__(self, made: MadeVariant, job: VariantJob, plugins: LoadedPlugins) -> None:
        if made.tokenizer is None:
            raise NotApplicable(f"{made.info.label} has no tokenizer, so it cannot read a task's text")
        self._made, self._job, self._plugins = made, job, plugins
        self._evaluator: TaskEvaluator | EmbeddingEvaluator = (
            _embedding_evaluator(made.model, made, job)
            if made.info.kind == "encoder"
            else TaskEvaluator(
                made.model,
                made.tokenizer,
                made.info,
                limit=job.limit,
                seed=job.seed,
                batch_size=job.eval_batch_size,
                cache=ContentCache(job.cache_dir),
            )
        )

    def prepare(self, task: ResolvedTask) -> None:
        """Load a task, so that `score_prepared` answers its requests with those of the others."""
        self._evaluator.prepare(task)

    def score_prepared(self) -> Mapping[str, float]:
        """Answer what was prepared in one pass; each task's share of its cost, by name."""
        return self._evaluator.score_prepared()

    def score(self, task: ResolvedTask) -> Evaluation:
        """What the task's cell stores; for running text and embeddings also how far from the baseline."""
        if isinstance(self._evaluator, EmbeddingEvaluator):
            return self._evaluator.evaluate(task, self._baseline_embeddings(self._evaluator, task))
        wanted = wants_reference(task)
        reference = _reference(self._made, self._job, self._plugins, task) if wanted else None
        return self._evaluator.evaluate(task, reference)

    def _baseline_embeddings(self, mine: EmbeddingEvaluator, task: ResolvedTask) -> Embeddings | None:
        """As `_reference`, of the task's sentences."""
        made, job = self._made, self._job
        if made.info.scratch:
            return None
        path = _reference_path(job, task)
        stored = load_embeddings(path)
        if stored is not None:
            return stored
        if made.is_baseline:
            return mine.reference(task, path)
        original = load_original(job, self._plugins).model
        try:
            return _embedding_evaluator(original, made, job).reference(task, path)
        finally:
            del original
            gc.collect()


def _embedding_evaluator(model: nn.Module, made: MadeVariant, job: VariantJob) -> EmbeddingEvaluator:
    return EmbeddingEvaluator(
        model, made.tokenizer, made.info, limit=job.limit, seed=job.seed, batch_size=job.eval_batch_size
    )


def _reference_path(job: VariantJob, task: ResolvedTask) -> Path:
    path = ContentCache(job.cache_dir).path(
        {
            "reference": task.revision,
            "model": job.model.identity,
            "dtype": job.dtype,
            "seed": job.seed,
            "limit": job.limit,
            "environment": dict(job.environment),
        }
    )
    return path.with_suffix(".safetensors")


def _reference(
    made: MadeVariant, job: VariantJob, plugins: LoadedPlugins, task: ResolvedTask
) -> ReferenceLogits | None:
    """The baseline's distributions: stored, or made now by the baseline itself or by a fresh copy of
    the original. None for a `scratch:` model, whose baseline is another training run."""
    if made.info.scratch:
        return None
    path = _reference_path(job, task)
    stored = load_reference(path)
    if stored is not None:
        return stored
    model = made.model if made.is_baseline else load_original(job, plugins).model
    try:
        return make_reference(
            task,
            model,
            made.tokenizer,
            made.info,
            limit=job.limit,
            seed=job.seed,
            batch_size=job.eval_batch_size,
            path=path,
        )
    finally:
        del model
        gc.collect()
