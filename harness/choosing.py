"""Which method to take: the most of one gain among those that lose no more than is allowed. Pure.

A loss is judged by its interval, never by its value alone: a method is *within* what is allowed where even
the worse end of each of its losses is, *beyond* it where the better end of one is not, and *open* in between,
where more items would be needed. A method is only taken for a gain whose interval lies on one side of none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from harness.comparing.comparison import Comparison
from harness.errors import ConfigError
from harness.evaluate.metrics import metric_of

__all__ = ["GOALS", "Candidate", "Choice", "Goal", "Loss", "Standing", "choices", "parse_limit", "reason"]


@dataclass(frozen=True, slots=True)
class Goal:
    """A metric of which less is better.

    Args:
        more, less: what a variant is that has less of it, or more.
        about: how the sentences of a verdict begin that are about it.
        reasons: records that say where a gain comes from, in words with a place for the value.
    """

    metric: str
    what: str
    more: str
    less: str
    about: tuple[str, ...]
    reasons: Mapping[str, str]

    @property
    def is_of_shapes(self) -> bool:
        """Whether it is known for each timed shape, not for a variant as such."""
        return self.metric != "weight_bytes"


_READ = {"compression_ratio": "weights {:.3g}x smaller", "decode_mbu": "{:.0%} of the memory's ceiling"}
_COMPUTED = {"prefill_mfu": "{:.0%} of the arithmetic's ceiling"}
_STORED = {"stored_bits_per_weight": "{:.3g} bits a weight"}

GOALS: Mapping[str, Goal] = {
    "decode": Goal("decode_latency", "decoding", "faster", "slower", ("Decode",), _READ),
    "prefill": Goal("prefill_latency", "the prefill", "faster", "slower", ("Prefill",), _COMPUTED),
    "end-to-end": Goal(
        "end_to_end_latency",
        "prompt and answer",
        "faster",
        "slower",
        ("Prefill", "Decode"),
        _COMPUTED | _READ,
    ),
    "weights": Goal("weight_bytes", "the weights", "smaller", "larger", ("The weights",), _STORED),
    "memory": Goal("decode_peak_bytes", "decoding's memory", "smaller", "larger", ("The weights",), _STORED),
    "energy": Goal("decode_energy", "decoding's energy", "less", "more", ("Decode",), _READ),
}
"""What a method can be chosen for."""

_LED_BY = (
    "nll", "acc_norm", "acc", "exact_match", "f1", "mcc", "spearman", "pearson", "bleu", "chrf", "cosine",
)  # fmt: skip
"""Of several scores of a task the first is judged."""
_NOT_SCORES = frozenset({"mean_kl", "choice_kl", "top1_agreement", "flips", "embedding_distance"})


class Standing(StrEnum):
    """Whether a method's losses are within what is allowed."""

    WITHIN = "within"
    OPEN = "open"
    BEYOND = "beyond"
    UNJUDGED = "unjudged"


