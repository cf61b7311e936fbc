"""Log-likelihoods of many requests by few forward passes over the in-memory model.

The plan (`harness.evaluate.plan`) says which tokens are computed; here it is run: batches of rows of
like length within a budget of tokens, logits only where something is scored, log-probabilities in
float32, and one transfer of the results at the end. Where a batch does not fit into memory the budget is
halved and the work goes on.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import nn

from harness.evaluate.crew import ALONE, Crew, crew_for
from harness.evaluate.forward import Batch, Way, agrees_with_itself, choose_way, forward, make_batch, sent
from harness.evaluate.plan import Limits, Query, Row, batches, plan_rows
from harness.evaluate.windows import CHUNK_BYTES, LOGIT_BYTES, device_of
from harness.models.info import ModelInfo

__all__ = ["Scores", "is_out_of_memory", "limits_for", "score_queries"]

# Tokens of a batch at most: on a GPU, enough for all its units and kernels that outlast their launch; on a
# CPU, activations that its caches hold.
_BATCH_TOKENS = {"cuda": 16384}
_CPU_BATCH_TOKENS = 1024
_FEWEST_TOKENS, _BATCHES_EACH = 512, 4  # smaller batches where workers would have none left
_HEAP_BYTES = 31 << 20
_CPU_CHUNK_BYTES = 1 << 20  # of logits gone through at a time, for a core's cache

_Scored = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Scores:
    """For each query the sum of its log-probabilities (nats) and whether greedy decoding finds it.

    `log_likelihoods` is float64 [queries] and may hold NaN; `greedy` is bool [queries]; `way` tells how
    they were computed, and `note` what is worth keeping with the result, or None.
    """

    log_likelihoods: np.ndarray
    greedy: np.ndarray
    way: Way
    note: str | None


def limits_for(info: ModelInfo, device: torch.device, batch_size: int) -> Limits:
    """Rows and batches for a model.

    Args:
        batch_size: full-length sequences whose worth of tokens a batch may hold at most.
    """
    most = _BATCH_TOKENS.get(device.type, _CPU_BATCH_TOKENS)
    return Limits(
        row_tokens=min(info.max_positions, most),
        batch_tokens=min(batch_size * info.max_positions, most),
        batch_scored=max(1, LOGIT_BYTES // (4 * info.vocab_size)),
        # One pair costs 4·hidden operations a layer, one token about 24·hidden² (projections and FFN);
        # attention runs at a third of the speed of a matrix product.
        pair_cost=1.0 / (2 * info.hidden_size),
    )


def score_queries(model: nn.Module, queries: Sequence[Query], limits: Limits) -> Scores:
    """Score all queries together.

    Raises:
        torch.cuda.OutOfMemoryError, MemoryError: a single sequence does not fit; names the batch.
    """
    _keep_heap()
    device = device_of(model)
    trees = plan_rows(queries, limits, share=True)
    chains = cache(lambda: plan_rows(queries, limits, share=False))
    with crew_for(device) as crew:
        way, note = choose_way(model, trees, chains, crew)
        rows = trees if way.tree else chains()
        if crew.workers == 1 or agrees_with_itself(model, rows, way, crew):
            parts = _run(model, queries, rows, way, limits, crew)
        else:
            parts = _run(model, queries, rows, way, limits, ALONE)
            note = "; ".join((note, "one batch at a time: batches at once change each other")).strip("; ")
    return Scores(*parts.sums(), way, note or None)


def _run(
    model: nn.Module, queries: Sequence[Query], rows: list[Row], way: Way, limits: Limits, crew: Crew
) -> _Parts:
    """Score the rows, longest first; every worker has a batch, and one more is ready for whoever is done."""
    device = device_of(model)
    limits = _shared(limits, sum(len(row.tokens) for row in rows), way, crew.workers)
    parts = _Parts(len(queries))
    waiting = deque(batches(rows, limits))
    under_way: deque[tuple[list[Row], Callable[[], _Scored]]] = deque()
    done = 0
    while waiting or under_way:
        while waiting and len(under_way) < crew.under_way:
            batch = waiting.popleft()
            under_way.append((batch, crew.submit(_pair_scores, model, batch, way, device)))
        batch, result = under_way.popleft()
        try:
            scored = result()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            smaller = _smaller(batch, limits, queries)
            if smaller is None:
                place = f"batch {done + 1} of {len(batch)} rows with {len(batch[0].tokens)} tokens"
                raise type(error)(f"{place} does not fit into memory, nor would a smaller one") from error
            limits, again = smaller
        else:
            parts.add(batch, *scored)
            done += 1
            continue
        left = [*again, *(row for batch in waiting for row in batch)]
        waiting = deque(batches(left, limits))
        _free(device)
    return parts


def _shared(limits: Limits, tokens: int, way: Way, workers: int) -> Limits:
    """Limits of a batch where several workers share the memory and the work."""
    scored = max(1, limits.batch_scored // workers)
    most = limits.batch_tokens if way.select else min(limits.batch_tokens, scored)
    if workers > 1:
        most = min(most, max(_FEWEST_TOKENS, tokens // (_BATCHES_EACH * workers)))
    return replace(limits, batch_tokens=most, batch_scored=scored)


def _smaller(
    batch: Sequence[Row], limits: Limits, queries: Sequence[Query]
) -> tuple[Limits, list[Row]] | None:
    """Limits and rows to go on with after this batch did not fit; None where nothing is smaller."""
    if len(batch) > 1:
        held = len(batch) * len(batch[0].tokens)
        scored = sum(len(row.scored_nodes) for row in batch)
        return replace(limits, batch_tokens=held // 2, batch_scored=max(1, scored // 2)), list(batch)
    (row,) = batch
    if row.is_chain:
        return None
    members = [index for index, _ in row.members]
    rows = plan_rows([queries[index] for index in members], limits, share=False)
    for chain in rows:
        chain.members = [(members[index], pairs) for index, pairs in chain.members]
    return limits, rows


# --- one batch ---------------------------------------------------------------------------------------


def _pair_scores(model: nn.Module, rows: Sequence[Row], way: Way, device: torch.device) -> _Scored:
    """Log-probabilities (float32) and greediness (bool) of all pairs of the rows, [pairs]."""
    batch: Batch = make_batch(rows, device)
    places, targets = [], []
    before = 0
    for row in rows:
        nodes = row.scored_nodes
        place = {node: before + index for index, node in enumerate(nodes)}
        places += [place[node] for node, _ in row.pairs]
        targets += [token for _, token in row.pairs]
        before += len(nodes)
    # Pairs in the order of their logits, so that these can be gone through a chunk at a time. All goes to
    # the device before the pass starts, for what is sent after it would wait for its end.
    order = np.argsort(places, kind="stable")
    sorted_places = np.array(places)[order]
    at, wanted = sent(sorted_places, device), sent(np.array(targets)[order], device)
    back = sent(np.argsort(order), device)
    logits = forward(model, batch, way)
    chunk = max(1, (_CPU_CHUNK_BYTES if device.type == "cpu" else CHUNK_BYTES) // (4 * logits.shape[-1]))
    log_p, greedy = [], []
    for first in range(0, len(logits), chunk):
        start, end = np.searchsorted(sorted_places, (first, first + chunk))
        part = logits[first : first + chunk].float()
        scored = _scored(part, at[start:end] - first, wanted[start:end])
        log_p.append(scored[0])
        greedy.append(scored[1])
    return torch.cat(log_p)[back], torch.cat(greedy)[back]


def _scored(logits: torch.Tensor, at: torch.Tensor, targets: torch.Tensor) -> _Scored:
    """For pairs (row of logits, target): the log-probability, and whether `argmax` is the target."""
    if logits.device.type == "cpu":
        # numpy's is more than ten times as fast; both give the first of equal ones.
        likeliest = torch.from_numpy(logits.numpy().argmax(-1))
    else:
        likeliest = logits.max(-1).indices
    return logits.log_softmax(-1)[at, targets], likeliest[at] == targets


class _Parts:
    """Scores of pairs, batch by batch, and the queries that they belong to."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._log_p: list[torch.Tensor] = []
        self._greedy: list[torch.Tensor] = []
        self._queries: list[int] = []
        self._pairs: list[int] = []
        self._starts: list[int] = []
        self._before = 0

    def add(self, rows: Sequence[Row], log_p: torch.Tensor, greedy: torch.Tensor) -> None:
        for row in rows:
            for query, pairs in row.members:
                self._queries.append(query)
                self._starts.append(len(self._pairs))
                self._pairs += [self._before + pair for pair in pairs]
            self._before += len(row.pairs)
        self._log_p.append(log_p)
        self._greedy.append(greedy)

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        totals, greedy = np.zeros(self._count), np.zeros(self._count, dtype=bool)
        if self._queries:
            log_p = torch.cat(self._log_p).double().cpu().numpy()[self._pairs]
            totals[self._queries] = np.add.reduceat(log_p, self._starts)
            found = torch.cat(self._greedy).cpu().numpy()[self._pairs]
            greedy[self._queries] = np.logical_and.reduceat(found, self._starts)
        return totals, greedy


# --- memory ------------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a batch did not fit into memory, on any device."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return "can't allocate memory" in str(error)  # how torch's CPU allocator says it


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _keep_heap() -> None:
    """Make glibc keep what a forward pass frees.

    It gives memory above a threshold back to the system, and to take it again costs a page fault for
    every 4 KB: up to a third of the time of a small model. Freeing one large block raises the threshold
    (`mallopt(3)`, M_MMAP_THRESHOLD).
    """
    del_me = torch.empty(_HEAP_BYTES, dtype=torch.uint8)
    del del_me
