"""``harness choose``: which of the measured methods to take, for one gain and at a bounded loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli.output import Format, print_rows, say
from harness.display import in_times

if TYPE_CHECKING:
    from harness.choosing import Candidate, Choice, Goal, Loss
    from harness.comparing import Compared

__all__ = ["choose", "parse_goal", "print_choices"]

_COLUMNS = ["model", "shape", "", "method", "gain", "loses", "why"]


def choose(
    goal: Annotated[
        str, typer.Option("--for", help="decode, prefill, end-to-end, weights, memory or energy.")
    ] = "decode",
    lose: Annotated[
        str,
        typer.Option(
            help="The most that a task's score may lose: 0.01 or 1% of a score between 0 and 1, and as many "
            "nats a token (0.01 is 1 % of perplexity)."
        ),
    ] = "1%",
    tasks: Annotated[str | None, typer.Option(help="Only what is lost in these tasks counts.")] = None,
    models: Annotated[str | None, typer.Option("--models", "--model", help="Only these models.")] = None,
    shapes: Annotated[
        str | None, typer.Option("--at", help="Only these shapes, such as b1-p512-g64.")
    ] = None,
    output: Annotated[Format, typer.Option("--format", help="table, json, csv or markdown.")] = Format.TABLE,
    db: Annotated[str | None, typer.Option(help="The results store (or HARNESS_DB).")] = None,
) -> int:
    """Choose a method from what was measured: the most of one gain at a bounded loss, and why.

    For each model and shape the method with the largest gain over the baseline whose losses are within the
    bound, by their intervals, and those that cannot be told apart from it. A method whose loss may or may
    not be within it is not taken: more items would show (`harness sweep --limit`).
    """
    from harness.chain import split_list
    from harness.cli.sweep import database

    what, most = parse_goal(goal, lose)
    only = split_list(models) if models else None
    print_choices(database(db), what, most, lose, only, tasks=tasks, shapes=shapes, output=output)
    return 0


def parse_goal(goal: str, lose: str) -> tuple[Goal, float]:
    """What `--for` and `--lose` ask for.

    Raises:
        UnknownName: no such goal.
        ConfigError: no such limit.
    """
    from harness.choosing import GOALS, parse_limit
    from harness.errors import UnknownName

    if goal not in GOALS:
        raise UnknownName("goal", goal, GOALS)
    return GOALS[goal], parse_limit(lose)


def print_choices(
    where: str,
    goal: Goal,
    most: float,
    lose: str,
    models: Sequence[str] | None,
    *,
    tasks: str | None = None,
    shapes: str | None = None,
    output: Format = Format.TABLE,
) -> None:
    """Choose from the store at `where`, and print the answer with what it rests on.

    Args:
        most, lose: how much may be lost, as a number and as it was written.

    Raises:
        ConfigError: nothing to choose from.
    """
    from harness.choosing import choices
    from harness.errors import ConfigError

    found, whys = _measured(where, models, goal)
    wanted_tasks = _known(
        tasks, {row.cell for row in found.rows if row.kind == "task"}, "task in this store:"
    )
    wanted_shapes = _known(
        shapes, {r.cell for r in found.rows if r.kind == "scenario"}, "shape in this store:"
    )
    made = choices(found.rows, goal, most, tasks=wanted_tasks, shapes=wanted_shapes, whys=whys)
    refused = [row for row in found.rows if not row.is_comparable]
    if not made:
        why = f"; {len(refused)} rows were measured under other conditions" if refused else ""
        raise ConfigError(f"no method's {goal.metric} was compared with the baseline's{why}")
    if output is Format.JSON:
        print_rows([asdict(each) for each in made], (), output)
    else:
        # What all choices have in common need not be said to people.
        telling = [name for name in ("device", "dtype") if len({getattr(each, name) for each in made}) > 1]
        rows = [row for each in made for row in _rows(each, goal)]
        print_rows(rows, [*_COLUMNS[:2], *telling, *_COLUMNS[2:]], output)
    is_of_types = len({each.dtype for each in made}) > 1
    for each in made:
        say(_sentence(each, goal, lose, says_dtype=is_of_types), err=output is not Format.TABLE)
    if refused:
        say(f"{len(refused)} rows of other conditions than the baseline's do not count", err=True)


def _measured(where: str, models: Sequence[str] | None, goal: Goal) -> tuple[Compared, dict[Any, str]]:
    """Every method against the baseline, and why each has what it has of the goal."""
    from dataclasses import replace

    from harness.choosing import reason
    from harness.comparing import Stores, compare_sides, load_side, other_methods, parse_side
    from harness.errors import ConfigError, UnknownName
    from harness.why import explanations

    baseline = parse_side("baseline")
    with Stores(where) as stores:
        if models is not None:
            known = {cell.model for cell in load_side(replace(baseline, method=None), stores).cells}
            if unknown := [name for name in models if name not in known]:
                raise UnknownName("model in this store:", unknown[0], known)
        methods = other_methods(baseline, stores, models)
        if not methods:
            raise ConfigError("nothing was measured beside the baseline: sweep some methods first")
        first, *others = (load_side(name, stores, models) for name in (baseline, *methods))
        found = compare_sides(first, others)
        # Verdicts are of timed cells, and weights can be weighed without any.
        is_timed = any(row.kind == "scenario" for row in found.rows)
        told = explanations(stores.of(baseline), models=models) if is_timed else []
    whys: dict[Any, str] = {}
    for each in told:
        why = reason(goal, each.verdict or "", each.records)
        for cell in (each.scenario, "transform"):  # what is stored is the same in all shapes
            # Of several measurements the newest comes last, and is what is compared.
            whys[each.model, each.method, each.seed, cell, each.dtype, each.device] = why
    return found, whys


def _known(text: str | None, known: set[str], kind: str) -> list[str] | None:
    from harness.chain import split_list
    from harness.errors import ConfigError, UnknownName

    if text is None:
        return None
    if not (names := split_list(text)):  # an unset variable of the shell must not leave everything out
        raise ConfigError(f"an option names no {kind.partition(' ')[0]}; leave it out for all of them")
    for name in names:
        if name not in known:
            raise UnknownName(kind, name, known)
    return names


# --- words --------------------------------------------------------------------------------------------


def _rows(choice: Choice, goal: Goal) -> list[dict[str, Any]]:
    marks = {id(choice.taken): "take", **{id(each): "as good" for each in choice.equal}}
    return [
        {
            "model": choice.model,
            "shape": choice.shape,
            "device": choice.device,
            "dtype": choice.dtype,
            "": marks.get(id(each)) or _refusal(each),
            "method": _name(each, choice),
            "gain": _gain(each, goal),
            "loses": "; ".join([*map(_loss, each.losses), *(f"{task} unknown" for task in each.unscored)]),
            "why": each.why,
        }
        for each in choice.candidates
    ]


def _refusal(candidate: Candidate) -> str:
    from harness.choosing import Standing

    if candidate.standing is Standing.BEYOND:
        return "loses too much"
    if candidate.standing is Standing.OPEN:
        if candidate.unscored and candidate.losses:
            return f"no score in {', '.join(candidate.unscored)}"
        return "loss not clear" if candidate.losses else "no score"
    return "less gain" if candidate.gains else "no gain"


def _name(candidate: Candidate, choice: Choice) -> str:
    is_alone = sum(each.method == candidate.method for each in choice.candidates) == 1
    return candidate.method if is_alone else f"{candidate.method} (seed {candidate.seed})"


def _gain(candidate: Candidate, goal: Goal) -> str:
    gain, lower, upper = candidate.gain, candidate.lower, candidate.upper
    if lower == upper:
        return f"{in_times(gain)}x {goal.more if gain >= 1 else goal.less}"
    word = goal.more if lower > 1 else goal.less if upper < 1 else "as before"
    return f"{in_times(gain)}x [{in_times(lower)}, {in_times(upper)}] {word}"


def _loss(loss: Loss) -> str:
    scale, unit = (100, "points") if loss.unit == "fraction" else (1, loss.unit)
    value, lower, upper = (each * scale for each in (loss.value, loss.lower, loss.upper))
    return f"{loss.task} {value:+.3g} [{lower:+.3g}, {upper:+.3g}] {unit}".rstrip()


def _sentence(choice: Choice, goal: Goal, lose: str, *, says_dtype: bool) -> str:
    where = f"{choice.model}{f' at {choice.shape}' if choice.shape else ''} on {choice.device}"
    if says_dtype:
        where += f" in {choice.dtype}"
    taken = choice.taken
    if taken is None:
        best = max(choice.candidates, key=lambda each: each.gain)
        rest = (
            f"; {_name(best, choice)} would be {_gain(best, goal)}, but {_refusal(best)}"
            if best.gains
            else ""
        )
        why = f" Why: {best.why}" if best.why else ""
        return f"{where}: keep the baseline: no method is {goal.more} at a loss of at most {lose}{rest}.{why}"
    lost = f", which loses {'; '.join(map(_loss, taken.losses))}" if taken.losses else ""
    unjudged = "" if taken.losses else "; what is lost was not measured"
    others = f" As good: {', '.join(_name(each, choice) for each in choice.equal)}." if choice.equal else ""
    ahead = [e for e in choice.candidates if e.gain > taken.gain and e not in (taken, *choice.equal)]
    better = "".join(f" {_name(e, choice)} is {_gain(e, goal)}, but {_refusal(e)}." for e in ahead[:1])
    why = f" Why: {taken.why}" if taken.why else ""
    name = _name(taken, choice)
    return f"{where}: take {name}: {goal.what} {_gain(taken, goal)}{lost}{unjudged}.{others}{better}{why}"
