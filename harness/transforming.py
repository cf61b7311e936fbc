"""Making a variant: load the model, apply the chain, measure what the transform did and cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness.cache import ContentCache
from harness.chain import Chain, Step
from harness.context import Context
from harness.errors import NotApplicable, PluginError
from harness.job import VariantJob
from harness.measure.cost import PhaseCost
from harness.measure.effect import Effect, measure_effect, snapshot
from harness.models.info import info_from_config
from harness.models.loading import LoadedModel, describe, load
from harness.models.spec import parse_model
from harness.records import Record
from harness.texts import token_source
from harness.training import TrainSettings

if TYPE_CHECKING:
    from harness.models.info import ModelInfo
    from harness.plugins import LoadedPlugins

__all__ = ["MadeVariant", "load_original", "make_variant", "require_weights"]

PROBE_TOKENS = 64


@dataclass
class MadeVariant:
    """A transformed model, the effect that was measured on it, and what it cost."""

    model: nn.Module
    tokenizer: Any
    info: ModelInfo
    device: torch.device
    dtype: torch.dtype
    effect: Effect
    records: tuple[Record, ...]
    no_effect: str | None
    is_baseline: bool
    original_bytes: int  # of the untouched model's weights


def make_variant(
    job: VariantJob, plugins: LoadedPlugins, report_progress: Callable[[str, int, int], None]
) -> MadeVariant:
    """Load, transform, train where the model is a `scratch:` one, and measure the effect."""
    device, dtype = torch.device(job.device), getattr(torch, job.dtype)
    chain = Chain(
        tuple(
            Step(plugins.method(name), plugins.method(name).options.parse(options, method=name))
            for name, options in job.chain
        )
    )
    _require_sources(chain, job)
    report_progress("load", 0, 1)
    with PhaseCost(device) as load_cost:
        loaded = load_original(job, plugins)
    load_records = load_cost.records("load", loaded.model)
    probe = _probe(loaded.info, device)
    before = snapshot(loaded.model, probe=probe)
    contexts: list[Context] = []
    with PhaseCost(device, loaded.model) as transform_cost:
        model = _apply(chain, job, plugins, loaded, device, dtype, contexts, report_progress)
        changed = None
        if loaded.info.scratch and not any(step.method.trains_scratch for step in chain.steps):
            # Training changes every weight: whether the method did anything is asked before it.
            changed = measure_effect(before, model).changed
            context = _context(job, plugins, loaded, device, dtype, chain.steps, True)
            contexts.append(context)
            context.report_progress = report_progress
            context.train(model)
    effect = measure_effect(before, model, probe=probe)
    original_bytes = before.weight_bytes
    del before
    no_effect = None
    if not chain.is_baseline and not (effect.changed if changed is None else changed):
        no_effect = f"{chain.label} changed nothing in {job.model.info.label}"
    costs = (
        *load_records,
        *transform_cost.records("transform", model),
        Record("calibration_tokens", max((c.calibration_tokens for c in contexts), default=0), "tokens"),
        Record("trained_tokens", sum(c.trained_tokens for c in contexts), "tokens"),
        Record("trained_steps", sum(c.trained_steps for c in contexts), "steps"),
    )
    own = tuple(record for context in contexts for record in context.records)
    return MadeVariant(
        model=model,
        tokenizer=loaded.tokenizer,
        info=_info_after(model, loaded.info),
        device=device,
        dtype=dtype,
        effect=effect,
        records=_unique((*costs, *effect.records, *own)),
        no_effect=no_effect,
        is_baseline=chain.is_baseline,
        original_bytes=original_bytes,
    )


def _require_sources(chain: Chain, job: VariantJob) -> None:
    """Raise `PluginError` where a method was edited since the sweep was planned: what it gives now would be
    stored under the key of what it was. Bundled methods are imported once, before."""
    for step, planned in zip(chain.steps, job.sources, strict=False):
        method = step.method
        if not method.is_bundled and method.source_hash != planned:
            raise PluginError(
                f"{method.name}: its source was edited since the sweep began; run the same command again"
            )


def load_original(job: VariantJob, plugins: LoadedPlugins) -> LoadedModel:
    """The untouched model, by a plugin's `load_model` or by the harness.

    Raises:
        NotApplicable: weights of it were not loaded.
    """
    device, dtype = torch.device(job.device), getattr(torch, job.dtype)
    by_plugin = plugins.manager.hook.load_model(spec=job.model.spec, device=device, dtype=job.dtype)
    loaded: LoadedModel
    loaded = by_plugin if by_plugin is not None else load(job.model, device, dtype, job.seed)
    require_weights(loaded.model, loaded.info.label)
    return loaded


def require_weights(model: nn.Module, label: str) -> None:
    """Raise `NotApplicable` where a tensor has a shape and no values, as accelerate offloads it."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise NotApplicable(
                f"{label}: {name} is on the meta device, without values; load the whole model into memory"
            )


