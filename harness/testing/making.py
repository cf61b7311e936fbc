"""A real `Context` for tests: random or given tokens, a small budget, a cache that goes away."""

from __future__ import annotations

import copy
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness.cache import ContentCache
from harness.context import Context
from harness.models.info import ModelInfo, info_from_config
from harness.models.loading import LoadedModel
from harness.tokens import RandomTokens, TextTokens
from harness.training import TrainSettings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from harness.tokens import TokenSource

__all__ = ["make_context"]

SMALL_BUDGET = TrainSettings(steps=3, lr=1e-3, batch_size=2, seq_len=32)


def make_context(
    model: nn.Module,
    info: ModelInfo | None = None,
    *,
    tokens: TokenSource | torch.Tensor | None = None,
    tokenizer: Any = None,
    settings: TrainSettings = SMALL_BUDGET,
    calibration_samples: int = 8,
    calibration_len: int = 32,
    seed: int = 0,
    has_teacher: bool = True,
    teachers: Mapping[str, nn.Module] | None = None,
    cache_dir: Path | None = None,
) -> Context:
    """The context that a transform of `model` gets, with small defaults.

    Args:
        model: as it is now, it is what `Context.teacher` copies.
        info: by default read from the model's configuration.
        tokens: a source or one run of ids, int64 [tokens]; by default uniform random tokens.
        teachers: what `Context.teacher` finds under a name; all with the given tokenizer.
        cache_dir: by default a temporary directory that goes away with the context.
    """
    config: Any = model.config
    info = info or info_from_config(config, f"test:{config.model_type}")
    if tokens is None:
        tokens = RandomTokens(info.vocab_size)
    elif isinstance(tokens, torch.Tensor):
        tokens = TextTokens(tokens, "test")
    named = dict(teachers or {})

    def load_named(name: str) -> LoadedModel:
        made: Any = copy.deepcopy(named[name])
        return LoadedModel(made, tokenizer, info_from_config(made.config, name))

    original = copy.deepcopy(model) if has_teacher else None
    directory = cache_dir or Path(tempfile.mkdtemp(prefix="harness-test-"))
    parameter = next(model.parameters())
    context = Context(
        info=info,
        tokenizer=tokenizer,
        device=parameter.device,
        dtype=parameter.dtype,
        seed=seed,
        calibration_source=tokens,
        training_source=tokens,
        settings=settings,
        calibration_samples=calibration_samples,
        calibration_len=calibration_len,
        load_teacher=(lambda: copy.deepcopy(original)) if original is not None else None,
        load_named=load_named if named else None,
        cache_store=ContentCache(directory),
        identity={"model": info.label, "seed": seed, "tokens": tokens.identity},
    )
    if cache_dir is None:
        weakref.finalize(context, shutil.rmtree, directory, ignore_errors=True)
    return context
