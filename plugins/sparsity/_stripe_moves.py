"""All rearrangements of the columns of two or three stripes, and which groups of stripes share one."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

__all__ = ["Moves"]


@dataclass(frozen=True)
class Moves:
    """All rearrangements of a group of stripes, and all groups of a problem."""

    moves: torch.Tensor  # [moves, group columns]: the first changes nothing
    subsets: torch.Tensor  # [subsets, m]: the stripes that occur in any move
    members: torch.Tensor  # [moves, stripes of a group]: which subsets a move consists of
    groups: torch.Tensor  # [groups, group columns]: places in an order
    touching: torch.Tensor  # [groups, some]: the groups that share a stripe with one
    m: int

    @classmethod
    def of(
        cls, m: int, together: int, stripes: int, device: torch.device, *, swaps_only: bool = False
    ) -> Moves:
        """For problems of so many stripes, of which `together` are rearranged at once."""
        together = min(together, stripes)
        moves = _swaps(m) if swaps_only else _partitions(m, together)
        numbers: dict[tuple[int, ...], int] = {}
        members = [
            [numbers.setdefault(tuple(sorted(move[s : s + m])), len(numbers)) for s in range(0, len(move), m)]
            for move in moves
        ]
        chosen = torch.combinations(torch.arange(stripes), together)  # [groups, together]
        holds = torch.zeros(len(chosen), stripes).scatter_(1, chosen, 1.0)
        touching = (holds @ holds.t() > 0).nonzero()[:, 1].view(len(chosen), -1)
        places = (chosen[:, :, None] * m + torch.arange(m)).flatten(1)
        tensors = (torch.tensor(moves), torch.tensor(list(numbers)), torch.tensor(members), places, touching)
        return cls(*(tensor.to(device) for tensor in tensors), m=m)


def _swaps(m: int) -> list[list[int]]:
    moves = [list(range(2 * m))]
    for first, second in itertools.product(range(m), range(m, 2 * m)):
        move = list(range(2 * m))
        move[first], move[second] = second, first
        moves.append(move)
    return moves


def _partitions(m: int, stripes: int) -> list[list[int]]:
    """All ways to part ``stripes * m`` places into sets of m; the given one comes first."""

    def parted(left: tuple[int, ...]) -> list[list[int]]:
        if not left:
            return [[]]
        found = []
        for rest in itertools.combinations(left[1:], m - 1):  # the first is in the first set: each way once
            others = tuple(place for place in left[1:] if place not in rest)
            found += [[left[0], *rest, *tail] for tail in parted(others)]
        return found

    return parted(tuple(range(stripes * m)))
