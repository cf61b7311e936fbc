"""What a language model has learnt: bits per byte of a text, accuracy on minimal pairs."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from harness.errors import ConfigError
from harness.zoo.corpus import encode_documents

__all__ = [
    "BitsPerByte",
    "MinimalPair",
    "bits_per_byte",
    "minimal_pair_accuracy",
    "read_minimal_pairs",
]

_NOT_SCORED = -100  # torch's default ignore_index
_TOKENS_AT_ONCE = 16_384


@dataclass(frozen=True)
class BitsPerByte:
    """The information of a text under a model, in bits, over its UTF-8 bytes."""

    bits: float
    bytes: int
    tokens: int

    @property
    def value(self) -> float:
        return self.bits / self.bytes


@dataclass(frozen=True)
class MinimalPair:
    """Two sentences that differ in what makes one of them ungrammatical."""

    good: str
    bad: str


def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[str],
    *,
    window_tokens: int = 1024,
) -> BitsPerByte:
    """Score every token of every document once, in non-overlapping windows.

    A document's first window is conditioned on the end-of-text token, each further one on the last
    token of the window before, nothing else: no context is carried over. The end of a document is
    not scored, the bytes between documents are not counted.
    """
    start = int(tokenizer.eos_token_id)
    encoded = [ids.tolist() for ids in encode_documents(tokenizer, documents)]
    if not any(encoded):
        raise ConfigError("no text to evaluate")
    nats = math.fsum(_document_nats(model, start, encoded, window_tokens))
    return BitsPerByte(
        bits=nats / math.log(2),
        bytes=sum(len(document.encode()) for document in documents),
        tokens=sum(map(len, encoded)),
    )


def minimal_pair_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[MinimalPair],
    *,
    delimiter: str = "",
) -> float:
    """Share of pairs whose good sentence is likelier, each given only the end-of-text token.

    lm-eval puts its target delimiter, a space, before the sentence: `delimiter=" "`.
    """
    sentences = [delimiter + pair.good for pair in pairs] + [delimiter + pair.bad for pair in pairs]
    start = int(tokenizer.eos_token_id)
    encoded = [ids.tolist() for ids in encode_documents(tokenizer, sentences)]
    nats = _document_nats(model, start, encoded, int(model.config.max_position_embeddings))
    good, bad = nats[: len(pairs)], nats[len(pairs) :]
    return sum(g < b for g, b in zip(good, bad, strict=True)) / len(pairs)


def read_minimal_pairs(path: Path) -> list[MinimalPair]:
    """Read JSON lines with `sentence_good` and `sentence_bad`, plain or `.gz` (BLiMP's format)."""
    if not path.is_file():
        raise ConfigError(f"no such file of minimal pairs: {path}")
    raw = path.read_bytes()
    try:
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
        records = [json.loads(line) for line in text.splitlines() if line.strip()]
        pairs = [MinimalPair(str(r["sentence_good"]), str(r["sentence_bad"])) for r in records]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"cannot read minimal pairs from {path}: {error!r}") from error
    if not pairs:
        raise ConfigError(f"no minimal pairs in {path}")
    return pairs


def _document_nats(
    model: PreTrainedModel, start: int, documents: Sequence[list[int]], window_tokens: int
) -> list[float]:
    """Nats of each document's tokens, scored in non-overlapping windows after the token `start`."""
    windows: list[list[int]] = []  # each: one token of context, then at most window_tokens targets
    owners: list[int] = []
    for index, ids in enumerate(documents):
        tokens = [start, *ids]
        for first in range(0, len(ids), window_tokens):
            windows.append(tokens[first : first + window_tokens + 1])
            owners.append(index)
    totals = [0.0] * len(documents)
    for index, nats in zip(owners, _negative_log_likelihoods(model, windows), strict=True):
        totals[index] += nats
    return totals


@torch.inference_mode()
def _negative_log_likelihoods(model: PreTrainedModel, windows: Sequence[Sequence[int]]) -> list[float]:
    """Nats of all tokens but the first, for each window.

    Windows of like length share a batch. They are padded on the right, where a causal model cannot
    see the padding, so no attention mask is needed.
    """
    device = next(model.parameters()).device
    model.eval()
    by_length = sorted(range(len(windows)), key=lambda index: -len(windows[index]))
    nats = [0.0] * len(windows)
    while by_length:
        longest = len(windows[by_length[0]])
        count = max(1, _TOKENS_AT_ONCE // longest)
        chosen, by_length = by_length[:count], by_length[count:]
        inputs = torch.zeros(len(chosen), longest - 1, dtype=torch.long)
        targets = torch.full_like(inputs, _NOT_SCORED)
        for row, index in enumerate(chosen):
            window = torch.tensor(windows[index])
            inputs[row, : len(window) - 1] = window[:-1]
            targets[row, : len(window) - 1] = window[1:]
        logits = model(input_ids=inputs.to(device), use_cache=False).logits
        losses = nn.functional.cross_entropy(
            logits.float().transpose(1, 2),  # [windows, vocab, length]
            targets.to(device),
            ignore_index=_NOT_SCORED,
            reduction="none",
        )
        for index, loss in zip(chosen, losses.double().sum(dim=1).tolist(), strict=True):
            nats[index] = loss
    return nats