@dataclass(frozen=True, slots=True)
class Loss:
    """What a method loses of a task's score against the baseline, in `unit`; more than 0 is a loss."""

    task: str
    metric: str
    unit: str
    value: float
    lower: float
    upper: float

    def standing(self, most: float) -> Standing:
        """Where it stands to the largest loss that is allowed, in fractions of a score or nats."""
        if self.upper <= most * self._one:
            return Standing.WITHIN
        return Standing.BEYOND if self.lower > most * self._one else Standing.OPEN

    @property
    def worst(self) -> float:
        """The worse end, in fractions of a score or nats."""
        return self.upper / self._one

    @property
    def _one(self) -> float:
        """A whole score, or a nat, in `unit`."""
        return 100.0 if self.unit == "points" else 1.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A method in one shape: how many times better than the baseline it is in the goal, and its losses.

    `lower` and `upper` are equal to `gain` for what is counted and not timed. `why` is as of `reason`.
    `unscored` are tasks in which other methods of the model have a loss and this one has none, because it
    failed there or was not asked.
    """

    method: str
    seed: int
    gain: float
    lower: float
    upper: float
    losses: tuple[Loss, ...]
    standing: Standing
    why: str = ""
    unscored: tuple[str, ...] = ()

    @property
    def gains(self) -> bool:
        """Whether it is better than the baseline, by its interval."""
        return self.lower > 1

    @property
    def worst(self) -> float:
        """The worse end of its worst loss; 0 where none was measured."""
        return max((loss.worst for loss in self.losses), default=0.0)

    def equals(self, other: Candidate) -> bool:
        """Whether the gains of two cannot be told apart."""
        return self.lower <= other.upper and self.upper >= other.lower


@dataclass(frozen=True, slots=True)
class Choice:
    """What to take for one model in one shape: `taken`, or the baseline where that is None.

    `equal` are as good as what is taken; `candidates` are all, the best first.
    """

    model: str
    shape: str
    device: str
    dtype: str
    taken: Candidate | None
    equal: tuple[Candidate, ...]
    candidates: tuple[Candidate, ...]


def parse_limit(text: str) -> float:
    """The largest loss that is allowed, as a number of one or in per cent.

    Raises:
        ConfigError: no such number.

    >>> parse_limit("0.01"), parse_limit("2.5%")
    (0.01, 0.025)
    """
    stripped = text.strip()
    try:
        value = float(stripped.removesuffix("%")) / (100 if stripped.endswith("%") else 1)
    except ValueError:
        value = float("nan")
    if not 0 <= value < float("inf"):
        raise ConfigError(f"--lose {text!r}: write how much may be lost, such as 0.01 or 1%")
    return value


def reason(goal: Goal, verdict: str, records: Mapping[str, Mapping[str, Any]]) -> str:
    """Why a variant has what it has of a goal: where its gain comes from, and what its verdict says of it.

    Args:
        records: by metric, each with its ``value``, as of `harness.why.Explanation`.
    """
    known = {name: record["value"] for name, record in records.items() if record["value"] is not None}
    found = [words.format(known[name]) for name, words in goal.reasons.items() if name in known]
    sentences = re.split(r"(?<=\.) (?=(?:Prefill|Decode|The weights) )", verdict)
    told = [each for each in sentences if each.startswith(goal.about)]
    return " ".join([*([", ".join(found) + "."] if found else []), *told])


def choices(
    rows: Iterable[Comparison],
    goal: Goal,
    most: float,
    *,
    tasks: Sequence[str] | None = None,
    shapes: Sequence[str] | None = None,
    whys: Mapping[tuple[str, str, int, str, str, str], str] | None = None,
) -> list[Choice]:
    """A choice for every model and shape in which the goal was measured.

    Args:
        rows: of methods against the baseline; those that are not comparable are passed over.
        most: the largest loss of any task, in fractions of a score or nats a token.
        tasks: only these count as losses.
        whys: reasons by model, method, seed, cell, dtype and device.
    """
    kept = [row for row in rows if row.is_comparable]
    losses = _losses(kept, tasks)
    judged = {key[0] for key in losses}
    asked: dict[tuple[str, str, str], dict[str, None]] = {}
    for (model, _, _, dtype, device), of_tasks in losses.items():
        asked.setdefault((model, dtype, device), {}).update(dict.fromkeys(of_tasks))
    found: dict[tuple[str, str, str, str], list[Candidate]] = {}
    for row in kept:
        if row.metric != goal.metric or not row.ratio or (shapes is not None and row.cell not in shapes):
            continue
        of_tasks = losses.get((row.model, row.method_b, row.seed, row.dtype, row.device), {})
        own = tuple(of_tasks.values())
        unscored = tuple(
            task for task in asked.get((row.model, row.dtype, row.device), ()) if task not in of_tasks
        )
        shape = row.cell if row.kind == "scenario" else ""
        lower, upper = (row.ratio if each is None else each for each in (row.lower, row.upper))
        candidate = Candidate(
            method=row.method_b,
            seed=row.seed,
            gain=1 / row.ratio,
            lower=1 / upper,
            upper=1 / lower,
            losses=own,
            standing=_standing(own, most, is_judged=row.model in judged, is_whole=not unscored),
            why=(whys or {}).get((row.model, row.method_b, row.seed, row.cell, row.dtype, row.device), ""),
            unscored=unscored,
        )
        found.setdefault((row.model, shape, row.device, row.dtype), []).append(candidate)
    return [_choice(*key, candidates) for key, candidates in found.items()]


def _choice(model: str, shape: str, device: str, dtype: str, candidates: Sequence[Candidate]) -> Choice:
    order = (Standing.WITHIN, Standing.UNJUDGED, Standing.OPEN, Standing.BEYOND)
    ranked = sorted(candidates, key=lambda each: (order.index(each.standing), -each.gain))
    eligible = [
        each for each in ranked if each.standing in (Standing.WITHIN, Standing.UNJUDGED) and each.gains
    ]
    # Of those that cannot be told apart from the best gain, the one that loses least.
    best = [each for each in eligible if each.equals(eligible[0])]
    taken = min(best, key=lambda each: (each.worst, -each.gain), default=None)
    equal = tuple(each for each in best if each is not taken)
    return Choice(model, shape, device, dtype, taken, equal, tuple(ranked))


def _standing(losses: Sequence[Loss], most: float, *, is_judged: bool, is_whole: bool) -> Standing:
    """The worst of all losses. One that other methods of the model have and this one has not is open."""
    if not losses:
        return Standing.OPEN if is_judged else Standing.UNJUDGED
    found = [loss.standing(most) for loss in losses]
    if not is_whole:
        found.append(Standing.OPEN)
    return next(each for each in (Standing.BEYOND, Standing.OPEN, Standing.WITHIN) if each in found)


_Key = tuple[str, str, int, str, str]


def _losses(rows: Sequence[Comparison], tasks: Sequence[str] | None) -> dict[_Key, dict[str, Loss]]:
    """The losses of each variant by task: of several scores of a task the one that leads it."""
    found: dict[_Key, dict[str, Loss]] = {}
    ranks: dict[tuple[_Key, str], int] = {}
    for row in rows:
        rank = _rank(row)
        if rank is None or (tasks is not None and row.cell not in tasks):
            continue
        key = (row.model, row.method_b, row.seed, row.dtype, row.device)
        if rank >= ranks.get((key, row.cell), len(_LED_BY) + 2):
            continue
        ranks[key, row.cell] = rank
        assert row.difference is not None and row.lower is not None and row.upper is not None  # noqa: PT018
        sign = 1 if metric_of(row.metric).better == "lower" else -1
        lower, upper = sorted((sign * row.lower, sign * row.upper))
        found.setdefault(key, {})[row.cell] = Loss(
            row.cell, row.metric, row.unit, sign * row.difference, lower, upper
        )
    return found


def _rank(row: Comparison) -> int | None:
    """How early a score leads its task; None for what is no score, or has no interval."""
    name = row.metric.partition("/")[0].partition(",")[0]
    if row.kind != "task" or row.difference is None or row.lower is None or row.upper is None:
        return None
    if name in _NOT_SCORES or "/" in row.metric:
        return None
    return _LED_BY.index(name) if name in _LED_BY else len(_LED_BY) + (name.startswith("acc_"))
