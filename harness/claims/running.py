"""Measuring what claims need and a store has not: the fewest sweeps, within a budget of minutes."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness.claims.claim import Claim
from harness.config import SweepConfig
from harness.errors import HarnessError, StoreError
from harness.keys import content_key
from harness.planning import SweepPlan, plan_sweep
from harness.store.durations import durations
from harness.sweep import Reporter, cells_to_run, run_sweep

if TYPE_CHECKING:
    from harness.interrupts import Interrupts
    from harness.store.store import Store

__all__ = ["Means", "Reproduction", "Work", "affordable", "estimated", "merged", "reproduce"]

MOST_JOBS = 4  # each takes most of a gigabyte
Variant = tuple[str, str, int]  # model, method, seed


@dataclass(frozen=True)
class Work:
    """One sweep: the union of what claims need of one model's settings.

    `costs` holds, by model and method, the stated seconds of making a variant and of measuring one cell;
    `users` the ids of the claims that need that variant.
    """

    models: tuple[str, ...]
    methods: tuple[str, ...]
    settings: Mapping[str, Any]
    costs: Mapping[tuple[str, str], tuple[float, float]] = field(repr=False)
    users: Mapping[tuple[str, str], frozenset[str]] = field(repr=False)

    @property
    def claims(self) -> frozenset[str]:
        return frozenset().union(*self.users.values())

    def config(self, device: str, means: Means) -> SweepConfig:
        """As a sweep; what is timed runs alone on the machine."""
        jobs = means.jobs or _usual_jobs(device)
        return SweepConfig(
            models=self.models,
            methods=self.methods,
            device=device,
            plugin=means.plugin,
            jobs=1 if self.settings["prompt_lens"] else jobs,
            retry_failed=means.retry,
            fresh=means.fresh,
            **self.settings,
        )


@dataclass(frozen=True)
class Means:
    """How claims are measured.

    Args:
        budget_min: minutes; claims that do not fit are left out and noted. None: no limit.
        jobs: variants at a time where nothing is timed; by default one for each CPU core, up to four.
        retry: measure again what failed.
        fresh: measure everything again, as for times that were taken on a busy machine.
        plugin: what `--plugin` was given.
    """

    budget_min: float | None = None
    jobs: int | None = None
    retry: bool = False
    fresh: bool = False
    plugin: tuple[str, ...] = ()


@dataclass
class Reproduction:
    """What came of measuring: failed cells, and by claim why something of it was not measured."""

    failures: int = 0
    notes: dict[str, str] = field(default_factory=dict)


def merged(claims: Iterable[Claim]) -> list[Work]:
    """The fewest sweeps that cover what the claims need and measure nothing else, in the claims' order. Pure.

    Methods of one model are joined where all settings agree, and models where the methods agree too.
    """
    by_model: dict[tuple[str, str], dict[str, Any]] = {}
    for claim in claims:
        for need in claim.sweep:
            settings = need.settings()
            for model in need.models:
                found = by_model.setdefault(
                    (model, content_key(settings)), {"settings": settings, "costs": {}, "users": {}}
                )
                for method in need.methods:
                    making, cell = found["costs"].get((model, method), (0.0, 0.0))
                    found["costs"][model, method] = max(making, need.making_s), max(cell, need.cell_s)
                    users = found["users"].get((model, method), frozenset())
                    found["users"][model, method] = users | {claim.id}
    joined: dict[tuple[str, tuple[str, ...]], list[tuple[str, dict[str, Any]]]] = {}
    for (model, key), found in by_model.items():
        methods = tuple(sorted({method for _, method in found["costs"]}))
        joined.setdefault((key, methods), []).append((model, found))
    return [
        Work(
            models=tuple(model for model, _ in group),
            methods=methods,
            settings=group[0][1]["settings"],
            costs={pair: cost for _, found in group for pair, cost in found["costs"].items()},
            users={pair: ids for _, found in group for pair, ids in found["users"].items()},
        )
        for (_, methods), group in joined.items()
    ]


def estimated(plan: SweepPlan, work: Work, store: Store) -> dict[Variant, float]:
    """Seconds that each variant with something left to measure will take, one at a time.

    A cell takes what cells of its kind took on this model in this store, or what the claims state.
    """
    seconds: dict[tuple[str, str], list[float]] = {}
    for each in durations(store):
        seconds.setdefault((each.model, each.cell), []).append(each.seconds)
    to_run, _ = cells_to_run(plan, store.finished_cells(cell.key for cell in plan.grid.cells))
    found = {}
    for variant in plan.grid.variants:
        model, method = variant.model.info.label, variant.chain.label
        left = [cell for cell in variant.cells if cell.key in to_run and cell.decision is None]
        if not left:
            continue
        making, stated = work.costs.get((model, method), (6.0, max(c for _, c in work.costs.values())))
        known = [seconds.get((model, cell.label)) for cell in left if cell.label != "transform"]
        total = making + sum(statistics.median(each) if each else stated for each in known)
        found[model, method, variant.seed] = total
    return found


def affordable(
    claims: Sequence[Claim], needed: Mapping[str, Mapping[Any, float]], budget_s: float
) -> tuple[list[Claim], dict[str, float]]:
    """The claims that fit into a budget, in their order, and by how many seconds each other one exceeds it.

    Pure. What two claims share is paid once, so a later claim may fit where an earlier one did not.

    Args:
        needed: by claim the seconds of each thing that is to be measured for it.
    """
    paid: dict[Any, float] = {}
    fitting, beyond = [], {}
    for claim in claims:
        more = {key: each for key, each in needed.get(claim.id, {}).items() if key not in paid}
        missing = sum(paid.values()) + sum(more.values()) - budget_s
        if more and missing > 0:
            beyond[claim.id] = missing
        else:
            paid |= more
            fitting.append(claim)
    return fitting, beyond


def reproduce(
    store: Store,
    claims: Sequence[Claim],
    *,
    device: str,
    means: Means,
    reporter: Callable[[], Reporter],
    interrupts: Interrupts,
    command: str,
    say: Callable[[str], None] = lambda _: None,
) -> Reproduction:
    """Measure what these claims need on this device and the store has not; every cell is stored at once.

    Args:
        device: as `--device` has it, resolved: ``cpu``, ``cuda``, ``cuda:0``.
        reporter: makes what shows a sweep.

    Raises:
        Interrupted: a signal came; what was finished is stored.
    """
    kind = device.partition(":")[0]
    mine = [claim for claim in claims if kind in claim.where]
    budget_min = means.budget_min
    done = Reproduction()
    started = time.monotonic()
    works = _planned(merged(mine), mine, device, means, done)
    if budget_min is not None:
        needed: dict[str, dict[Any, float]] = {claim.id: {} for claim in mine}
        for number, (work, plan) in enumerate(works):
            for variant, seconds in estimated(plan, work, store).items():
                share = seconds / plan.config.jobs
                _, method, _ = variant
                for user in work.claims if method == "baseline" else work.users[variant[:2]]:
                    needed[user][number, variant] = share
        fitting, beyond = affordable(mine, needed, budget_min * 60)
        done.notes |= {id_: _beyond(seconds, budget_min) for id_, seconds in beyond.items()}
        if beyond:
            works = _planned(merged(fitting), fitting, device, means, done)
    for number, (work, plan) in enumerate(works, start=1):
        estimate = sum(estimated(plan, work, store).values()) / plan.config.jobs
        if not estimate:
            continue
        left = None if budget_min is None else budget_min * 60 - (time.monotonic() - started)
        if left is not None and estimate > left:
            done.notes |= {id_: _beyond(estimate - max(left, 0), budget_min or 0) for id_ in work.claims}
            continue
        say(f"{number} of {len(works)}: {', '.join(work.models)}, about {_minutes(estimate)}")
        interrupts.check()
        shown = reporter()
        outcome = run_sweep(plan, store, shown, command, interrupts)
        done.failures += outcome.failures
    return done


def _planned(
    works: Sequence[Work], claims: Sequence[Claim], device: str, means: Means, done: Reproduction
) -> list[tuple[Work, SweepPlan]]:
    """The sweeps that can be planned here; of the others their claims say why not.

    Where a sweep of several claims cannot be planned, each of them is tried alone: one that names a method
    that does not exist must not take the others with it.
    """
    found = []
    for work in works:
        try:
            plan = plan_sweep(work.config(device, means))
        except StoreError:
            raise
        except HarnessError as error:
            if len(work.claims) > 1:
                found += _planned(_alone(work, claims), claims, device, means, done)
            else:
                done.notes |= dict.fromkeys(work.claims, f"cannot be measured here: {error}")
            continue
        labels = {variant.chain.label for variant in plan.grid.variants}
        for wrong in sorted(set(work.methods) - labels):
            users = frozenset().union(*(ids for pair, ids in work.users.items() if pair[1] == wrong))
            why = f"the claim writes {wrong}, which no table does: write methods as tables show them"
            done.notes |= dict.fromkeys(users, why)
        found.append((work, plan))
    return found


def _alone(work: Work, claims: Sequence[Claim]) -> list[Work]:
    """What each of a sweep's claims needs of it by itself."""
    return [
        part
        for claim in claims
        if claim.id in work.claims
        for part in merged([claim])
        if part.settings == work.settings and set(part.models) <= set(work.models)
    ]


def _usual_jobs(device: str) -> int:
    return 1 if device != "cpu" else max(1, min(MOST_JOBS, len(os.sched_getaffinity(0))))


def _beyond(seconds: float, budget_min: float) -> str:
    return f"not measured: needs about {_minutes(seconds)} more than the budget of {budget_min:g} minutes"


def _minutes(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes} minute{'' if minutes == 1 else 's'}"
