"""Writing checkpoints in Hugging Face format, at the end of a run and, if asked, along it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from harness.errors import ConfigError
from harness.zoo.tokenizer import save_tokenizer

__all__ = ["EarlyCheckpoints", "Moment", "parse_moments", "save_checkpoint"]


@dataclass(frozen=True)
class Moment:
    """A point of a run: a number of steps, or a share of its budget."""

    steps: int | None = None
    share: float | None = None

    def is_reached(self, step: int, progress: float) -> bool:
        if self.steps is not None:
            return step >= self.steps
        assert self.share is not None
        return progress >= self.share


def parse_moments(text: str) -> tuple[Moment, ...]:
    """Read `0,1%,500`: plain numbers are steps, percentages are shares of the budget."""
    moments = []
    for item in filter(None, (piece.strip() for piece in text.split(","))):
        try:
            share = float(item[:-1]) / 100 if item.endswith("%") else None
            moment = Moment(steps=int(item)) if share is None else Moment(share=share)
        except ValueError:
            raise ConfigError(f"{item!r} is neither a number of steps nor a percentage") from None
        if (moment.steps or 0) < 0 or not 0 <= (moment.share or 0) <= 1:
            raise ConfigError(f"{item!r} lies outside the run")
        moments.append(moment)
    return tuple(moments)


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write model and tokenizer; the model in memory keeps its own precision."""
    directory.mkdir(parents=True, exist_ok=True)
    duplicate = copy.deepcopy(model)
    nn.Module.to(duplicate, dtype)
    duplicate.save_pretrained(directory)
    save_tokenizer(tokenizer, directory)


@dataclass
class EarlyCheckpoints:
    """Saves float32 weights to `out/step-N` as each moment is reached, for rewinding to them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    out: Path
    moments: tuple[Moment, ...]
    steps_saved: list[int] = field(default_factory=list)

    def __call__(self, step: int, progress: float) -> None:
        due = [moment for moment in self.moments if moment.is_reached(step, progress)]
        if not due:
            return
        self.moments = tuple(moment for moment in self.moments if moment not in due)
        save_checkpoint(self.model, self.tokenizer, self.out / f"step-{step}", torch.float32)
        self.steps_saved.append(step)
