"""One forward pass over a batch of planned rows, in the fastest way that this very model allows.

A variant may be any module: its attention replaced, its cache compressed, its head quantized. So every
way but the plainest is tried on the model before it is used (`choose_way`): the log-probabilities that it
gives for rows of the plan itself must be those of a plain call on each sequence alone. What fails is not
used, and the reason is kept for the record's note.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from harness.errors import HarnessError
from harness.evaluate.crew import ALONE, Crew
from harness.evaluate.plan import Row, ancestor_mask
from harness.evaluate.selection import head_of, last_ffn, only_selected
from harness.evaluate.windows import device_of, logits_of

__all__ = ["PLAIN", "Batch", "Way", "agrees_with_itself", "choose_way", "forward", "make_batch", "sent"]

_PROBED_BRANCHES = 3  # of a row, compared with plain calls
_VECTOR = 16
_LARGEST_PADDING = 1 / 32  # of the tokens, for aligned keys: about what they save at the least
_LARGEST_TAIL = 0.9  # of the places scored: above, to pick them out costs more than it saves
_NOISE_FACTOR = 3.0  # how much more than the model's own noise a way may differ
_LARGEST_ERROR = 0.2  # nats, root mean square, whatever the noise
_BASE_ERROR = {torch.float32: 1e-4, torch.float64: 1e-8}  # nats, root mean square
_HALF_PRECISION_ERROR = 2e-2


@dataclass(frozen=True, slots=True)
class Way:
    """How rows are given to the model.

    `tree`: rows may fork, told by a mask and positions; `lean`: without a cache, which nothing here
    reads; `select`: the head computes only the positions that are asked for; `tail`: so does the FFN of
    the last block.
    """

    tree: bool
    lean: bool
    select: bool
    tail: bool = False


PLAIN = Way(tree=False, lean=False, select=False)
_WAYS = (
    Way(tree=True, lean=True, select=True, tail=True),
    Way(tree=True, lean=True, select=True),
    Way(tree=True, lean=False, select=True),
    Way(tree=False, lean=True, select=True, tail=True),
    Way(tree=False, lean=True, select=True),
    Way(tree=False, lean=False, select=True),
)


@dataclass(frozen=True)
class Batch:
    """Rows as tensors on the device.

    `tokens` and `positions` are int64 [rows, width]; `mask` is bool [rows, 1, width, width], or None
    where no row forks; `selected` int64 [n] are the scored places in the flattened batch.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor | None
    selected: torch.Tensor


def make_batch(rows: Sequence[Row], device: torch.device) -> Batch:
    """Right-pad the rows to one width and send them to the device."""
    forks = any(not row.is_chain for row in rows)
    width = _width(max(len(row.tokens) for row in rows), device, forks)
    tokens = np.zeros((len(rows), width), dtype=np.int64)
    positions = np.zeros((len(rows), width), dtype=np.int64)
    selected = []
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = row.tokens
        positions[index, : len(row.tokens)] = row.depths
        selected += [index * width + node for node in row.scored_nodes]
    mask = sent(ancestor_mask(rows, width)[:, None], device) if forks else None
    return Batch(
        tokens=sent(tokens, device),
        positions=sent(positions, device),
        mask=mask,
        selected=sent(np.array(selected, dtype=np.int64), device),
    )


