"""The training loop: AdamW, warm-up then cosine, as many steps as a time or step budget allows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from harness.errors import NumericalFailure
from harness.zoo.noise import WeightNoise, noisy_weights

__all__ = ["Budget", "Hyperparameters", "TrainingRun", "learning_rate_factor", "train"]

_STEPS_BETWEEN_READS = 20  # reading the loss waits for the GPU
_CAUSAL_ATTENTION = "zoo_causal"


@dataclass(frozen=True)
class Budget:
    """When training ends: after so many seconds, or after so many steps."""

    seconds: float | None = None
    steps: int | None = None

    def progress(self, step: int, elapsed_s: float) -> float:
        """Share of the budget used, from 0 to 1."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        assert self.seconds is not None
        return min(1.0, elapsed_s / self.seconds)


@dataclass(frozen=True)
class Hyperparameters:
    """What the schedule of a run is made of."""

    learning_rate: float = 1e-3
    warmup_share: float = 0.03
    floor_share: float = 0.02
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clip: float = 1.0
    noise_levels: int = 0  # 0: no weight noise
    noise_group: int = 64


@dataclass(frozen=True)
class TrainingRun:
    """What a run did; `history` holds (step, learning rate, loss in nats per token)."""

    steps: int
    tokens: int
    seconds: float
    history: tuple[tuple[int, float, float], ...]


def learning_rate_factor(progress: float, warmup_share: float, floor_share: float) -> float:
    """Linear to 1 over the warm-up, then half a cosine down to `floor_share`."""
    if progress < warmup_share:
        return progress / warmup_share
    fallen = (progress - warmup_share) / (1 - warmup_share)
    return floor_share + (1 - floor_share) * 0.5 * (1 + math.cos(math.pi * fallen))


def train(
    model: PreTrainedModel,
    batches: Iterator[torch.Tensor],
    budget: Budget,
    settings: Hyperparameters,
    *,
    compile_model: bool = False,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, progress: None,
    log: Callable[[str], None] = print,
) -> TrainingRun:
    """Train `model` in place; `on_step(step, progress)` is called before each step and at the end.

    The clock starts after one untaken step, so that compilation does not use up the budget.
    """
    device = next(model.parameters()).device
    loss_of = torch.compile(_next_token_loss) if compile_model else _next_token_loss
    optimizer = _adamw(model, settings, fused=device.type == "cuda")
    AttentionInterface.register(_CAUSAL_ATTENTION, _causal_attention)
    model.set_attn_implementation(_CAUSAL_ATTENTION)
    # The zoo has no dropout, so evaluation mode computes the same; in training mode OPT draws a
    # random number per layer, which cuts the compiled graph into pieces.
    model.eval()
    noise = (
        WeightNoise(noisy_weights(model), settings.noise_levels, settings.noise_group, seed)
        if settings.noise_levels
        else None
    )
    loss_of(model, next(batches)).backward()
    optimizer.zero_grad(set_to_none=True)
    _wait_for(device)

    step, tokens, history, begin = 0, 0, [], time.perf_counter()
    last_report = -1.0
    while True:
        progress = budget.progress(step, time.perf_counter() - begin)
        on_step(step, progress)
        if progress >= 1.0:
            break
        # The factor at the middle of the step, so that the very first one is not wasted on zero.
        ahead = progress + (0.5 / budget.steps if budget.steps else 1e-6)
        rate = settings.learning_rate * learning_rate_factor(
            ahead, settings.warmup_share, settings.floor_share
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = next(batches)
        with nullcontext() if noise is None else noise.applied():
            loss = loss_of(model, batch)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % _STEPS_BETWEEN_READS == 0:
            value = float(loss.detach())
            if not math.isfinite(value):
                raise NumericalFailure(f"the loss is {value} at step {step}: training diverged")
            if progress - last_report >= 0.02:
                last_report = progress
                history.append((step, rate, round(value, 4)))
                elapsed_s = time.perf_counter() - begin
                log(
                    f"{progress:4.0%}  step {step}  loss {value:.3f}  "
                    f"{tokens / max(elapsed_s, 1e-9):,.0f} tokens/s"
                )
        step += 1
        tokens += batch[:, 1:].numel()
    _wait_for(device)
    model.set_attn_implementation("sdpa")
    return TrainingRun(step, tokens, time.perf_counter() - begin, tuple(history))


def _next_token_loss(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats; batch `[sequences, length + 1]`."""
    inputs, targets = batch[:, :-1], batch[:, 1:]
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.is_cuda):
        logits = model(input_ids=inputs, use_cache=False).logits  # [sequences, length, vocab]
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def _causal_attention(
    module: nn.Module,
    query: torch.Tensor,  # [sequences, heads, length, head width]
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention without a mask tensor.

    Under torch.compile transformers builds the full mask, which keeps torch from its flash kernel;
    a name without a registered mask function gets none.
    """
    mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return mixed.transpose(1, 2).contiguous(), None


def _adamw(model: PreTrainedModel, settings: Hyperparameters, *, fused: bool) -> torch.optim.AdamW:
    """AdamW that decays matrices only: norms and biases are not pulled to zero."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=fused)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
