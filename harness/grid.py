"""The grid: from what was asked to variants and cells. Pure: nothing is loaded, read or written.

Every cell gets a content key, the hash of all that decides its value, and where it can be known from
the facts alone that a cell cannot be measured, its status and the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.chain import Chain
from harness.evaluate.embedding_tasks import EMBEDDING_TYPES
from harness.keys import content_key
from harness.models.info import ModelInfo
from harness.records import CellKind, Scenario, Status

if TYPE_CHECKING:
    from harness.evaluate.index import ResolvedTask
    from harness.models.loading import ModelDescription

__all__ = ["CellPlan", "Decision", "Grid", "GridInputs", "VariantPlan", "build_grid"]


@dataclass(frozen=True, slots=True)
class Decision:
    """A cell that is settled before anything is loaded."""

    status: Status
    reason: str


@dataclass(frozen=True)
class CellPlan:
    """One thing to measure of a variant."""

    key: str
    kind: CellKind
    task: ResolvedTask | None = None
    scenario: Scenario | None = None
    decision: Decision | None = None

    @property
    def label(self) -> str:
        if self.task is not None:
            return self.task.name
        return self.scenario.label if self.scenario is not None else "transform"


@dataclass(frozen=True)
class VariantPlan:
    """A chain applied to a model once, and all that is then measured of that object."""

    key: str
    chain: Chain
    model: ModelDescription
    seed: int
    dtype: str
    device: str
    cells: tuple[CellPlan, ...]

    @property
    def label(self) -> str:
        return f"{self.model.info.label} · {self.chain.label}"


@dataclass(frozen=True)
class Grid:
    """All variants, the baselines of each model first."""

    variants: tuple[VariantPlan, ...]

    @property
    def cells(self) -> tuple[CellPlan, ...]:
        return tuple(cell for variant in self.variants for cell in variant.cells)


@dataclass(frozen=True)
class GridInputs:
    """What the grid is made of, all of it resolved and checked.

    `environment` holds what else decides a value: device name, library versions, measuring version.
    `budget` holds the calibration and training settings with the identity of their text;
    `scenario_options` and `task_options` what decides a timing or a score beside its own name.
    """

    chains: tuple[Chain, ...]
    models: tuple[ModelDescription, ...]
    tasks: tuple[ResolvedTask, ...]
    scenarios: Mapping[str, tuple[Scenario, ...]]  # by the model's label
    seeds: tuple[int, ...]
    dtype: str
    device: str
    environment: Mapping[str, Any]
    budget: Mapping[str, Any]
    task_options: Mapping[str, Any]
    meters: tuple[str, ...]  # names, with the source of those that are not bundled
    fitting_only: bool = False  # leave out tasks for another kind of model: nobody asked for them


def build_grid(inputs: GridInputs) -> Grid:
    """Variants in the order models, seeds, chains; the baseline chains come first."""
    chains = sorted(inputs.chains, key=lambda chain: not chain.is_baseline)
    return Grid(
        tuple(
            _variant(inputs, chain, model, seed)
            for model in inputs.models
            for seed in inputs.seeds
            for chain in chains
        )
    )


def _variant(inputs: GridInputs, chain: Chain, model: ModelDescription, seed: int) -> VariantPlan:
    identity = {
        "model": model.identity,
        "chain": chain.identity(),
        "seed": seed,
        "dtype": inputs.dtype,
        "environment": dict(inputs.environment),
        "budget": _budget_that_matters(chain, model.info, inputs.budget),
    }
    decision = refusal(chain, model.info, inputs.device)
    cells = [_cell(identity, CellKind.TRANSFORM, decision)]
    for scenario in inputs.scenarios[model.info.label]:
        problem = decision or _scenario_refusal(model.info, scenario)
        cells.append(_cell(identity, CellKind.SCENARIO, problem, scenario=scenario, meters=inputs.meters))
    for task in inputs.tasks:
        misfit = _misfit(model.info, task)
        if misfit is not None and inputs.fitting_only:
            continue
        problem = decision or _task_refusal(model.info) or misfit
        cells.append(_cell(identity, CellKind.TASK, problem, task=task, options=inputs.task_options))
    return VariantPlan(content_key(identity), chain, model, seed, inputs.dtype, inputs.device, tuple(cells))


def _cell(
    identity: Mapping[str, Any],
    kind: CellKind,
    decision: Decision | None,
    *,
    task: ResolvedTask | None = None,
    scenario: Scenario | None = None,
    **details: Any,
) -> CellPlan:
    what: dict[str, Any] = {"kind": kind.value, "details": details}
    if task is not None:
        what["task"] = [task.name, task.revision]
    if scenario is not None:
        what["scenario"] = scenario.label
    return CellPlan(content_key({**identity, "cell": what}), kind, task, scenario, decision)


def _budget_that_matters(chain: Chain, info: ModelInfo, budget: Mapping[str, Any]) -> dict[str, Any]:
    """Only what this chain uses, so that a changed training budget re-measures no RTN row."""
    needs = chain.needs()
    names = set()
    if "calibration" in needs:
        names.add("calibration")
    if "training" in needs or info.scratch:
        names.add("training")
    return {name: budget[name] for name in sorted(names)}


# --- what cannot be measured, and why ----------------------------------------------------------------


def refusal(chain: Chain, info: ModelInfo, device: str) -> Decision | None:
    """Why a chain cannot be applied to a model on a device; None where it can."""
    if reason := _order_refusal(chain):
        return Decision(Status.NOT_APPLICABLE, reason)
    for step in chain.steps:
        reason = _needs_refusal(step.method.needs_of(step.options), info, device)
        if reason is None:
            reason = step.method.reason_against(info, step.options)
        if reason is not None:
            return Decision(Status.NOT_APPLICABLE, f"{step.method.name}: {reason}")
    return None


def _order_refusal(chain: Chain) -> str | None:
    """Why a step that works on full-precision layers would find none after a quantizer, or a distillation
    would undo a pruner before it."""
    earlier = pruner = None
    for step in chain.steps:
        is_student = step.method.family == "distillation"
        if pruner is not None and is_student and "training" in step.method.needs_of(step.options):
            return (
                f"{step.method.name}: {pruner} comes before it, and nothing prunes the student's own "
                f"weights; write {step.method.name} first and {pruner} after it"
            )
        if step.method.leaves_zeros:
            pruner = step.method.name
        if not step.method.works_on_layers:
            continue
        if earlier is not None:
            advice = f"put it before {earlier}"
            if step.method.family in ("quantization", "external"):
                advice = (
                    "choose one of the two, or split the layers between them with targets where both have "
                    "that option"
                )
            return (
                f"{step.method.name}: {earlier} comes before it and quantizes every linear layer, so no "
                f"full-precision layer is left for it; {advice}"
            )
        if not step.method.leaves_layers_for_others(step.options):
            earlier = step.method.name
    return None


def _needs_refusal(needs: frozenset[str], info: ModelInfo, device: str) -> str | None:
    if "cuda" in needs and not device.startswith("cuda"):
        return "needs a CUDA device"
    for kind in ("encoder", "decoder"):
        if kind in needs and info.kind != kind:
            return f"needs an {kind}; {info.label} is a {info.kind}".replace("an d", "a d")
    if "teacher" in needs and info.scratch:
        return "needs a trained teacher; a scratch: model has none"
    return None


def _scenario_refusal(info: ModelInfo, scenario: Scenario) -> Decision | None:
    from harness.measure.scenario import scenario_problem

    problem = scenario_problem(info, scenario)
    return None if problem is None else Decision(Status.NOT_APPLICABLE, problem)


def _task_refusal(info: ModelInfo) -> Decision | None:
    if info.synthetic:
        reason = f"{info.label} has random weights (synthetic): accuracy would mean nothing"
        return Decision(Status.NOT_APPLICABLE, reason)
    return None


def _misfit(info: ModelInfo, task: ResolvedTask) -> Decision | None:
    """A task for another kind of model."""
    for_encoders = task.output_type in EMBEDDING_TYPES
    if info.kind == "encoder" and not for_encoders:
        reason = f"{info.label} is an encoder; this task scores text with a language model"
    elif info.kind != "encoder" and for_encoders:
        reason = f"{info.label} is a decoder; this task compares the embeddings of an encoder"
    else:
        return None
    return Decision(Status.NOT_APPLICABLE, reason)


def with_baseline(chains: Sequence[Chain], baseline: Chain) -> tuple[Chain, ...]:
    """The chains without duplicates, led by the baseline, which every comparison needs."""
    unique = {chain.label: chain for chain in (baseline, *chains)}
    return tuple(unique.values())
