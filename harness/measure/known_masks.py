"""Attention masks of timed batches, which nothing has to read: they hide nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["masks_known_on_host"]


@contextmanager
def masks_known_on_host() -> Iterator[None]:
    """Let transformers leave out attention masks without reading them, because nothing is padded.

    transformers drops the mask where it hides nothing, so that attention takes its fast causal path.
    To know that, it reads the padding mask, which a capture forbids; and while a stream is captured
    it keeps every mask. Timed batches have no padding: the answer is known without looking.
    """
    from transformers import masking_utils

    answers: dict[str, Callable[..., bool]] = {
        "_ignore_causal_mask_sdpa": _causal_mask_hides_nothing,
        "_ignore_bidirectional_mask_sdpa": _bidirectional_mask_hides_nothing,
    }
    originals = {name: getattr(masking_utils, name, None) for name in answers}
    known = {name: original for name, original in originals.items() if original is not None}
    try:
        for name in known:
            setattr(masking_utils, name, answers[name])
        yield
    finally:
        for name, original in known.items():
            setattr(masking_utils, name, original)


def _causal_mask_hides_nothing(
    _padding_mask: Any,
    q_length: int,
    kv_length: int,
    q_offset: Any,
    _kv_offset: Any = 0,
    local_attention_size: int | None = None,
) -> bool:
    if local_attention_size is not None and kv_length >= local_attention_size:
        return False
    empty_cache = isinstance(q_offset, int) and q_offset == 0
    return q_length == 1 or kv_length == q_length or empty_cache


def _bidirectional_mask_hides_nothing(
    _padding_mask: Any, kv_length: int, local_attention_size: int | None = None
) -> bool:
    return local_attention_size is None or kv_length < local_attention_size