def _apply(
    chain: Chain,
    job: VariantJob,
    plugins: LoadedPlugins,
    loaded: LoadedModel,
    device: torch.device,
    dtype: torch.dtype,
    contexts: list[Context],
    report_progress: Callable[[str, int, int], None],
) -> nn.Module:
    model = loaded.model
    for position, step in enumerate(chain.steps):
        last = chain.ends_with(position)
        context = _context(job, plugins, loaded, device, dtype, chain.steps[: position + 1], last)
        context.report_progress = report_progress
        contexts.append(context)
        # A method may draw from the global generators by accident; it must not depend on what ran
        # before it in this process.
        torch.manual_seed(job.seed)
        result = step.method.transform(model, step.options, context)
        if not isinstance(result, nn.Module):
            raise PluginError(
                f"{step.method.name}: transform must return the model (an nn.Module), "
                f"not {type(result).__name__}"
            )
        model = result
    return model.eval()


def _context(
    job: VariantJob,
    plugins: LoadedPlugins,
    loaded: LoadedModel,
    device: torch.device,
    dtype: torch.dtype,
    steps: tuple[Step, ...],
    last: bool,
) -> Context:
    budget = job.budget
    cache = ContentCache(job.cache_dir)
    source = token_source(budget, loaded, cache)
    return Context(
        info=loaded.info,
        tokenizer=loaded.tokenizer,
        device=device,
        dtype=dtype,
        seed=job.seed,
        calibration_source=source,
        training_source=source,
        settings=TrainSettings(
            steps=budget.train_steps,
            batch_size=budget.train_batch_size,
            seq_len=budget.train_len,
        ),
        calibration_samples=budget.calibration_samples,
        calibration_len=budget.calibration_len,
        load_teacher=(None if loaded.info.scratch else lambda: load_original(job, plugins).model),
        load_named=lambda name: load(describe(parse_model(name)), device, dtype, job.seed),
        cache_store=cache,
        identity={
            "model": job.model.identity,
            "steps": [step.identity() for step in steps[:-1]],
            "source": steps[-1].method.source_hash,
            "seed": job.seed,
            "dtype": job.dtype,
            "budget": budget.identity(),
            "environment": dict(job.environment),
        },
        last_in_chain=last,
        holds_zeros=any(step.method.leaves_zeros for step in steps[:-1]),
        needs=steps[-1].method.needs_of(steps[-1].options),
    )


def _probe(info: ModelInfo, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    length = min(PROBE_TOKENS, info.max_positions)
    return torch.randint(info.vocab_size, (1, length), generator=generator).to(device)


def _info_after(model: nn.Module, info: ModelInfo) -> ModelInfo:
    """The facts after surgery: fewer layers, fewer key-value heads."""
    config = getattr(model, "config", None)
    if config is None:
        return info
    return info_from_config(
        config,
        info.label,
        synthetic=info.synthetic,
        scratch=info.scratch,
        modifiers=info.modifiers,
    )


def _unique(records: tuple[Record, ...]) -> tuple[Record, ...]:
    """One record a name: where two steps of a chain record the same name, the later gets a number."""
    seen: dict[str, Record] = {}
    for record in records:
        name, number = record.metric, 1
        while name in seen:
            number += 1
            name = f"{record.metric}_{number}"
        seen[name] = replace(record, metric=name)
    return tuple(seen.values())
