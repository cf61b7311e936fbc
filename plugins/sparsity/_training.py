"""Training an N:M model: its task, its text, zeros that stay."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from harness.nn.losses import prediction_task, task_loss

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from harness import Context
    from harness.training import TrainReport

    Loss = Callable[[nn.Module, torch.Tensor], torch.Tensor]

__all__ = ["require_text", "task_of", "train_around_zeros"]


def require_text(context: Context) -> None:
    """Fail now and not after the work where the training text is missing or too short.

    Raises:
        ConfigError: it is.
    """
    length = min(context.settings.seq_len, context.info.max_positions)
    context.training_source.windows(1, length, context.generator("text"))


def task_of(model: nn.Module, context: Context) -> Loss | None:
    """The loss of a model's own task: None (the loop's) for a decoder, masked tokens for an encoder.

    Raises:
        NotApplicable: an encoder without a head for masked tokens, or a tokenizer without a mask.
    """
    corrupt = prediction_task(model, context)
    if context.info.kind == "decoder":
        return None

    def loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        inputs, labels = corrupt(tokens)
        return task_loss(model(input_ids=inputs).logits, labels)

    return loss


def train_around_zeros(
    model: nn.Module,
    context: Context,
    pruned: Sequence[tuple[torch.Tensor, torch.Tensor]],
    *,
    loss: Loss | None,
    steps: int,
    lr: float | None,
) -> TrainReport:
    """Train all parameters while weights [out, in] stay zero outside their keep masks.

    Args:
        pruned: weights with their masks, bool [out, in].
    """

    @torch.no_grad()
    def hold(_step: int, _model: nn.Module) -> None:
        for weight, keep in pruned:
            weight.mul_(keep)

    # Without a gradient Adam's moments of a pruned weight stay zero and decay of a zero is zero: it never
    # wants to come back. Multiplying after each step makes it certain.
    hooks = [weight.register_hook(lambda gradient, keep=keep: gradient * keep) for weight, keep in pruned]
    try:
        return context.train(model, loss=loss, steps=steps, lr=lr, on_step=hold)
    finally:
        for hook in hooks:
            hook.remove()
