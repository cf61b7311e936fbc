"""Sentence embeddings of the in-memory encoder: mean-pooled hidden states of length 1.

The embedding of a sentence is the mean of its last hidden states over all of its tokens, the special ones
included, divided by its norm: what sentence-transformers does for the models that it trains. Sentences of
like length share a batch, padded and masked.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harness.errors import NotApplicable, NumericalFailure
from harness.evaluate.scorer import is_out_of_memory, limits_for
from harness.evaluate.windows import check_vocabulary, device_of
from harness.kernels.onednn import onednn_products
from harness.models.info import ModelInfo

__all__ = ["Embedder", "Embeddings", "cosine_distance"]

# Cosine distance between a sentence by itself and the same in a padded batch: rounding gives 1e-12 and 1e-5.
_ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-9}
_HALF_PRECISION_ROUNDING = 1e-3


@dataclass(frozen=True)
class Embeddings:
    """`vectors` is float32 [sentences, width] on the CPU, rows of length 1; `fingerprint` names the tokens.

    `note` tells what is worth keeping with the result, or is empty.
    """

    vectors: torch.Tensor
    fingerprint: str
    note: str


class Embedder:
    """Embeds sentences with one model.

    Args:
        model: an encoder on its device, in eval mode, whatever has been done to it; only called.
        batch_size: full-length sequences whose worth of tokens a batch may hold at most.

    Raises:
        NotApplicable: no tokenizer.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, info: ModelInfo, *, batch_size: int) -> None:
        if tokenizer is None:
            raise NotApplicable("the model has no tokenizer, so no text can be embedded")
        self._model, self._tokenizer, self._info = model, tokenizer, info
        self._device = device_of(model)
        self._budget = limits_for(info, self._device, batch_size).batch_tokens
        self._longest = min(info.max_positions, tokenizer.model_max_length)
        self._options: dict[str, bool] | None = None  # of the call; found out by the first one
        self._dtype = torch.float32  # of the hidden states; as well

    def tokens(self, sentences: Sequence[str]) -> list[list[int]]:
        """Token ids of each sentence, with the tokenizer's special ones, cut at the model's longest input.

        Raises:
            ConfigError: tokens that the model has no embedding for.
        """
        cut: list[list[int]] = self._tokenizer(
            list(sentences), truncation=True, max_length=self._longest, padding=False
        )["input_ids"]
        check_vocabulary(max((max(ids) for ids in cut if ids), default=0), self._info.vocab_size)
        return cut

    @torch.inference_mode()
    def embed(self, sentences: Sequence[str]) -> Embeddings:
        """Embed sentences; equal ones are computed once.

        Raises:
            NumericalFailure: an embedding is NaN or infinite.
            torch.cuda.OutOfMemoryError, MemoryError: a single sentence does not fit.
        """
        distinct = list(dict.fromkeys(sentences))
        places = {sentence: place for place, sentence in enumerate(distinct)}
        ids = self.tokens(distinct)
        order = sorted(range(len(ids)), key=lambda place: -len(ids[place]))
        padded = self._ignores_padding([ids[place] for place in order])
        vectors: list[torch.Tensor] = [torch.empty(0)] * len(ids)
        waiting, budget = order, self._budget
        while waiting:
            batch = _next_batch(waiting, ids, budget, padded)
            try:
                found = self._pooled([ids[place] for place in batch])
            except (MemoryError, RuntimeError) as error:
                if len(batch) == 1 or not is_out_of_memory(error):
                    raise
                budget = len(batch) * len(ids[batch[0]]) // 2
                gc.collect()
                continue
            for place, vector in zip(batch, found, strict=True):
                vectors[place] = vector
            waiting = waiting[len(batch) :]
        pooled = torch.stack(vectors)[[places[sentence] for sentence in sentences]]
        if broken := int((~torch.isfinite(pooled).all(dim=1)).sum()):
            raise NumericalFailure(f"{broken} of {len(pooled)} embeddings are NaN or infinite")
        return Embeddings(
            nn.functional.normalize(pooled, dim=1),
            _fingerprint(ids[places[sentence]] for sentence in sentences),
            self._note(ids, padded),
        )

    def _note(self, ids: Sequence[Sequence[int]], padded: bool) -> str:
        cut = sum(len(each) == self._longest for each in ids)
        parts = [f"{cut} sentences of {self._longest} tokens or more were cut"] if cut else []
        if not padded:
            parts.append("batches of one length: padding changes the model's embeddings")
        return ", ".join(parts)

    def _ignores_padding(self, ids: Sequence[list[int]]) -> bool:
        """Whether a short sentence beside the longest one is embedded as it is by itself."""
        if len(ids) < 2 or len(ids[0]) == len(ids[-1]):
            return True
        some = [ids[0], ids[len(ids) // 2], ids[-1]]
        together = self._pooled(some)
        alone = torch.cat([self._pooled([each]) for each in some])
        rounding = _ROUNDING.get(self._dtype, _HALF_PRECISION_ROUNDING)
        return float(cosine_distance(together, alone).max()) <= rounding

    def _pooled(self, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """Mean hidden states of a batch, float32 [sentences, width] on the CPU."""
        width = max(map(len, ids))
        padding = self._tokenizer.pad_token_id or 0
        rows = torch.tensor([[*row, *[padding] * (width - len(row))] for row in ids], dtype=torch.int64)
        lengths = torch.tensor([len(row) for row in ids])
        mask = (torch.arange(width) < lengths[:, None]).long()  # [sentences, width]
        full = bool((lengths == width).all())
        states = self._states(rows.to(self._device), None if full else mask.to(self._device))
        weights = mask.to(states.device)[..., None]
        return ((states.float() * weights).sum(1) / weights.sum(1)).cpu()

    def _states(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Last hidden states [sentences, width, d]; of a model with a head those before it."""
        masked = {} if mask is None else {"attention_mask": mask}
        with onednn_products(tokens.device):
            output = self._model(input_ids=tokens, **masked, **(self._options or {}))
        if self._options is None:
            self._options = {} if hasattr(output, "last_hidden_state") else {"output_hidden_states": True}
            if self._options:
                return self._states(tokens, mask)
        states = output.hidden_states[-1] if self._options else output.last_hidden_state
        assert isinstance(states, torch.Tensor)
        self._dtype = states.dtype
        return states


def cosine_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """1 - cosine of the rows of a and b [rows, width], float64 [rows] and never below 0."""
    first, second = (nn.functional.normalize(each.double(), dim=1) for each in (a, b))
    # Half the squared distance of unit vectors: exact for equal ones, where 1 - cos cancels.
    return 0.5 * (first - second).square().sum(dim=1)


def _next_batch(waiting: Sequence[int], ids: Sequence[Sequence[int]], budget: int, padded: bool) -> list[int]:
    width = len(ids[waiting[0]])
    batch = list(waiting[: max(1, budget // width)])
    return batch if padded else [place for place in batch if len(ids[place]) == width]


def _fingerprint(ids: Any) -> str:
    digest = hashlib.sha256()
    for row in ids:
        digest.update(repr(row).encode())
    return digest.hexdigest()
