"""The smallest model that learns text in seconds, for comparing ways to train: `scratch:llama-nano`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import mean

import torch
from torch import nn

from harness.context import Context
from harness.method import Method
from harness.models.loading import describe, load
from harness.models.spec import parse_model
from harness.testing import make_context
from harness.training import TrainSettings
from tests.zoo_models import held_out_nll, training_tokens, zoo_model

__all__ = ["NANO", "SEEDS", "dense_nll", "means_over_seeds", "nano", "nano_nll"]

NANO = "scratch:llama-nano"
SEEDS = (0, 1, 2)


def settings(steps: int) -> TrainSettings:
    return TrainSettings(steps=steps, lr=3e-3, batch_size=8, seq_len=64)


def nano(seed: int, steps: int, teacher: str | None = None) -> tuple[nn.Module, Context]:
    """An untrained model and a context with so many steps of 512 tokens; the seed decides both.

    `teacher`: a model of the zoo that the context can load.
    """
    loaded = load(describe(parse_model(NANO)), torch.device("cpu"), torch.float32, seed)
    context = make_context(
        loaded.model,
        loaded.info,
        tokens=training_tokens(),
        tokenizer=loaded.tokenizer,
        settings=settings(steps),
        seed=seed,
        has_teacher=False,
        teachers=None if teacher is None else {f"zoo:{teacher}": zoo_model(teacher)},
    )
    return loaded.model, context


def nano_nll(method: Method, seed: int, steps: int, *, dense_first: bool = False, **options) -> float:
    """Held-out nats per token after a method has trained the model, an untrained one or not."""
    model, context = nano(seed, steps, options.get("teacher"))
    if dense_first:
        context.train(model)
    made = method.transform(model, method.options.parse(options), context)
    return held_out_nll(made, windows=128, seq_len=64)


def dense_nll(seed: int, steps: int, *, again: bool = False) -> float:
    """The same of plain training; `again`: of two runs, one after the other."""
    model, context = nano(seed, steps)
    for _ in range(1 + again):
        context.train(model)
    return held_out_nll(model, windows=128, seq_len=64)


def means_over_seeds(runs: Mapping[str, Callable[[int], float]]) -> dict[str, float]:
    """The mean over the seeds of each run, printed with its parts."""
    means = {}
    for name, run in runs.items():
        values = [run(seed) for seed in SEEDS]
        means[name] = mean(values)
        print(f"{name:12} {means[name]:.3f}  " + " ".join(f"{value:.3f}" for value in values), flush=True)
    return means
