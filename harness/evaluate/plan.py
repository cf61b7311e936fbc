"""Which forward passes answer a set of log-likelihood requests: pure planning, no model.

A request asks for the log-probabilities of the last few tokens of a sequence. Requests that begin with
the same tokens need the same hidden states there, so the sequences are laid into prefix trees: a shared
beginning is computed once, an identical request costs nothing, and the choices that are one token long
are read from one position of their context. A tree is one row of a batch: every node attends to its
ancestors only (`ancestor_mask`) and has its depth for a position, so that the model computes for each
branch what it would for that sequence alone.

Where a model does not honour such a mask, rows are plain sequences (``share=False``); a sequence that is
the beginning of another is still covered by it, which is right for every causal model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

__all__ = ["Limits", "Query", "Row", "ancestor_mask", "batches", "plan_rows"]


@dataclass(frozen=True, slots=True)
class Query:
    """The log-probability of the last `scored` of `tokens`, each given those before it."""

    tokens: tuple[int, ...]
    scored: int

    def __post_init__(self) -> None:
        if not 0 < self.scored < len(self.tokens):
            raise ValueError(f"{self.scored} of {len(self.tokens)} tokens cannot be scored")

    @property
    def input(self) -> tuple[int, ...]:
        """What the model must read: the last token is only predicted."""
        return self.tokens[:-1]


@dataclass(frozen=True, slots=True)
class Limits:
    """How large rows and batches may be.

    `row_tokens` bounds a row in which sequences are laid together, `batch_tokens` a batch with its
    padding, and `batch_scored` the positions of a batch whose logits are held. A single row may always
    be larger. `pair_cost` is what one (query, key) pair of attention costs, in units of one token through
    everything else.
    """

    row_tokens: int
    batch_tokens: int
    batch_scored: int = 1 << 40
    pair_cost: float = 0.0


@dataclass(slots=True)
class Row:
    """One row of a batch: a tree of tokens in depth-first order.

    `segments` are the stretches without a fork, (first node, end, parent node or -1). `pairs` are the
    (node, next token) whose log-probabilities are asked for, each once. `members` are the queries
    answered here, with the indices of their pairs.
    """

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    segments: list[tuple[int, int, int]] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    members: list[tuple[int, list[int]]] = field(default_factory=list)

    @property
    def is_chain(self) -> bool:
        """No fork: a plain sequence."""
        return len(self.segments) == 1

    @property
    def scored_nodes(self) -> list[int]:
        """The nodes whose logits are needed, in order."""
        return sorted({node for node, _ in self.pairs})


def plan_rows(queries: Sequence[Query], limits: Limits, *, share: bool) -> list[Row]:
    """Lay the queries into rows, longest first.

    Args:
        share: whether a row may be a tree; else every row is a chain.
    """
    by_input: dict[tuple[int, ...], list[int]] = {}
    for index, query in enumerate(queries):
        by_input.setdefault(query.input, []).append(index)
    rows: list[Row] = []
    row, path = Row(), list[int]()  # of the row being filled: the nodes of its last sequence
    before: tuple[int, ...] = ()
    pair_index: dict[tuple[int, int], int] = {}
    for sequence in sorted(by_input):
        shared = _shared_prefix(before, sequence)
        if not _belongs(row, before, sequence, shared, limits, share):
            row, path, shared, pair_index = Row(), [], 0, {}
            rows.append(row)
        _append(row, path, sequence, shared)
        before = sequence
        for index in by_input[sequence]:
            row.members.append((index, _pairs_of(queries[index], row, path, pair_index)))
    rows.sort(key=lambda row: -len(row.tokens))
    return rows


def batches(rows: Sequence[Row], limits: Limits) -> Iterator[list[Row]]:
    """Cut rows, given longest first, into batches within the limits."""
    batch: list[Row] = []
    scored = 0
    for row in rows:
        more = len(row.scored_nodes)
        width = len(batch[0].tokens) if batch else 0
        if batch and ((len(batch) + 1) * width > limits.batch_tokens or scored + more > limits.batch_scored):
            yield batch
            batch, scored = [], 0
        batch.append(row)
        scored += more
    if batch:
        yield batch


def ancestor_mask(rows: Sequence[Row], width: int) -> np.ndarray:
    """Bool [rows, width, width]: True where a node (second axis) may see another (third).

    Padding sees itself alone, so that no row of a softmax is empty, and is seen by nothing.
    """
    mask = np.zeros((len(rows), width, width), dtype=bool)
    below = np.tril(np.ones((width, width), dtype=bool))
    for of_row, row in zip(mask, rows, strict=True):
        for first, end, parent in row.segments:
            if parent >= 0:
                of_row[first:end, : parent + 1] = of_row[parent, : parent + 1]
            of_row[first:end, first:end] = below[: end - first, : end - first]
        padding = np.arange(len(row.tokens), width)
        of_row[padding, padding] = True
    return mask


def _shared_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


def _belongs(
    row: Row,
    before: tuple[int, ...],
    sequence: tuple[int, ...],
    shared: int,
    limits: Limits,
    share: bool,
) -> bool:
    """Whether a sequence goes into the row at hand: where that is allowed, and saves work.

    It saves the shared tokens and costs the attention between tokens that have nothing to do with
    each other: a row of n nodes attends n² pairs.
    """
    if shared == 0:
        return False
    if shared == len(before) and row.is_chain:
        return True  # it only goes on where the row ends
    if not share:
        return False
    size, more = len(row.tokens), len(sequence) - shared
    if size + more > limits.row_tokens:
        return False
    extra_pairs = (size + more) ** 2 - size**2 - len(sequence) ** 2
    return shared > limits.pair_cost * extra_pairs


def _append(row: Row, path: list[int], sequence: tuple[int, ...], shared: int) -> None:
    """Add what is new of a sequence as a segment; `path` becomes its nodes."""
    first, new = len(row.tokens), len(sequence) - shared
    parent = path[shared - 1] if shared else -1
    if new:
        if row.segments and parent == first - 1:
            row.segments[-1] = (row.segments[-1][0], first + new, row.segments[-1][2])
        else:
            row.segments.append((first, first + new, parent))
    row.tokens += sequence[shared:]
    row.depths += range(shared, len(sequence))
    path[shared:] = range(first, first + new)


def _pairs_of(query: Query, row: Row, path: list[int], pair_index: dict[tuple[int, int], int]) -> list[int]:
    indices = []
    for place in range(len(query.tokens) - query.scored, len(query.tokens)):
        pair = (path[place - 1], query.tokens[place])
        index = pair_index.setdefault(pair, len(row.pairs))
        if index == len(row.pairs):
            row.pairs.append(pair)
        indices.append(index)
    return indices
