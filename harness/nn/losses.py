"""Losses between a student and its teacher, and the task that a language model itself is trained on.

Logits are compared in float32. Tokens come in whole windows, so padding never appears.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from harness.errors import ConfigError, NotApplicable

if TYPE_CHECKING:
    from harness.context import Context

__all__ = [
    "Outputs",
    "TokenMasking",
    "cosine_loss",
    "hidden_state_loss",
    "outputs_of",
    "prediction_task",
    "soft_target_loss",
    "task_loss",
]


@dataclass(frozen=True, slots=True)
class Outputs:
    """Logits [batch, tokens, vocab], the last hidden states [batch, tokens, d], and those of every
    layer from the embeddings on."""

    logits: torch.Tensor
    hidden: torch.Tensor
    layers: tuple[torch.Tensor, ...] = ()


def outputs_of(model: nn.Module, tokens: torch.Tensor) -> Outputs:
    """Run a language model (causal or masked) over tokens [batch, tokens]."""
    config: Any = model.config
    keywords = {} if getattr(config, "model_type", "") == "bert" else {"use_cache": False}
    output = model(input_ids=tokens, output_hidden_states=True, **keywords)
    return Outputs(output.logits, output.hidden_states[-1], tuple(output.hidden_states))


def soft_target_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), mean over positions (Hinton 2015).

    The factor T² keeps the size of the gradient when T changes. Logits are [..., vocab]; gradients flow
    to the student only, and are exactly zero where both say the same.
    """
    flat = (logits.float().flatten(0, -2) for logits in (student, teacher))
    loss: torch.Tensor = _SoftTargets.apply(*flat, temperature)  # type: ignore[no-untyped-call]
    return loss


class _SoftTargets(torch.autograd.Function):
    """The closed form of the gradient, T · (q - p) / positions, keeps one array [positions, vocab].

    Through the chain of its parts, a student that equals its teacher would get a gradient of rounding
    errors, and Adam divides by the size of the gradient.
    """

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
        log_q = F.log_softmax(student / temperature, dim=-1)
        log_p = F.log_softmax(teacher / temperature, dim=-1)
        p = log_p.exp()
        ctx.save_for_backward(log_q.exp() - p)
        ctx.factor = temperature / len(student)
        return temperature**2 * (p * (log_p - log_q)).sum(-1).mean()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        return gradient * ctx.factor * difference, None, None


def cosine_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean of 1 - cos over positions; hidden states are [..., d]."""
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()


def hidden_state_loss(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean over the layers of ``MSE(student, teacher) / mean(teacher²)``; states are [..., d].

    Raises:
        ConfigError: not as many layers, or not as wide.
    """
    shapes = [tuple(states[0].shape[-1:]) for states in (student, teacher)]
    if len(student) != len(teacher) or shapes[0] != shapes[1]:
        raise ConfigError(
            f"hidden states cannot be compared: the student has {len(student) - 1} layers of width "
            f"{shapes[0][0]}, the teacher {len(teacher) - 1} of width {shapes[1][0]}"
        )
    losses = [
        F.mse_loss(mine.float(), theirs.float()) / theirs.float().square().mean()
        for mine, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(losses).mean()


def task_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy (nats) of logits [batch, tokens, vocab]; labels are -100 where nothing counts."""
    total = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    return total / (labels != -100).sum().clamp(min=1)


def prediction_task(
    model: nn.Module, context: Context
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """From tokens to (inputs, labels): masked tokens for an encoder, shifted ones for a decoder.

    Raises:
        NotApplicable: an encoder without a head for masked tokens, or a tokenizer without a mask.
    """
    if context.info.kind == "decoder":
        return lambda tokens: (tokens, F.pad(tokens[:, 1:], (0, 1), value=-100))
    output: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if output is None:
        raise NotApplicable("the encoder has no head for masked tokens to be trained with")
    return TokenMasking.of(context.tokenizer, context.info.vocab_size, context.generator("masking"))


@dataclass(frozen=True)
class TokenMasking:
    """BERT's corruption: `share` of the tokens are to be predicted; of those 80 % become the mask
    token, 10 % a random one, 10 % stay. Drawn anew for each batch from `generator`."""

    mask_id: int
    special_ids: tuple[int, ...]
    vocab_size: int
    generator: torch.Generator
    share: float = 0.15

    @classmethod
    def of(cls, tokenizer: object, vocab_size: int, generator: torch.Generator) -> TokenMasking:
        """For a tokenizer.

        Raises:
            NotApplicable: there is none, or it has no mask token.
        """
        mask_id = getattr(tokenizer, "mask_token_id", None)
        if mask_id is None:
            raise NotApplicable("training a masked language model needs a tokenizer with a mask token")
        special = tuple(getattr(tokenizer, "all_special_ids", ()))
        return cls(mask_id, special, vocab_size, generator)

    def __call__(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Corrupted tokens, and labels that are -100 where nothing is to be predicted."""
        draw = torch.rand(2, *tokens.shape, generator=self.generator).to(tokens.device)
        random = torch.randint(self.vocab_size, tokens.shape, generator=self.generator)
        special = torch.isin(tokens, torch.tensor(self.special_ids, device=tokens.device))
        chosen = (draw[0] < self.share) & ~special
        corrupted = torch.where(draw[1] < 0.8, self.mask_id, random.to(tokens.device))
        corrupted = torch.where(draw[1] < 0.9, corrupted, tokens)
        return torch.where(chosen, corrupted, tokens), torch.where(chosen, tokens, -100)
