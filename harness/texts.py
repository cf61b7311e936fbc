"""The text that methods are calibrated on and trained with.

By default the King James text without the books that the bundled task scores; `--text` names another
file. Models without a tokenizer (random weights) get random tokens.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import ConfigError
from harness.keys import file_hash

if TYPE_CHECKING:
    import torch

    from harness.cache import ContentCache
    from harness.job import Budget
    from harness.models.loading import LoadedModel
    from harness.tokens import TokenSource

__all__ = ["text_hash", "token_source"]


def text_hash(file: Path | None) -> str:
    """The identity of the text: the file's hash, or the hash of the bundled default.

    Raises:
        ConfigError: the file cannot be read, or has no text in it.
    """
    if file is None:
        from harness.corpus import kjv_training_text

        return hashlib.sha256(kjv_training_text().encode()).hexdigest()
    from harness.tokens import read_text

    if not read_text(file).strip():  # a clear error now, not in every worker
        raise ConfigError(f"the text file {file} is empty")
    return file_hash(file)


def token_source(budget: Budget, loaded: LoadedModel, cache: ContentCache) -> TokenSource:
    """Random tokens for a model without a tokenizer, else the text's tokens, made on first use."""
    from harness.tokens import RandomTokens

    if loaded.tokenizer is None:
        return RandomTokens(loaded.info.vocab_size)
    return _LazyText(budget, loaded.tokenizer, cache)


class _LazyText:
    """Tokenizes on the first window, and never twice the same text with the same tokenizer."""

    def __init__(self, budget: Budget, tokenizer: Any, cache: ContentCache) -> None:
        self._budget, self._tokenizer, self._cache = budget, tokenizer, cache

    @property
    def identity(self) -> str:
        return f"{self._budget.text_hash}:{self._tokenizer_hash}"

    @cached_property
    def _tokenizer_hash(self) -> str:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        described = backend.to_str() if backend is not None else repr(self._tokenizer.get_vocab())
        return hashlib.sha256(described.encode()).hexdigest()

    @cached_property
    def _source(self) -> TokenSource:
        from harness.tokens import TextTokens, read_text, text_tokens

        def tokenize() -> torch.Tensor:
            if self._budget.text is None:
                from harness.corpus import kjv_training_text

                return text_tokens(kjv_training_text(), self._tokenizer, name="KJV").ids
            text = read_text(self._budget.text)
            if file_hash(self._budget.text) != self._budget.text_hash:
                raise ConfigError(
                    f"the text file {self._budget.text} was changed since the sweep began; "
                    "run the same command again"
                )
            return text_tokens(text, self._tokenizer, name=str(self._budget.text)).ids

        ids = self._cache.get_or_compute({"tokens": self.identity}, tokenize)
        return TextTokens(ids, self.identity)

    def windows(self, count: int, seq_len: int, generator: torch.Generator) -> torch.Tensor:
        return self._source.windows(count, seq_len, generator)
