"""Training an N:M model: its task and its text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.nn.losses import prediction_task, task_loss

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

    from harness import Context

    Loss = Callable[[nn.Module, torch.Tensor], torch.Tensor]

__all__ = ["require_text", "task_of"]


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
