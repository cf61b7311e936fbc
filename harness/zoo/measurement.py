"""What the recipe measures on a saved checkpoint, as rows for its card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from harness.corpus import kjv_held_out_chapters
from harness.zoo.corpus import Source
from harness.zoo.evaluation import MinimalPair, bits_per_byte, minimal_pair_accuracy
from harness.zoo.tokenizer import load_tokenizer

__all__ = ["Measurement", "kjv_held_out_source", "measure_checkpoint"]


@dataclass(frozen=True)
class Measurement:
    """One figure: `value` of `metric` on the text `name`, over `n` of `unit`."""

    name: str
    metric: str
    value: float
    n: int
    unit: str


def kjv_held_out_source() -> Source:
    """The held-out books of the King James Bible, a chapter a document."""
    chapters = tuple(chapter.text for chapter in kjv_held_out_chapters())
    return Source("King James Bible, held-out books", chapters)


def measure_checkpoint(
    directory: Path,
    *,
    texts: Sequence[Source] = (),
    minimal_pairs: Mapping[str, Sequence[MinimalPair]] | None = None,
    device: torch.device | str = "cpu",
) -> list[Measurement]:
    """Load the checkpoint, compute in float32, measure every text and every set of pairs."""
    tokenizer = load_tokenizer(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    nn.Module.to(model, device)
    rows = [_bits_per_byte(model, tokenizer, source) for source in texts]
    for name, pairs in (minimal_pairs or {}).items():
        for metric, delimiter in (
            ("minimal-pair accuracy", ""),
            ("minimal-pair accuracy as in lm-eval", " "),
        ):
            accuracy = minimal_pair_accuracy(model, tokenizer, pairs, delimiter=delimiter)
            rows.append(Measurement(name, metric, accuracy, len(pairs), "pairs"))
    return rows


def _bits_per_byte(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, source: Source) -> Measurement:
    window_tokens = int(model.config.max_position_embeddings)
    measured = bits_per_byte(model, tokenizer, source.documents, window_tokens=window_tokens)
    return Measurement(source.name, "bits per byte", measured.value, measured.bytes, "bytes")
