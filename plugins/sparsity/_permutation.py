"""Searching an order of columns in which N:M pruning keeps more magnitude.

Columns are cut into stripes of m, one group of every row each. What a stripe keeps depends only on which
columns it has, so an order is a partition into stripes. Both searches are greedy over groups of stripes: all
rearrangements of a group are tried, the best group of all is rearranged, and what it touched is tried again.
They differ in what they try: exchanging two columns of two stripes (channel-swap), or every partition of two
or three stripes (stripe-groups). At a minimum two random columns change places (a bounded regression) and the
search goes on; it returns the best order that it saw.

Many problems of the same size are searched at once.

Source: Pool, Yu 2021, "Channel Permutations for N:M Sparsity" (NeurIPS 2021), sections 3 and 4.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from harness import ConfigError

from ._stripe_moves import Moves

__all__ = ["Search", "bound", "groups_for", "kept_magnitude", "search_order"]

_MOST_STRIPES = {2: 64, 3: 20}  # searched together, by the stripes of a group
_MOST_PARTITIONS = 6435  # of two stripes of 8
_CHUNK = {"cpu": 1 << 23, "cuda": 1 << 26}  # elements of a temporary
_NO_GAIN = 1e-6  # of what is kept: rounding


@dataclass(frozen=True)
class Search:
    """How to search.

    Args:
        n, m: what is pruned.
        strategy: ``stripe-groups``, ``channel-swap`` or ``random``.
        group_stripes: stripes that are rearranged together: 2, or 3 for stripe-groups.
        escapes: bounded regressions; for ``random`` the orders that are tried.
        deadline: when to stop, as of `time.monotonic`; None: when done.
    """

    n: int
    m: int
    strategy: str = "stripe-groups"
    group_stripes: int = 2
    escapes: int = 100
    deadline: float | None = None

    @property
    def is_over(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline


def groups_for(strategy: str, m: int, columns: int) -> int:
    """The stripes in a group of so many columns.

    Raises:
        ConfigError: the columns are not two or three stripes, or have too many partitions to try all.
    """
    stripes = 2 if strategy != "stripe-groups" else columns // m
    if strategy == "stripe-groups":
        if columns % m or stripes not in _MOST_STRIPES:
            raise ConfigError(f"group_cols must be {2 * m} or {3 * m} for groups of m={m}, not {columns}")
        count = math.factorial(columns) // (math.factorial(m) ** stripes * math.factorial(stripes))
        if count > _MOST_PARTITIONS:
            raise ConfigError(
                f"{columns} columns have {count:,} partitions into groups of m={m}: too many to try them "
                "all; use strategy=channel-swap"
            )
    return stripes


def kept_magnitude(magnitudes: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """What N:M pruning keeps of magnitudes [..., rows, columns], float64 [...]."""
    groups = magnitudes.unflatten(-1, (-1, m))
    return groups.topk(n, dim=-1).values.sum((-1, -2, -3), dtype=torch.float64)


def bound(magnitudes: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """What could be kept if any n of m weights of a whole row might stay: no order keeps more."""
    kept = magnitudes.shape[-1] * n // m
    return magnitudes.topk(kept, dim=-1).values.sum((-1, -2), dtype=torch.float64)


def search_order(magnitudes: torch.Tensor, search: Search, generator: torch.Generator) -> torch.Tensor:
    """An order of columns, int64 [problems, columns], that never keeps less than the given one.

    Args:
        magnitudes: not negative, [problems, rows, columns].

    Where a problem has more stripes than are searched together, blocks of them are, first neighbours and
    then stripes from all over.
    """
    count, _, columns = magnitudes.shape
    stripes = columns // search.m
    x = magnitudes.float().transpose(1, 2).contiguous()  # [problems, columns, rows]
    start = torch.arange(columns, device=x.device).expand(count, -1).clone()
    if stripes < 2:
        return start
    if search.strategy == "random":
        return _best_random(x, search, generator, start)
    most = _MOST_STRIPES[search.group_stripes]
    if stripes <= most:
        return _searched(x, start, search, generator)
    blocks = -(-stripes // most)
    near = torch.arange(stripes, device=x.device)
    far = torch.cat([near[first::blocks] for first in range(blocks)])
    order = start
    for arrangement in (near, far):
        order = order.view(count, stripes, search.m)[:, arrangement].reshape(count, columns)
        parts = order.split(most * search.m, 1)
        whole = [part for part in parts if part.shape[1] == parts[0].shape[1]]
        # Blocks of the same size are problems beside each other.
        together = torch.cat(whole)
        owners = torch.arange(count, device=x.device).repeat(len(whole))
        done = list(_searched(x, together, search, generator, owners).split(count))
        if len(whole) < len(parts):
            done.append(_searched(x, parts[-1], search, generator))
        order = torch.cat(done, 1)
    return order


def _best_random(
    x: torch.Tensor, search: Search, generator: torch.Generator, order: torch.Tensor
) -> torch.Tensor:
    best, kept = order, _kept(x, order, search)
    for _ in range(search.escapes):
        if search.is_over:
            break
        drawn = torch.rand(order.shape, generator=generator).argsort(1).to(x.device)
        found = _kept(x, drawn, search)
        best = torch.where((found > kept)[:, None], drawn, best)
        kept = torch.maximum(found, kept)
    return best


def _kept(
    x: torch.Tensor, order: torch.Tensor, search: Search, owners: torch.Tensor | None = None
) -> torch.Tensor:
    owners = torch.arange(len(order), device=x.device) if owners is None else owners
    return kept_magnitude(x[owners[:, None], order].transpose(1, 2), search.n, search.m)


# --- greedy search ------------------------------------------------------------------------------------


@dataclass
class _State:
    """Orders [problems, columns], and for every group of stripes its best move and what that gains."""

    order: torch.Tensor
    gains: torch.Tensor  # [problems, groups]
    moves: torch.Tensor  # [problems, groups]

    def chosen(self, others: _State, take: torch.Tensor) -> _State:
        """Problem by problem the one or the other."""
        where = take[:, None]
        return _State(
            torch.where(where, others.order, self.order),
            torch.where(where, others.gains, self.gains),
            torch.where(where, others.moves, self.moves),
        )

    def copy(self) -> _State:
        return _State(self.order.clone(), self.gains.clone(), self.moves.clone())


def _searched(
    x: torch.Tensor,
    order: torch.Tensor,
    search: Search,
    generator: torch.Generator,
    owners: torch.Tensor | None = None,
) -> torch.Tensor:
    """The best order seen from `order` [problems, some columns] on; problem i is of ``x[owners[i]]``."""
    problems, columns = order.shape
    owners = torch.arange(problems, device=x.device) if owners is None else owners
    if columns < 2 * search.m:
        return order
    swaps = search.strategy == "channel-swap"
    known = Moves.of(search.m, search.group_stripes, columns // search.m, x.device, swaps_only=swaps)
    groups = len(known.groups)
    state = _State(order.clone(), x.new_zeros(problems, groups), order.new_zeros(problems, groups))
    everything = torch.arange(groups, device=x.device).expand(problems, -1)
    _try(x, state, known, search, owners, torch.arange(problems, device=x.device), everything)
    _descend(x, state, known, search, owners)
    best, kept = state, _kept(x, state.order, search, owners)
    for _ in range(search.escapes):
        if search.is_over:
            break
        state = best.copy()
        _regress(x, state, known, search, owners, generator)
        _descend(x, state, known, search, owners)
        found = _kept(x, state.order, search, owners)
        best = best.chosen(state, found > kept)
        kept = torch.maximum(found, kept)
    return best.order


def _descend(x: torch.Tensor, state: _State, known: Moves, search: Search, owners: torch.Tensor) -> None:
    """Apply the best move of each problem until none gains."""
    least = _NO_GAIN * x.sum((1, 2))[owners]
    while not search.is_over:
        gain, group = state.gains.max(1)
        active = (gain > least).nonzero().squeeze(1)
        if not len(active):
            return
        group = group[active]
        places = known.groups[group]
        move = known.moves[state.moves[active, group]]
        old = state.order[active[:, None], places]
        state.order[active[:, None], places] = old.gather(1, move)
        _try(x, state, known, search, owners, active, known.touching[group])


def _regress(
    x: torch.Tensor,
    state: _State,
    known: Moves,
    search: Search,
    owners: torch.Tensor,
    generator: torch.Generator,
) -> None:
    """Exchange two random columns of different stripes in each problem."""
    problems, device = len(state.order), x.device
    group = torch.randint(len(known.groups), (problems,), generator=generator).to(device)
    first, second = torch.randint(search.m, (2, problems), generator=generator).to(device)
    rows = torch.arange(problems, device=device)
    here, there = known.groups[group, first], known.groups[group, search.m + second]
    one, other = state.order[rows, here], state.order[rows, there]
    state.order[rows, here], state.order[rows, there] = other, one
    _try(x, state, known, search, owners, rows, known.touching[group])


def _try(
    x: torch.Tensor,
    state: _State,
    known: Moves,
    search: Search,
    owners: torch.Tensor,
    problems: torch.Tensor,
    groups: torch.Tensor,
) -> None:
    """Find the best move of some groups [len(problems), some] of some problems anew."""
    problem = problems[:, None].expand_as(groups).flatten()
    group = groups.flatten()
    at_once = max(1, _CHUNK.get(x.device.type, 1 << 23) // (len(known.subsets) * known.m * x.shape[2]))
    for some, part in zip(problem.split(at_once), group.split(at_once), strict=True):
        columns = state.order[some[:, None], known.groups[part]]
        values = x[owners[some][:, None], columns]  # [some, group columns, rows]
        kept = _kept_by_subsets(values, known.subsets, search.n)  # [some, subsets]
        totals = kept[:, known.members].sum(2)  # [some, moves]
        best, move = totals.max(1)
        state.gains[some, part] = best - totals[:, 0]
        state.moves[some, part] = move


def _kept_by_subsets(values: torch.Tensor, subsets: torch.Tensor, n: int) -> torch.Tensor:
    """The sum over rows of the n largest of each subset of columns: [some, subsets].

    Args:
        values: [some, columns, rows]. subsets: [subsets, m].
    """
    parts = [values[:, places] for places in subsets.t()]  # m times [some, subsets, rows]
    if n == 2 and len(parts) == 4:
        a, b, c, d = parts
        high, low = torch.maximum(a, b), torch.minimum(a, b)
        other_high, other_low = torch.maximum(c, d), torch.minimum(c, d)
        second = torch.maximum(torch.minimum(high, other_high), torch.maximum(low, other_low))
        return (torch.maximum(high, other_high) + second).sum(2)
    return torch.stack(parts).topk(n, dim=0).values.sum((0, 3))
