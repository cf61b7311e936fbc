"""The zoo's tokenizer: byte-level BPE, so every text has a lossless encoding."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from harness.errors import ConfigError

__all__ = ["END_OF_TEXT", "PADDING", "load_tokenizer", "save_tokenizer", "train_tokenizer"]

END_OF_TEXT = "<|endoftext|>"
"""Parts documents; also the first token that a text is conditioned on (BOS and EOS in one)."""
PADDING = "<|padding|>"
"""A token of its own: OPT never trains the embedding of its padding token."""


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, context_tokens: int) -> PreTrainedTokenizerFast:
    """Learn `vocab_size` tokens, the 256 bytes and two special ones included.

    No token is added before or after a text by itself: the caller decides what to condition on.
    """
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + 2
    if vocab_size < smallest:
        raise ConfigError(f"a byte-level vocabulary needs at least {smallest} tokens")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=context_tokens,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint or of an earlier run."""
    if not (directory / "tokenizer.json").is_file():
        raise ConfigError(f"no tokenizer.json in {directory}")
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(directory)
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write the Hugging Face files, tokenizer.json without its indentation (half the bytes)."""
    tokenizer.save_pretrained(directory)
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), "utf-8")
