"""What a report holds, from the rows of a store. The renderers (`markdown`, `page`) add nothing to it."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from harness.cli.output import clean
from harness.cli.summary import VariantTable, names_of, variant_table
from harness.display import LEADING, better
from harness.errors import ConfigError
from harness.evaluate.definitions import Score, definitions
from harness.pareto import on_front
from harness.privacy import in_texts, without_identity

if TYPE_CHECKING:
    from harness.comparability import Conditions
    from harness.store.store import Store

__all__ = ["Front", "Machine", "Point", "Report", "make_report"]

_COSTS = ("weight_bytes", "decode_latency", "prefill_latency")
_QUALITIES = tuple(
    name for name in LEADING if name in ("token_perplexity", "bits_per_byte", "acc", "acc_norm", "spearman")
)
_FACTS = (
    "time_utc", "device_name", "device", "gpu", "cpu", "cpus_usable", "torch_threads", "ram_bytes", "os",
    "python", "versions", "cuda", "environment", "measuring_version", "workload", "ceilings", "git",
)  # fmt: skip

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """A variant in a figure; bounds are None where a value was counted.

    `name` is the method with what tells it from others of the figure, and *simulated* where it is.
    """

    method: str
    name: str
    family: str
    x: float
    y: float
    x_bounds: tuple[float, float] | None
    y_bounds: tuple[float, float] | None
    hollow: bool
    on_front: bool


@dataclass(frozen=True)
class Front:
    """Quality against cost of one model on one device, at least two variants."""

    model: str
    device: str
    x: str
    x_unit: str
    x_better: str
    y: str
    y_unit: str
    y_better: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Machine:
    """Where a sweep ran: its number, its command, and the facts of its manifest."""

    sweep: int
    command: str
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Report:
    """Everything that is shown, in order. `verdicts` are (model, method, shape, words)."""

    made_at: str
    version: str
    table: VariantTable
    fronts: tuple[Front, ...]
    verdicts: tuple[tuple[str, str, str, str], ...]
    problems: tuple[tuple[str, str, str, str, str], ...]
    machines: tuple[Machine, ...]


def make_report(
    store: Store,
    *,
    sweep: int | Literal["last"] | None = None,
    models: Iterable[str] | None = None,
    methods: Iterable[str] | None = None,
    tasks: Iterable[str] | None = None,
) -> Report:
    """Collect what is stored; host names, paths and passwords stay behind.

    Raises:
        ConfigError: nothing is stored there.
        UnknownName: no such sweep.
    """
    import harness
    from harness.cli.results import conditions_by_cell, rows_of
    from harness.store import queries

    rows = rows_of(queries.results(store, sweep=sweep, models=models, methods=methods))
    if tasks is not None:
        wanted = set(tasks)
        rows = [row for row in rows if row["task"] is None or row["task"] in wanted]
    if not rows:
        raise ConfigError("nothing is stored there that a report could show; run: harness sweep")
    conditions = conditions_by_cell(store, rows)
    return Report(
        made_at=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=harness.__version__,
        table=variant_table(rows, conditions),
        fronts=tuple(_fronts(rows, conditions)),
        verdicts=tuple(_verdicts(rows)),
        problems=tuple(_problems(rows)),
        machines=tuple(_machines(queries.sweeps(store), {row["sweep"] for row in rows})),
    )


# --- figures ------------------------------------------------------------------------------------------


def _fronts(rows: Sequence[Row], conditions: Mapping[int, Conditions]) -> list[Front]:
    """For each model and device every task's main score against weights and times of the first shape.

    Scores that mean different things, as those of the first few items, are in different figures.
    """
    fronts = []
    scores = [Score(row["task"], row["metric"], row["note"], conditions[row["cell"]].limit) for row in rows]
    meanings = {id(row): text for row, text in zip(rows, definitions(scores), strict=True)}
    for model, device in dict.fromkeys((row["model"], row["device_name"]) for row in rows):
        here = [row for row in rows if (row["model"], row["device_name"]) == (model, device)]
        measured = [row for row in here if row["metric"] is not None and row["value"] is not None]
        costs = [row for row in measured if row["kind"] != "task"]
        for task in sorted({row["task"] for row in measured if row["task"]}):
            of_task = [row for row in measured if row["task"] == task]
            main = _first({row["metric"]: row for row in of_task}, _QUALITIES)
            if main is None:
                continue
            scored = [row for row in of_task if row["metric"] == main["metric"]]
            for meaning in sorted({meanings[id(row)] for row in scored}):
                qualities = [row for row in scored if meanings[id(row)] == meaning]
                for cost in _costs(costs):
                    front = _front(model, device, [*costs, *qualities], cost, qualities[-1], meaning)
                    if front is not None:
                        fronts.append(front)
    return fronts


def _first(found: Mapping[str, Row], names: Sequence[str]) -> Row | None:
    return next((found[name] for name in names if name in found), None)


def _costs(rows: Sequence[Row]) -> list[Row]:
    """A row for each kind of cost: of the transform, or of the shape that was timed first."""
    found: dict[str, Row] = {}
    for row in rows:
        if row["kind"] != "task" and (row["metric"] != "weight_bytes" or row["kind"] == "transform"):
            found.setdefault(row["metric"], row)
    return [found[name] for name in _COSTS if name in found]


def _front(
    model: str, device: str, rows: Sequence[Row], cost: Row, quality: Row, meaning: str
) -> Front | None:
    sides = [_by_variant(rows, cost), _by_variant(rows, quality)]
    variants = [variant for variant in sides[0] if variant in sides[1]]
    directions = [better(row["metric"], row["unit"] or "", row["kind"]) for row in (cost, quality)]
    if len(variants) < 2 or None in directions:
        return None
    x_better, y_better = (str(each) for each in directions)
    pairs = [(sides[0][variant], sides[1][variant]) for variant in variants]
    best = on_front([(x["value"], y["value"]) for x, y in pairs], x_better, y_better)
    names = names_of(x for x, _ in pairs)
    points = [
        Point(
            method=clean(x["method"]),
            name=clean(names[x["variant"]]),
            family=x["family"],
            x=x["value"],
            y=y["value"],
            x_bounds=_bounds(x),
            y_bounds=_bounds(y),
            hollow=bool(x["simulated"] or x["synthetic"]),
            on_front=is_best,
        )
        for (x, y), is_best in zip(pairs, best, strict=True)
    ]
    return Front(
        model=clean(model),
        device=clean(device),
        x=_named(cost),
        x_unit=cost["unit"] or "",
        x_better=x_better,
        y=clean(f"{_named(quality)} ({meaning})") if meaning else _named(quality),
        y_unit=quality["unit"] or "",
        y_better=y_better,
        points=tuple(points),
    )


def _by_variant(rows: Sequence[Row], like: Row) -> dict[int, Row]:
    """The newest row of each variant that is the same metric at the same place."""
    same = [row for row in rows if all(row[name] == like[name] for name in ("metric", "task", "scenario"))]
    return {row["variant"]: row for row in sorted(same, key=lambda row: row["cell"])}


def _bounds(row: Row) -> tuple[float, float] | None:
    return None if row["lower"] is None or row["upper"] is None else (row["lower"], row["upper"])


def _named(row: Row) -> str:
    place = row["task"] or (row["scenario"] if row["kind"] == "scenario" else None)
    return clean(f"{row['metric']} · {place}" if place else row["metric"])


# --- texts --------------------------------------------------------------------------------------------


def _verdicts(rows: Sequence[Row]) -> list[tuple[str, str, str, str]]:
    found = [row for row in rows if row["metric"] == "verdict" and row["note"]]
    names = names_of(rows)
    newest = {  # where a cell was measured again, the later one counts
        (row["variant"], row["scenario"]): (
            row["model"], names[row["variant"]], row["scenario"] or "", row["note"],
        )
        for row in sorted(found, key=lambda row: row["cell"])
    }  # fmt: skip
    return [_shown(each) for each in newest.values()]


def _problems(rows: Sequence[Row]) -> list[tuple[str, str, str, str, str]]:
    missing = [row for row in rows if row["status"] != "ok"]
    names = names_of(rows)  # also where only one of several seeds is missing
    found = {
        (
            row["model"],
            names[row["variant"]],
            row["task"] or row["scenario"] or "",
            str(row["status"]).replace("_", " "),
            without_identity(row["reason"] or ""),
        )
        for row in missing
    }
    return [_shown(each) for each in sorted(found)]


def _shown(texts: tuple[Any, ...]) -> Any:
    return tuple(clean(str(text)) for text in texts)


def _machines(sweeps: Any, wanted: set[int]) -> list[Machine]:
    machines = []
    for row in sweeps.to_dict("records"):
        if int(row["sweep"]) not in wanted:
            continue
        manifest = row["manifest"] or {}
        names = [name for name in (manifest.get("hostname"),) if name]

        def change(text: str, names: Sequence[str] = tuple(names)) -> str:
            return clean(without_identity(text, names))

        facts = {name: manifest[name] for name in _FACTS if manifest.get(name) not in (None, {}, [])}
        command = " ".join(str(part) for part in manifest.get("command") or [row["command"] or ""])
        machines.append(Machine(int(row["sweep"]), change(command), in_texts(facts, change)))
    return machines
