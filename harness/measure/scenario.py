"""Which shapes are timed, and running every meter on one of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from harness.errors import ConfigError, NotApplicable, PluginError
from harness.measure.meter import Measured, Meter
from harness.models.info import ModelInfo
from harness.records import Record, Scenario

__all__ = ["default_scenarios", "measure_scenario", "scenario_problem"]


def default_scenarios(
    info: ModelInfo, batch_sizes: Sequence[int], prompt_lens: Sequence[int], new_tokens: int
) -> tuple[Scenario, ...]:
    """Every batch size with every prompt length, without duplicates, in the order given.

    An encoder decodes nothing, so its scenarios have ``new_tokens=0``. Shapes that the model is too
    short for are included: `scenario_problem` says why they cannot run.

    Raises:
        ConfigError: a size that is no positive number.
    """
    for name, sizes in (("batch size", batch_sizes), ("prompt length", prompt_lens)):
        if not sizes:
            raise ConfigError(f"give at least one {name}")
        for size in sizes:
            if size < 1:
                raise ConfigError(f"{name} must be at least 1, not {size}")
    if new_tokens < 0:
        raise ConfigError(f"new tokens must be at least 0, not {new_tokens}")
    decoded = 0 if info.kind == "encoder" else new_tokens
    shapes = (Scenario(batch, prompt, decoded) for batch, prompt in product(batch_sizes, prompt_lens))
    return tuple(dict.fromkeys(shapes))


def scenario_problem(info: ModelInfo, scenario: Scenario) -> str | None:
    """Why the model cannot run this shape; None where it can."""
    if info.kind == "encoder" and scenario.new_tokens:
        return f"{info.label} is an encoder: it has nothing to decode (new tokens must be 0)"
    total = scenario.prompt_len + scenario.new_tokens
    if total > info.max_positions:
        return f"{scenario.label} needs {total} positions; {info.label} has {info.max_positions}"
    return None


def measure_scenario(measured: Measured, meters: Sequence[Meter]) -> tuple[Record, ...]:
    """The records of every meter that fits this kind of model and shape.

    A meter that raises `NotApplicable` (decoding without new tokens) adds nothing.

    Raises:
        ConfigError: the model cannot run this shape.
        PluginError: two meters measure the same metric.
    """
    problem = scenario_problem(measured.info, measured.scenario)
    if problem is not None:
        raise ConfigError(problem)
    records: dict[str, Record] = {}
    measured_by: dict[str, str] = {}
    measured.shared["records"] = records  # what was measured so far, for meters that derive from it
    for meter in meters:
        if measured.info.kind not in meter.kinds:
            continue
        try:
            found = tuple(meter.measure(measured))
        except NotApplicable:
            continue
        for record in found:
            if record.metric in records:
                raise PluginError(
                    f"meters {measured_by[record.metric]!r} and {meter.name!r} both measure {record.metric!r}"
                )
            records[record.metric] = record
            measured_by[record.metric] = meter.name
    return tuple(records.values())
