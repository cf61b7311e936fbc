"""Token streams that methods are calibrated on and trained with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from harness.errors import ConfigError

__all__ = ["RandomTokens", "TextTokens", "TokenSource", "text_tokens", "training_batches"]


class TokenSource(Protocol):
    """Where windows of tokens come from; `identity` names the content for cache keys."""

    @property
    def identity(self) -> str: ...

    def windows(self, count: int, seq_len: int, generator: torch.Generator) -> torch.Tensor:
        """`count` windows, int64 [count, seq_len], chosen by `generator`."""
        ...


@dataclass(frozen=True)
class TextTokens:
    """Windows at random places of one long run of tokens.

    Args:
        ids: int64 [tokens].
        identity: what the ids depend on (the text's hash and the tokenizer's).
    """

    ids: torch.Tensor
    identity: str

    def windows(self, count: int, seq_len: int, generator: torch.Generator) -> torch.Tensor:
        last_start = len(self.ids) - seq_len
        if count < 1 or seq_len < 1:
            raise ConfigError(f"{count} windows of {seq_len} tokens were asked for; both must be >= 1")
        if last_start < 0:
            raise ConfigError(
                f"the text has {len(self.ids)} tokens; a window of {seq_len} does not fit in it"
            )
        starts = torch.randint(last_start + 1, (count, 1), generator=generator)
        return self.ids[starts + torch.arange(seq_len)]


@dataclass(frozen=True)
class RandomTokens:
    """Uniform random tokens: for random weights, where only shapes and speed matter."""

    vocab_size: int

    @property
    def identity(self) -> str:
        return f"random:{self.vocab_size}"

    def windows(self, count: int, seq_len: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(self.vocab_size, (count, seq_len), generator=generator)


def text_tokens(text: str, tokenizer: Any, *, name: str) -> TextTokens:
    """Tokenize a text once; `name` only serves messages.

    Raises:
        ConfigError: the text is empty.
    """
    if not text.strip():
        raise ConfigError(f"the text {name} is empty")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    tensor = torch.tensor(ids, dtype=torch.int64)
    # The ids name both the text and the tokenizer, so they are the identity.
    digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    return TextTokens(tensor, f"text:{digest}")


def read_text(path: Path) -> str:
    """Read a UTF-8 text file; `.xz` and `.gz` are unpacked.

    Raises:
        ConfigError: the file is missing, unreadable or not UTF-8.
    """
    import gzip
    import lzma
    import zlib

    unpackers = {".xz": lzma.decompress, ".gz": gzip.decompress}
    try:
        content = path.read_bytes()
        if path.suffix in unpackers:
            content = unpackers[path.suffix](content)
        return content.decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"the text file {path} does not exist") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        raise ConfigError(f"the text file {path} cannot be read: {error}") from None


def training_batches(
    source: TokenSource, batch_size: int, seq_len: int, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """Endless batches, int64 [batch_size, seq_len]."""
    while True:
        yield source.windows(batch_size, seq_len, generator)
