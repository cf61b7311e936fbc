"""From a configuration to a checked plan. Nothing is written and no weight is loaded here.

Whatever is wrong with the input is found here, so that bad input costs nothing.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import harness
from harness.chain import parse_chain
from harness.config import SweepConfig
from harness.errors import ConfigError
from harness.evaluate.index import resolve_tasks
from harness.folders import default_cache_dir
from harness.grid import Grid, GridInputs, VariantPlan, build_grid, with_baseline
from harness.job import Budget, CellJob, VariantJob
from harness.measure import MEASURING_VERSION
from harness.measure.machine import device_name, resolve_device
from harness.measure.scenario import default_scenarios
from harness.models.info import ModelInfo
from harness.models.loading import ModelDescription, describe, resolve_model, zoo_names
from harness.plugins import LoadedPlugins, load_plugins
from harness.records import Scenario
from harness.texts import text_hash

__all__ = ["DEFAULT_TASKS", "SweepPlan", "plan_sweep", "threads_per_worker", "variant_job"]

DEFAULT_TASKS: Mapping[str, tuple[str, ...]] = {"decoder": ("kjv", "grammar"), "encoder": ("kjv_books",)}
"""By the kind of model; none of them needs a network."""
LARGE_GPU_BYTES = 40e9
SHORT, LONG = 128, 512  # default prompt lengths on the CPU and on CUDA, in tokens


@dataclass(frozen=True)
class SweepPlan:
    """Everything that a sweep will do, checked."""

    config: SweepConfig
    plugins: LoadedPlugins
    grid: Grid
    device: str
    device_name: str
    dtype: str
    budget: Budget
    environment: Mapping[str, Any]
    cache_dir: Path


def plan_sweep(config: SweepConfig, *, strict: bool = False) -> SweepPlan:
    """Check the configuration and lay out the grid.

    Args:
        strict: a broken plugin is an error, not a report.

    Raises:
        ConfigError, UnknownName, MissingExtra, PluginError: bad input, in one clear line.
    """
    if not config.methods:
        raise ConfigError("no method is named; try --methods gptq,smoothquant")
    plugins = load_plugins(config.plugin, strict=strict)
    chains = tuple(parse_chain(text, plugins.methods) for text in config.methods)
    baseline = parse_chain("baseline", plugins.methods)
    device = resolve_device(config.device)
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    models = _models(config, plugins, device)
    task_names = _default_tasks(models) if config.tasks is None else config.tasks
    include = tuple(path.resolve() for path in _existing(config.include_path))
    plugin_folders = tuple(Path(source.path) for source in plugins.task_sources)
    tasks = resolve_tasks(task_names, (*include, *plugin_folders)) if task_names else ()
    scenarios = {model.info.label: _scenarios(model.info, config, device) for model in models}
    budget = _budget(config, device)
    environment = _environment(device, plugins)
    grid = build_grid(
        GridInputs(
            chains=with_baseline(chains, baseline),
            models=models,
            tasks=tasks,
            scenarios=scenarios,
            seeds=tuple(dict.fromkeys(config.seeds)),
            dtype=dtype,
            device=device,
            environment=environment,
            budget=budget.identity(),
            task_options={"limit": config.limit},
            meters=plugins.meter_identities(),
            fitting_only=config.tasks is None,
        )
    )
    return SweepPlan(
        config=config,
        plugins=plugins,
        grid=grid,
        device=device,
        device_name=device_name(device),
        dtype=dtype,
        budget=budget,
        environment=environment,
        cache_dir=default_cache_dir(),
    )


def variant_job(plan: SweepPlan, variant: VariantPlan, keys: frozenset[str]) -> VariantJob:
    """The job for those cells of a variant whose keys are given."""
    config = plan.config
    cells = tuple(
        CellJob(cell.key, cell.kind, cell.task, cell.scenario) for cell in variant.cells if cell.key in keys
    )
    return VariantJob(
        variant_key=variant.key,
        label=variant.label,
        chain=tuple((step.method.name, step.options.canonical()) for step in variant.chain.steps),
        model=variant.model,
        seed=variant.seed,
        dtype=plan.dtype,
        device=plan.device,
        cells=cells,
        plugins=tuple(_absolute(text) for text in config.plugin),
        budget=plan.budget,
        limit=config.limit,
        eval_batch_size=config.eval_batch_size,
        cache_dir=plan.cache_dir.resolve(),
        threads=threads_per_worker(config.jobs),
        environment=plan.environment,
        sources=tuple(step.method.source_hash for step in variant.chain.steps),
    )


def threads_per_worker(jobs: int) -> int:
    """How many threads torch gets in each of so many workers at a time.

    An equal share of the processors that this process may use; no more than `OMP_NUM_THREADS` says.
    """
    share = max(1, len(os.sched_getaffinity(0)) // jobs)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(asked)) if asked.isdecimal() and int(asked) > 0 else share


# --- defaults and checks ------------------------------------------------------------------------------


def _models(config: SweepConfig, plugins: LoadedPlugins, device: str) -> tuple[ModelDescription, ...]:
    described = []
    by_plugin = bool(plugins.manager.hook.load_model.get_hookimpls())
    for text in config.models or _default_models(device):
        spec = resolve_model(
            text,
            plugins.models,
            trust_remote_code=config.trust_remote_code,
            allow_pickle=config.allow_pickle,
        )
        if spec.source == "local":
            # Workers start in the fork server's directory, not in the user's.
            spec = replace(spec, name=str(Path(spec.name).resolve()))
        described.append(describe(spec, by_plugin=by_plugin))
    labels = [model.info.label for model in described]
    if doubled := next((label for label in labels if labels.count(label) > 1), None):
        raise ConfigError(f"model {doubled!r} is named twice")
    # Rows are known by the content: those of the second would be stored under the name of the first.
    first: dict[str, str] = {}
    for model in described:
        other = first.setdefault(model.identity, model.info.label)
        if other != model.info.label:
            raise ConfigError(
                f"models {other!r} and {model.info.label!r} have the same content; name one of them"
            )
    return tuple(described)


def _default_models(device: str) -> tuple[str, ...]:
    """A trained model for quality, and on a large GPU a real size for speed."""
    trained = [name for name in zoo_names() if name.startswith("llama")]
    if not trained:
        raise ConfigError("no bundled model is installed; name one with --models")
    models = [f"zoo:{trained[0]}"]
    if device.startswith("cuda"):
        import torch

        if torch.cuda.get_device_properties(device).total_memory >= LARGE_GPU_BYTES:
            models.append("shape:llama-7b")
    return tuple(models)


def _default_tasks(models: Sequence[ModelDescription]) -> tuple[str, ...]:
    """What tells most of these kinds of models."""
    kinds = {model.info.kind for model in models}
    return tuple(name for kind, names in DEFAULT_TASKS.items() if kind in kinds for name in names)


def _existing(paths: tuple[Path, ...]) -> tuple[Path, ...]:
    for path in paths:
        if not os.path.isdir(path):
            raise ConfigError(f"--include-path {path} is no directory")
    return paths


def _scenarios(info: ModelInfo, config: SweepConfig, device: str) -> tuple[Scenario, ...]:
    prompts = config.prompt_lens
    if prompts is None:
        usual = LONG if device.startswith("cuda") else SHORT
        room = info.max_positions - (config.new_tokens if info.kind == "decoder" else 0)
        prompts = (max(1, min(usual, room)),)
    if not prompts:
        return ()
    return tuple(default_scenarios(info, config.batch_sizes, prompts, config.new_tokens))


def _budget(config: SweepConfig, device: str) -> Budget:
    usual_len = 2048 if device.startswith("cuda") else 128
    return Budget(
        calibration_samples=config.calibration_samples,
        calibration_len=config.calibration_len or usual_len,
        train_steps=config.train_steps,
        train_batch_size=config.train_batch_size,
        train_len=config.train_len,
        text=None if config.text is None else config.text.resolve(),
        text_hash=text_hash(config.text),
    )


def _environment(device: str, plugins: LoadedPlugins) -> dict[str, Any]:
    """The versions and the device that decide a value, and what loads models where a plugin may."""
    loaders = plugins.loader_identities()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "lm_eval")}
    return {
        "harness": harness.__version__,
        "measuring": MEASURING_VERSION,
        "device": device_name(device),
        **versions,
        **({"loaders": loaders} if loaders else {}),
    }


def _absolute(plugin: str) -> str:
    path = Path(os.path.expanduser(plugin))
    return str(path.resolve()) if os.path.isfile(path) else plugin
