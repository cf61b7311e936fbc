"""Losses between a student and its teacher. Logits are compared in float32, padding never appears."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from harness import NotApplicable

__all__ = ["Outputs", "TokenMasking", "cosine_loss", "outputs_of", "soft_target_loss"]


@dataclass(frozen=True, slots=True)
class Outputs:
    """Logits [batch, tokens, vocab] and the last hidden states [batch, tokens, d]."""

    logits: torch.Tensor
    hidden: torch.Tensor


def outputs_of(model: nn.Module, tokens: torch.Tensor) -> Outputs:
    """Run a language model (causal or masked) over tokens [batch, tokens]."""
    keywords = {} if getattr(model.config, "model_type", "") == "bert" else {"use_cache": False}
    output = model(input_ids=tokens, output_hidden_states=True, **keywords)
    return Outputs(output.logits, output.hidden_states[-1])


def soft_target_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), mean over positions (Hinton 2015).

    The factor T² keeps the size of the gradient when T changes. Logits are [..., vocab].
    """
    student = F.log_softmax(student.float() / temperature, dim=-1).flatten(0, -2)
    teacher = F.log_softmax(teacher.float() / temperature, dim=-1).flatten(0, -2)
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return temperature**2 * divergence


def cosine_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean of 1 - cos over positions; hidden states are [..., d]."""
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()


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
