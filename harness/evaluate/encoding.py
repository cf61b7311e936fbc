"""From text to queries in tokens, as lm-eval tokenises, kept on disk under the content of both.

lm-eval tokenises each request by itself, several times in a task of choices; here every distinct text
of a task is tokenised once, in one call. What comes out is kept for the whole sweep, under the hash of
the texts and of the tokenizer, so that every further variant reads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from lm_eval import utils

from harness.cache import ContentCache
from harness.errors import ConfigError
from harness.evaluate.plan import Query

__all__ = ["Encoder", "tokenizer_identity"]

FORMAT = 2  # of what is kept; also changes when the rules here do


def tokenizer_identity(tokenizer: Any) -> str | None:
    """SHA-256 (hex) of everything that decides what a tokenizer does, or None where it cannot be told.

    A fast tokenizer can be written out whole; one that is a Python program cannot.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    flags = [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")]
    # How the last call padded and cut stands before the tokens; here nothing is padded or cut.
    whole: str = backend.to_str()
    lasting = whole.partition('"added_tokens":')[2] or whole
    parts = [type(tokenizer).__qualname__, lasting, json.dumps([special, flags], sort_keys=True)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Encoder:
    """Makes queries with a tokenizer.

    Args:
        max_length: positions of the model; longer inputs lose their beginning.
        prefix_token: what a text's first token is conditioned on.
        cache: where queries are kept, or None.
    """

    tokenizer: Any
    max_length: int
    prefix_token: int
    cache: ContentCache | None = None

    def pairs(self, requests: Sequence[tuple[str, str]]) -> list[Query]:
        """One query for each (context, continuation).

        Raises:
            ConfigError: a continuation without a token, or too long for the model.
        """
        return [query for group in self._kept("pairs", requests, self._encode_pairs) for query in group]

    def texts(self, texts: Sequence[str]) -> list[list[Query]]:
        """Queries for the windows of each text, which together score all its tokens."""
        return self._kept("texts", texts, self._encode_texts)

    # --- tokenising -----------------------------------------------------------------------------

    def _encode_pairs(self, requests: Sequence[tuple[str, str]]) -> list[list[Query]]:
        moved = [_with_leading_space(*request) for request in requests]
        free = self._tokens({rest for context, rest in moved if not context}, add_special_tokens=False)
        whole = self._tokens({context + rest for context, rest in moved if context})
        contexts = self._tokens({context for context, _ in moved if context})
        queries = []
        for context, rest in moved:
            if context:
                # Where a token lies across the border, lm-eval keeps the context's own tokens before what is
                # left of the whole.
                start = contexts[context]
                scored = len(whole[context + rest]) - len(start)
                tokens = [*start, *whole[context + rest][len(start) :]]
            else:
                own = free[rest]
                starts = bool(own) and own[0] == self.prefix_token
                tokens = own if starts else [self.prefix_token, *own]
                scored = len(tokens) - 1
            queries.append([self._query(tokens, scored, rest)])
        return queries

    def _encode_texts(self, texts: Sequence[str]) -> list[list[Query]]:
        tokens = self._tokens(set(texts))
        found = []
        for text in texts:
            windows = utils.get_rolling_token_windows(tokens[text], self.prefix_token, self.max_length, 1)
            pairs = [utils.make_disjoint_window(window) for window in windows]
            found.append([self._query([*context, *rest], len(rest), text) for context, rest in pairs])
        return found

    def _query(self, tokens: Sequence[int], scored: int, text: str) -> Query:
        if scored < 1:
            raise ConfigError(f"nothing to score: {text[:60]!r} adds no token to its context")
        if scored > self.max_length:
            raise ConfigError(
                f"{text[:60]!r} has {scored} tokens to score; the model has {self.max_length} positions"
            )
        return Query(tuple(tokens[-(self.max_length + 1) :]), scored)

    def _tokens(self, texts: Iterable[str], **options: Any) -> dict[str, list[int]]:
        """Tokens of each distinct text; one that begins with the prefix token as text gets no other."""
        found: dict[str, list[int]] = {}
        plain, begun = list[str](), list[str]()
        for text in sorted(texts):
            (begun if not options and text.startswith(self._prefix_text) else plain).append(text)
        for group, arguments in ((plain, options), (begun, {"add_special_tokens": False})):
            if group:
                found.update(zip(group, self.tokenizer(group, **arguments)["input_ids"], strict=True))
        return found

    @cached_property
    def _prefix_text(self) -> str:
        return str(self.tokenizer.decode(self.prefix_token))

    # --- keeping --------------------------------------------------------------------------------

    @cached_property
    def _identity(self) -> str | None:
        return tokenizer_identity(self.tokenizer)

    def _kept(
        self, kind: str, requests: Sequence[Any], encode: Callable[[Any], list[list[Query]]]
    ) -> list[list[Query]]:
        if self.cache is None or self._identity is None:
            return encode(requests)
        key = {
            "tokenised": kind,
            "format": FORMAT,
            "texts": hashlib.sha256(json.dumps(list(requests)).encode()).hexdigest(),
            "tokenizer": self._identity,
            "max_length": self.max_length,
            "prefix_token": self.prefix_token,
        }
        return _unpacked(self.cache.get_or_compute(key, lambda: _packed(encode(requests))))


def _with_leading_space(context: str, rest: str) -> tuple[str, str]:
    """Spaces at the end of the context belong to the next word's token, so they go to the rest."""
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + rest


def _packed(groups: Sequence[Sequence[Query]]) -> dict[str, torch.Tensor]:
    queries = [query for group in groups for query in group]
    return {
        "tokens": torch.tensor([token for query in queries for token in query.tokens], dtype=torch.int32),
        "lengths": torch.tensor([len(query.tokens) for query in queries], dtype=torch.int32),
        "scored": torch.tensor([query.scored for query in queries], dtype=torch.int32),
        "groups": torch.tensor([len(group) for group in groups], dtype=torch.int32),
    }


def _unpacked(packed: dict[str, torch.Tensor]) -> list[list[Query]]:
    tokens, first = packed["tokens"].tolist(), 0
    queries = []
    for length, scored in zip(packed["lengths"].tolist(), packed["scored"].tolist(), strict=True):
        queries.append(Query(tuple(tokens[first : first + length]), scored))
        first += length
    groups, first = [], 0
    for count in packed["groups"].tolist():
        groups.append(queries[first : first + count])
        first += count
    return groups
