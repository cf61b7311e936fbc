"""Scoring a variant on a task, compared with the baseline's distributions where the task has them."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from harness.cache import ContentCache
from harness.errors import NotApplicable
from harness.evaluate.engine import Evaluation, evaluate_task, make_reference, wants_reference
from harness.evaluate.reference import ReferenceLogits, load_reference
from harness.transforming import load_original

if TYPE_CHECKING:
    from harness.evaluate.index import ResolvedTask
    from harness.job import VariantJob
    from harness.plugins import LoadedPlugins
    from harness.transforming import MadeVariant

__all__ = ["score"]


def score(made: MadeVariant, job: VariantJob, plugins: LoadedPlugins, task: ResolvedTask) -> Evaluation:
    """Evaluate the in-memory model; for running text also its divergence from the baseline.

    Raises:
        NotApplicable: the model has no tokenizer, or cannot do this kind of task.
    """
    if made.tokenizer is None:
        raise NotApplicable(f"{made.info.label} has no tokenizer, so it cannot read a task's text")
    reference = _reference(made, job, plugins, task) if wants_reference(task) else None
    return evaluate_task(
        task,
        made.model,
        made.tokenizer,
        made.info,
        limit=job.limit,
        seed=job.seed,
        batch_size=job.eval_batch_size,
        reference=reference,
    )


def _reference(
    made: MadeVariant, job: VariantJob, plugins: LoadedPlugins, task: ResolvedTask
) -> ReferenceLogits | None:
    """The baseline's distributions: stored, or made now by the baseline itself or by a fresh copy of
    the original. None for a `scratch:` model, whose baseline is another training run."""
    if made.info.scratch:
        return None
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
    stored = load_reference(path.with_suffix(".safetensors"))
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
            path=path.with_suffix(".safetensors"),
        )
    finally:
        del model
        gc.collect()
