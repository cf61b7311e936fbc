"""Training and evaluation text: files to documents, documents to one stream of tokens."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerFast

from harness.corpus import kjv_training_text
from harness.errors import ConfigError

__all__ = [
    "Source",
    "encode_documents",
    "fragments",
    "kjv_source",
    "read_source",
    "split_documents",
    "split_sentences",
    "token_stream",
    "training_batches",
]

_ENCODE_AT_ONCE = 512  # documents; bounds the memory of the tokenizer's own records

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])|(?<=[.!?][\"'\u201d)])\s+(?=[\"'\u201c(]?[A-Z])")
_SHORTEST_LINE = 40  # characters; under it lie titles and headings
_MOST_SENTENCES = 6

TokenIds = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Source:
    """The documents of one text file, and how often an epoch reads them."""

    name: str
    documents: tuple[str, ...]
    repeats: int = 1

    @property
    def size_bytes(self) -> int:
        """UTF-8 bytes of the documents, separators and repeats not counted."""
        return sum(len(document.encode()) for document in self.documents)

    @property
    def sha256(self) -> str:
        """Digest of the documents, each closed by a NUL byte."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(document.encode() + b"\0")
        return digest.hexdigest()


def split_documents(text: str) -> tuple[str, ...]:
    """Documents are parted by two or more blank lines; a text without any is one document."""
    pieces = (piece.strip() for piece in re.split(r"\n{3,}", text.replace("\r\n", "\n")))
    return tuple(piece for piece in pieces if piece)


def read_source(path: Path) -> Source:
    """Read a UTF-8 text file: `.txt`, or compressed as `.xz` or `.gz`."""
    if not path.is_file():
        raise ConfigError(f"no such text file: {path}")
    try:
        raw = path.read_bytes()
        if path.suffix == ".xz":
            raw = lzma.decompress(raw)
        elif path.suffix == ".gz":
            raw = gzip.decompress(raw)
        documents = split_documents(raw.decode("utf-8"))
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path} as UTF-8 text: {error}") from error
    if not documents:
        raise ConfigError(f"no text in {path}")
    return Source(path.name, documents)


def kjv_source(repeats: int) -> Source:
    """The King James Bible without its held-out books, a chapter a document."""
    return Source("King James Bible", split_documents(kjv_training_text()), repeats)


def fragments(source: Source, share: float, seed: int) -> Source:
    """Single passages of the text: this share of its lines, cut into pieces of 1 to 6 sentences.

    Read beside the whole documents, they teach the model how a text goes on that starts in the
    middle of things. Without them it expects a title after the end-of-text token, and judges a
    sentence that stands alone (as in BLiMP) badly.
    """
    draw = random.Random(seed)
    pieces: list[str] = []
    for document in source.documents:
        for line in document.split("\n"):
            if len(line) < _SHORTEST_LINE or draw.random() >= share:
                continue
            sentences = split_sentences(line)
            while sentences:
                count = draw.randint(1, _MOST_SENTENCES)
                pieces.append(" ".join(sentences[:count]))
                sentences = sentences[count:]
    return Source(f"{source.name}, fragments", tuple(pieces))


def split_sentences(line: str) -> list[str]:
    """Cut after a full stop, question or exclamation mark before a capital: good enough here."""
    return [sentence for sentence in re.split(_SENTENCE_END, line.strip()) if sentence]


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> Iterator[TokenIds]:
    """Token ids of each document, in order, without special tokens; uses all cores."""
    for first in range(0, len(documents), _ENCODE_AT_ONCE):
        batch = list(documents[first : first + _ENCODE_AT_ONCE])
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            yield np.asarray(encoding.ids, dtype=np.uint16)


def token_stream(tokenizer: PreTrainedTokenizerFast, sources: Sequence[Source]) -> TokenIds:
    """All documents of an epoch in one array `[tokens]`, each preceded by the end-of-text token."""
    start = np.asarray([tokenizer.eos_token_id], dtype=np.uint16)
    pieces: list[TokenIds] = []
    for source in sources:
        encoded = list(encode_documents(tokenizer, source.documents))
        for _ in range(source.repeats):
            for ids in encoded:
                pieces += (start, ids)
    return np.concatenate([*pieces, start])


def training_batches(
    stream: TokenIds, *, sequences: int, length: int, seed: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """Endless batches `[sequences, length + 1]`: inputs and, one to the right, targets.

    Every epoch cuts the stream at another offset and visits the windows in another order, so that
    a token is not always seen with the same context.
    """
    if len(stream) < 2 * length + 1:
        raise ConfigError(f"{len(stream)} tokens of text are too few for sequences of {length} tokens")
    tokens = torch.from_numpy(stream.astype(np.int32)).to(device)
    within = torch.arange(length + 1, device=device)
    random = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(length, (1,), generator=random))
        windows = (len(stream) - 1 - offset) // length
        order = torch.randperm(windows, generator=random) * length + offset
        for starts in order.split(sequences):
            if len(starts) == min(sequences, windows):  # a ragged rest would be compiled anew
                yield tokens[starts.to(device)[:, None] + within].long()