def _width(longest: int, device: torch.device, forks: bool) -> int:
    """How wide a batch is made for its longest row; wider only where positions are given (it forks).

    On a GPU it is a multiple of 8: its attention kernels want aligned masks. On a CPU, whose attention
    takes what is left over of a vector one by one, a multiple of 16 floats where that is near: 127 keys
    cost 30 % more than 128.
    """
    if not forks:
        return longest
    if device.type == "cuda":
        return -(-longest // 8) * 8
    aligned = -(-longest // _VECTOR) * _VECTOR
    return aligned if aligned - longest <= longest * _LARGEST_PADDING else longest


@torch.inference_mode()
def forward(model: nn.Module, batch: Batch, way: Way) -> torch.Tensor:
    """Logits [n, vocab] of the selected places."""
    arguments: dict[str, Any] = {}
    if way.lean:
        arguments["use_cache"] = False
    if batch.mask is not None:
        arguments["attention_mask"] = _additive(batch.mask, _dtype_of(model))
        arguments["position_ids"] = batch.positions
    if not way.select:
        logits = logits_of(model, batch.tokens, **arguments)
        return logits.flatten(0, 1)[batch.selected]
    head, ffn = head_of(model), last_ffn(model) if way.tail else None
    assert head is not None
    with only_selected(head, ffn, batch.tokens.shape, batch.selected):
        logits = logits_of(model, batch.tokens, **arguments)
    if logits.shape[:2] != (1, len(batch.selected)):
        raise ValueError(f"the logits have the shape {tuple(logits.shape)}")
    return logits[0]


def choose_way(
    model: nn.Module, rows: Sequence[Row], chains: Callable[[], Sequence[Row]], crew: Crew = ALONE
) -> tuple[Way, str]:
    """The first way that gives, on these rows, what plain calls give; and why better ones do not.

    Args:
        rows: longest first; of those that fork the longest and one of middle size are tried, and with them
            the deepest of all: a mask is given to whatever shares their batch.
        chains: makes plain rows of the same requests; asked only where no tree will do.
        crew: tries with several calls at once. What fails so is tried again with one after the other.

    Raises:
        torch.cuda.OutOfMemoryError, MemoryError: a single row does not fit.
    """
    reasons: list[str] = []
    for way in _WAYS:
        if not _is_understood(model, way):
            continue
        of_kind = [row for row in rows if not row.is_chain] if way.tree else chains()
        if not of_kind or (way.tail and _scored_share(of_kind) > _LARGEST_TAIL):
            continue
        tried = _extremes(of_kind)
        if way.tree:
            deepest = max(rows, key=_depth)
            tried += [deepest] if _depth(deepest) > max(map(_depth, tried)) else []
        wrong = _wrong(model, way, tried, crew)
        if wrong is not None and crew.workers > 1:
            wrong = _wrong(model, way, tried, ALONE)
        if wrong is None:
            return way, "" if way.tree else "; ".join(dict.fromkeys(reasons))
        if way.tree:
            reasons.append(f"shared prefixes are computed again for each request: {wrong}")
    return PLAIN, "; ".join(dict.fromkeys(reasons))


def _wrong(model: nn.Module, way: Way, rows: Sequence[Row], crew: Crew) -> str | None:
    """What is wrong with the way on these rows, an error of the model's included, or None."""
    try:
        return _difference(model, way, rows, crew)
    except torch.cuda.OutOfMemoryError:
        raise
    except _REFUSALS as error:
        return " ".join(str(error).split())[:120] or type(error).__name__


def agrees_with_itself(model: nn.Module, rows: Sequence[Row], way: Way, crew: Crew) -> bool:
    """Whether batches that are computed at once come out as one after another.

    A module that keeps something of its input between two calls may mix up threads. It does so with
    rows of any length, so the longest third is spared.
    """
    device = device_of(model)
    made = [make_batch([row], device) for row in _extremes(rows[len(rows) // 3 :])]
    one_by_one = [forward(model, batch, way) for batch in made]
    tried = [index % len(made) for index in range(2 * crew.workers)] if made else []
    at_once = [crew.submit(forward, model, made[index], way) for index in tried]
    found = [_outcome(result) for result in at_once]  # all of them: none may run into what comes next
    return all(
        logits is not None
        and logits.shape == one_by_one[index].shape
        and torch.allclose(logits, one_by_one[index], rtol=0, atol=1e-5, equal_nan=True)
        for index, logits in zip(tried, found, strict=True)
    )


def _outcome(result: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    try:
        return result()
    except _REFUSALS:
        return None


# What a module that knows nothing of masks, positions or selected places answers them with.
_REFUSALS = (
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    AssertionError,
    HarnessError,
)


# --- trying ------------------------------------------------------------------------------------------


def _extremes(rows: Sequence[Row]) -> list[Row]:
    """The largest row and one of middle size: a limit shows in the first."""
    if not rows:
        return []
    chosen = [rows[0], rows[len(rows) // 2]]
    return list({id(row): row for row in chosen}.values())


def _depth(row: Row) -> int:
    """The longest path of a row. A window of the attention shows there alone, and a row of many short
    branches is larger than one of few long ones."""
    return max(row.depths)


def _scored_share(rows: Sequence[Row]) -> float:
    return sum(len(row.scored_nodes) for row in rows) / sum(len(row.tokens) for row in rows)


def _difference(model: nn.Module, way: Way, rows: Sequence[Row], crew: Crew) -> str | None:
    """What is wrong with the way on these rows in one padded batch, or None.

    The measure is the root mean square difference of log-probabilities from plain calls on one branch
    at a time. A model has noise of its own (the sums of a padded batch are rounded in another order;
    activations are quantized to other levels), which is measured, where it matters, with the same
    sequences in plain batches.
    """
    device = device_of(model)
    branches = [branch for row in rows for branch in _branches(row)]
    plain = [(model, [branch], PLAIN, device) for branch, _ in branches]
    in_this_way, *one_by_one = crew.all(_log_probabilities, [(model, rows, way, device), *plain])
    places = [place for number, nodes in _numbered(rows) for place in _places(rows, number, nodes)]
    found, alone = in_this_way[places], torch.cat(one_by_one)
    error, allowed = _rms(found - alone), _BASE_ERROR.get(_dtype_of(model), _HALF_PRECISION_ERROR)
    if error <= allowed:
        return None
    chains = [branch for branch, _ in branches]
    batched = [chains[first : first + len(rows)] for first in range(0, len(chains), len(rows))]
    together = torch.cat(crew.all(_log_probabilities, [(model, each, PLAIN, device) for each in batched]))
    allowed = min(max(allowed, _NOISE_FACTOR * _rms(together - alone)), _LARGEST_ERROR)
    if error <= allowed:
        return None
    return f"with a mask the model's log-probabilities differ by {error:.2g} (allowed {allowed:.2g})"


def _numbered(rows: Sequence[Row]) -> Iterator[tuple[int, list[int]]]:
    for number, row in enumerate(rows):
        for _, nodes in _branches(row):
            yield number, nodes


def _branches(row: Row) -> list[tuple[Row, list[int]]]:
    """A few branches of a row as chains, the deepest among them, with their nodes in the row."""
    ends = [end - 1 for _, end, _ in row.segments]
    step = max(1, len(ends) // _PROBED_BRANCHES)
    chosen = ends[::step][: _PROBED_BRANCHES - 1] + ends[-1:]
    deepest = max(ends, key=lambda node: row.depths[node])
    if row.depths[deepest] > max(row.depths[node] for node in chosen):
        chosen.append(deepest)
    scored = set(row.scored_nodes)
    found = []
    for last in dict.fromkeys(chosen):
        nodes = _ancestors(row, last)
        branch = Row(
            tokens=[row.tokens[node] for node in nodes],
            depths=list(range(len(nodes))),
            segments=[(0, len(nodes), -1)],
            pairs=[(place, 0) for place, node in enumerate(nodes) if node in scored],
        )
        if branch.pairs:
            found.append((branch, [nodes[place] for place, _ in branch.pairs]))
    return found


def _ancestors(row: Row, node: int) -> list[int]:
    nodes: list[int] = []
    for first, end, parent in reversed(row.segments):
        if first <= node < end:
            nodes[:0] = range(first, node + 1)
            node = parent
    return nodes


def _places(rows: Sequence[Row], number: int, nodes: Sequence[int]) -> list[int]:
    """Where the logits of a row's nodes are among those of the batch."""
    before = sum(len(row.scored_nodes) for row in rows[:number])
    place = {node: index for index, node in enumerate(rows[number].scored_nodes)}
    return [before + place[node] for node in nodes]


def _log_probabilities(model: nn.Module, rows: Sequence[Row], way: Way, device: torch.device) -> torch.Tensor:
    logits = forward(model, make_batch(rows, device), way)
    return logits.float().log_softmax(-1)


def _rms(difference: torch.Tensor) -> float:
    return float(difference.double().square().mean().sqrt())


# --- the model ---------------------------------------------------------------------------------------


def _is_understood(model: nn.Module, way: Way) -> bool:
    """Whether the model's `forward` takes what the way needs, by its signature."""
    parameters = inspect.signature(model.forward).parameters
    wanted = [name for name, needed in (("use_cache", way.lean),) if needed]
    wanted += ["attention_mask", "position_ids"] if way.tree else []
    if not all(name in parameters for name in wanted):
        return False
    return (not way.select or head_of(model) is not None) and (not way.tail or last_ffn(model) is not None)


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where a token is seen and the smallest number elsewhere: what every attention understands."""
    additive = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return additive.masked_fill_(~mask, torch.finfo(dtype).min)


def _dtype_of(model: nn.Module) -> torch.dtype:
    """What the model computes in: its first floating-point tensor's type."""
    for tensor in chain(model.parameters(), model.buffers()):  # lazily: it is asked for every batch
        if tensor.is_floating_point() and tensor.dtype.itemsize >= 2:
            return tensor.dtype
    return torch.float32


def sent(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array on the device; on a GPU without waiting for what runs there."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
