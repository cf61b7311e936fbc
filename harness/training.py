"""The one training loop: the same optimiser, schedule and budget for every method that trains.

Comparisons between methods that train are fair only if nothing but the method differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from harness.errors import ConfigError, NumericalFailure
from harness.kernels.onednn import onednn_products
from harness.tokens import TokenSource, training_batches

__all__ = ["TrainReport", "TrainSettings", "causal_loss", "lr_factor", "train"]

Loss = Callable[[nn.Module, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """The budget and the recipe.

    Args:
        steps: optimiser steps; 0 trains nothing.
        lr: peak learning rate of AdamW.
        batch_size: sequences a step.
        seq_len: tokens a sequence.
        warmup_share: share of the steps with a linearly rising rate.
        final_share: the rate at the end as a share of the peak (cosine in between).
        weight_decay: for matrices; vectors (norms, biases) are not decayed.
        max_grad_norm: gradients are clipped to this norm.
    """

    steps: int = 100
    lr: float = 5e-4
    batch_size: int = 8
    seq_len: int = 128
    warmup_share: float = 0.1
    final_share: float = 0.05
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ConfigError(f"training steps must be at least 0, not {self.steps}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ConfigError(f"the learning rate must be above 0, not {self.lr}")
        if self.batch_size < 1 or self.seq_len < 2:
            raise ConfigError("a training batch needs at least one sequence of two tokens")

    def replaced(self, **changes: Any) -> TrainSettings:
        """A copy with the changes that are not None."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def limited_to(self, max_positions: int) -> TrainSettings:
        """A copy whose sequences fit the model's positions."""
        return replace(self, seq_len=min(self.seq_len, max_positions))


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a run did: optimiser steps, tokens seen, and the loss of every step (nats/token)."""

    steps: int
    tokens: int
    losses: tuple[float, ...]

    @property
    def final_loss(self) -> float:
        """Mean of the last tenth of the losses; NaN where nothing was trained."""
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(tail) / len(tail) if tail else math.nan


def causal_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token (nats) over tokens int64 [batch, seq_len]."""
    logits = model(input_ids=tokens, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def lr_factor(step: int, settings: TrainSettings) -> float:
    """The learning rate at a step as a share of the peak: linear warm-up, then cosine."""
    warmup = max(1, round(settings.warmup_share * settings.steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return settings.final_share + (1 - settings.final_share) * cosine


def train(
    model: nn.Module,
    source: TokenSource,
    settings: TrainSettings,
    generator: torch.Generator,
    *,
    loss: Loss | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
    lr_multiples: Mapping[nn.Parameter, float] | None = None,
    first_step: int = 0,
    on_start: Callable[[torch.optim.Optimizer], None] | None = None,
    on_step: Callable[[int, nn.Module], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TrainReport:
    """Train `model` in place and leave it in eval mode.

    Master weights are float32 while training (a float16 or bfloat16 model is cast back at the end), and so
    are, on a CPU, the weights of float16 that are not trained. On CUDA and for models of 16 bits the forward
    pass runs under bfloat16 autocast. `lr_multiples`: of the rate, for parameters that need another one (1
    for all others). `first_step`: only the schedule's steps from this one on, with their rates and their
    batches, by a fresh optimiser; `on_step` counts steps of the schedule.

    Raises:
        NumericalFailure: the loss is not finite, or rose above twice its start.
        ConfigError: there is nothing to train, or the first step is negative.
    """
    if first_step < 0:
        raise ConfigError(f"the first training step must be at least 0, not {first_step}")
    if first_step >= settings.steps:
        model.eval()
        return TrainReport(0, 0, ())
    trained = _trainable(model, parameters)
    device = trained[0].device
    original_dtypes = {parameter: parameter.dtype for parameter in trained}
    frozen = [p for p in model.parameters() if p.requires_grad and p not in original_dtypes]
    # A CPU has no norms of bfloat16 activations and float16 parameters.
    others = [p for p in model.parameters() if p not in original_dtypes] if device.type == "cpu" else []
    narrow = [parameter for parameter in others if parameter.dtype == torch.float16]
    for parameter in (*trained, *narrow):
        parameter.data = parameter.data.float()
    for parameter in frozen:
        parameter.requires_grad_(False)
    optimizer = _optimizer(trained, settings, lr_multiples or {}, fused=device.type == "cuda")
    compute_loss = loss or causal_loss
    batches = training_batches(source, settings.batch_size, settings.seq_len, generator)
    losses: list[float] = []
    taken = settings.steps - first_step
    model.train()
    try:
        with _own_randomness(generator, device):
            for _ in range(first_step):
                next(batches)
            if on_start is not None:
                on_start(optimizer)
            for step in range(first_step, settings.steps):
                for group in optimizer.param_groups:
                    group["lr"] = group["lr_multiple"] * settings.lr * lr_factor(step, settings)
                tokens = next(batches).to(device)
                with _autocast(device, original_dtypes.values()), onednn_products(device):
                    value = compute_loss(model, tokens)
                losses.append(_checked(float(value.detach()), losses, step))
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
                optimizer.step()
                if on_step is not None:
                    on_step(step, model)
                if progress is not None:
                    progress(step + 1 - first_step, taken)
    finally:
        model.eval()
        for parameter in trained:
            parameter.grad = None
            parameter.data = parameter.data.to(original_dtypes[parameter])
        for parameter in narrow:
            parameter.data = parameter.data.half()
        for parameter in frozen:
            parameter.requires_grad_(True)
    return TrainReport(taken, taken * settings.batch_size * settings.seq_len, tuple(losses))


@contextmanager
def _own_randomness(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Dropout draws from the process's generators: seed them for the run, and put them back after."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(generator.initial_seed())
        yield


def _trainable(model: nn.Module, parameters: Iterable[nn.Parameter] | None) -> list[nn.Parameter]:
    given = model.parameters() if parameters is None else parameters
    trained = [parameter for parameter in given if parameter.requires_grad]
    if not trained:
        raise ConfigError("there is nothing to train: no parameter requires a gradient")
    return trained


def _optimizer(
    trained: list[nn.Parameter],
    settings: TrainSettings,
    lr_multiples: Mapping[nn.Parameter, float],
    *,
    fused: bool,
) -> torch.optim.AdamW:
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for parameter in sorted(trained, key=lambda each: each.ndim < 2):  # matrices first
        key = (parameter.ndim >= 2, lr_multiples.get(parameter, 1.0))
        groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": members,
                "weight_decay": settings.weight_decay if is_matrix else 0.0,
                "lr_multiple": multiple,
            }
            for (is_matrix, multiple), members in groups.items()
        ],
        lr=settings.lr,
        betas=(0.9, 0.95),
        fused=fused,
    )


def _autocast(device: torch.device, dtypes: Iterable[torch.dtype]) -> Any:
    low_precision = any(dtype in (torch.float16, torch.bfloat16) for dtype in dtypes)
    if device.type == "cuda" or low_precision:
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def _checked(value: float, losses: list[float], step: int) -> float:
    if not math.isfinite(value):
        raise NumericalFailure(f"training diverged: the loss is {value} at step {step}")
    # A batch in which nothing is to be predicted has a loss of 0 and says nothing of where it began.
    start = next((each for each in losses if each), None)
    if start is not None and value > 2 * start + 1.0:
        raise NumericalFailure(
            f"training diverged: the loss rose from {start:.3g} to {value:.3g} at step {step}"
        )
    return value
