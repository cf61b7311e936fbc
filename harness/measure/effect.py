"""What a transform did to a model, measured on the model itself and not claimed by the method.

`snapshot` before and `measure_effect` after. A module counts as changed when its class, its settings
or the bits of its tensors differ; rewriting equal values is no change. The sizes are those of the
memory that is really held, set against what the method's bits and zeros would amount to on paper.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from harness.errors import NotApplicable, NumericalFailure
from harness.measure.fingerprint import ModuleFingerprint, fingerprint_modules
from harness.measure.generation import forward_only
from harness.measure.linears import (
    LinearState,
    is_embedding_like,
    linear_states,
    own_parameter_count,
    packed_rows,
    parameter_count,
)
from harness.measure.memory import weight_bytes
from harness.measure.storage import bytes_per_tensor, own_tensors
from harness.nn.anatomy import blocks_of
from harness.records import ModuleEffect, Record

__all__ = ["Effect", "Snapshot", "measure_effect", "snapshot"]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A model before its transform; holds no reference to it and no copy of its weights."""

    modules: Mapping[str, ModuleFingerprint]
    bytes_by_module: Mapping[str, int]
    weight_bytes: int
    logits: torch.Tensor | None = None  # float32 on the CPU, of the probe


@dataclass(frozen=True, slots=True)
class Effect:
    """What changed.

    Attributes:
        changed: any module differs, came or went.
        effects: one entry for each linear layer inside the blocks and each other changed module.
        records: the same in numbers, for the whole model.
        simulated: a changed module says that it computes the paper's form without its kernel.
    """

    changed: bool
    effects: tuple[ModuleEffect, ...]
    records: tuple[Record, ...] = field(default=())
    simulated: bool = False


def snapshot(model: nn.Module, probe: torch.Tensor | None = None) -> Snapshot:
    """Fingerprint every module, parameter and buffer.

    Args:
        probe: token ids int64 [batch, tokens]; where given, the model's outputs on them are kept.
    """
    model = _unwrapped(model)
    return Snapshot(
        modules=fingerprint_modules(model),
        bytes_by_module=_bytes_by_module(model),
        weight_bytes=weight_bytes(model),
        logits=None if probe is None else _probe_output(model, probe),
    )


def measure_effect(before: Snapshot, model: nn.Module, probe: torch.Tensor | None = None) -> Effect:
    """Compare a model with its snapshot.

    Args:
        probe: the token ids that the snapshot was taken with.

    Raises:
        NumericalFailure: the outputs on the probe became NaN or infinite.
    """
    compiled, model = _unwrapped(model) is not model, _unwrapped(model)
    after = fingerprint_modules(model)
    differing = {name for name in after if before.modules.get(name) != after[name]}
    gone = before.modules.keys() - after.keys()
    linears = _block_linears(model)
    effects = _module_effects(before, model, after, differing, linears)
    changed = bool(differing or gone or compiled)
    return Effect(
        changed=changed,
        effects=effects,
        records=_records(before, model, effects, linears, gone, probe),
        simulated=any(effect.simulated for effect in effects if effect.changed),
    )


def _module_effects(
    before: Snapshot,
    model: nn.Module,
    after: Mapping[str, ModuleFingerprint],
    differing: set[str],
    linears: Mapping[str, LinearState],
) -> tuple[ModuleEffect, ...]:
    effects = []
    # A packed embedding may keep its rows in a module of its own: both are one thing that is stored.
    packed = {name for name, module in model.named_modules() if packed_rows(module)}
    for name, module in model.named_modules():
        if _inside_any(name, linears) or _inside_any(name, packed):
            continue
        if name in linears:
            effects.append(_linear_effect(name, linears[name], before, after, differing))
        elif name in packed:
            if any(_is_within(inner, name) for inner in differing):
                effects.append(_packed_embedding_effect(name, module, before))
        elif name in differing:
            effects.append(_other_effect(name, module, before))
    return tuple(effects)


def _linear_effect(
    name: str,
    state: LinearState,
    before: Snapshot,
    after: Mapping[str, ModuleFingerprint],
    differing: set[str],
) -> ModuleEffect:
    # A quantized layer may be made of several modules, and so may what it replaced.
    names = {inner for inner in after if _is_within(inner, name)}
    were = {inner for inner in before.modules if _is_within(inner, name)}
    return ModuleEffect(
        module=name,
        kind=state.kind,
        changed=bool(names & differing) or names != were,
        dtype=state.dtype,
        parameters=state.parameters,
        bytes_before=sum(before.bytes_by_module[inner] for inner in were),
        bytes_after=state.held_bytes,
        stored_bits_per_weight=state.stored_bits_per_weight,
        sparsity=state.sparsity,
        nm_pattern=state.nm_pattern,
        simulated=state.simulated,
        kernel=state.kernel,
    )


def _other_effect(name: str, module: nn.Module, before: Snapshot) -> ModuleEffect:
    own = [tensor for _, tensor in own_tensors(module)]
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in own})
    parameters, held = own_parameter_count(module), bytes_per_tensor(own)
    return ModuleEffect(
        module=name,
        kind=type(module).__name__,
        changed=True,
        dtype="+".join(dtypes),
        parameters=parameters,
        bytes_before=before.bytes_by_module.get(name, 0),
        bytes_after=held,
        stored_bits_per_weight=8 * held / parameters if is_embedding_like(module) and parameters else None,
        simulated=bool(getattr(module, "simulated", False)),
        kernel=getattr(module, "kernel_name", None),
    )


def _packed_embedding_effect(name: str, module: nn.Module, before: Snapshot) -> ModuleEffect:
    inside = list(module.modules())
    own = [(key, tensor) for each in inside for key, tensor in own_tensors(each)]
    weights = bytes_per_tensor(tensor for key, tensor in own if key != "bias")  # that of a tied head
    kernels = (getattr(each, "kernel_name", None) for each in inside)
    return ModuleEffect(
        module=name,
        kind=type(module).__name__,
        changed=True,
        dtype="+".join(sorted({str(tensor.dtype).removeprefix("torch.") for _, tensor in own})),
        parameters=sum(map(own_parameter_count, inside)),
        bytes_before=before.bytes_by_module.get(name, 0),
        bytes_after=bytes_per_tensor(tensor for _, tensor in own),
        stored_bits_per_weight=8 * weights / packed_rows(module),
        simulated=any(getattr(each, "simulated", False) for each in inside),
        kernel=next((kernel for kernel in kernels if kernel), None),
    )


# --- in numbers ------------------------------------------------------------------------------------


def _records(
    before: Snapshot,
    model: nn.Module,
    effects: tuple[ModuleEffect, ...],
    linears: Mapping[str, LinearState],
    gone: Iterable[str],
    probe: torch.Tensor | None,
) -> tuple[Record, ...]:
    stored = weight_bytes(model)
    parameters = parameter_count(model, linears)
    removed = sum(_elements(before.modules[name]) for name in gone)
    touched = removed + sum(effect.parameters for effect in effects if effect.changed)
    changed_linears = [e.module for e in effects if e.changed and e.module in linears]
    targeted = [linears[name] for name in changed_linears] or list(linears.values())
    records = [
        Record("weight_bytes", stored, "B"),
        Record("weight_bytes_before", before.weight_bytes, "B"),
        Record("parameters", parameters, "1"),
        Record("parameters_changed_share", _share(touched, parameters + removed), "1"),
    ]
    if stored:
        records.append(Record("compression_ratio", before.weight_bytes / stored, "x"))
    on_paper = _paper_bytes(stored, linears)
    if on_paper:
        ratio = before.weight_bytes / on_paper
        note = "weights at their nominal bits without zeros; no scales, no indices"
        records.append(Record("theoretical_compression_ratio", ratio, "x", note=note))
    records += _targeted_records(targeted)
    change = None if probe is None else _output_change(before.logits, model, probe)
    if change is not None:
        records.append(change)
    return tuple(records)


def _targeted_records(targeted: list[LinearState]) -> list[Record]:
    """Means over the linear layers that changed (over all where none did), weighted by their size."""
    records = []
    weights = sum(state.weights for state in targeted)
    if weights:
        bits = sum(state.stored_bits_per_weight * state.weights for state in targeted) / weights
        records.append(Record("stored_bits_per_weight", bits, "bit", n=len(targeted)))
    known = [state for state in targeted if state.sparsity is not None]
    known_weights = sum(state.weights for state in known)
    if known_weights:
        zeros = sum((state.sparsity or 0.0) * state.weights for state in known)
        records.append(Record("sparsity", zeros / known_weights, "1", n=len(known)))
    return records


def _paper_bytes(stored: int, linears: Mapping[str, LinearState]) -> float | None:
    """Bytes of the model were every linear layer stored at its nominal bits, zeros for nothing.

    None where a layer does not tell its nominal bits.
    """
    total = float(stored)
    for state in linears.values():
        if state.nominal_bits is None:
            return None
        kept = 1.0 - (state.sparsity or 0.0)
        total += state.weights * kept * state.nominal_bits / 8 - state.weight_bytes
    return total if total > 0 else None


def _elements(module: ModuleFingerprint) -> int:
    return sum(math.prod(tensor.shape) for _, tensor in module.tensors)


def _share(part: int, whole: int) -> float:
    return min(1.0, part / whole) if whole else 0.0


def _probe_output(model: nn.Module, probe: torch.Tensor) -> torch.Tensor:
    was_training = model.training
    model.eval()
    try:
        return forward_only(model, probe).float().cpu()
    finally:
        model.train(was_training)


def _output_change(before: torch.Tensor | None, model: nn.Module, probe: torch.Tensor) -> Record | None:
    if before is None:
        return None
    after = _probe_output(model, probe)
    if bool(before.isfinite().all()) and not bool(after.isfinite().all()):
        raise NumericalFailure("the outputs of the transformed model are not finite")
    if after.shape != before.shape:
        return None
    change = float(torch.linalg.vector_norm(after - before) / torch.linalg.vector_norm(before))
    if not math.isfinite(change):  # nothing is relative to outputs that were zero, or not finite before
        return None
    note = f"relative Frobenius difference of the outputs for {probe.numel()} random tokens"
    return Record("probe_output_change", change, "1", note=note)


# --- names -----------------------------------------------------------------------------------------


def _block_linears(model: nn.Module) -> dict[str, LinearState]:
    try:
        prefixes = tuple(f"{name}." for name, _ in blocks_of(model))
    except NotApplicable:  # an unknown architecture: everything that is linear
        prefixes = ("",)
    return linear_states(model, prefixes)


def _bytes_by_module(model: nn.Module) -> dict[str, int]:
    return {
        name: bytes_per_tensor(tensor for _, tensor in own_tensors(module))
        for name, module in model.named_modules()
    }


def _is_within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def _inside_any(name: str, outers: Collection[str]) -> bool:
    parent = name.rpartition(".")[0]
    while parent:
        if parent in outers:
            return True
        parent = parent.rpartition(".")[0]
    return False


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a `torch.compile` wrapper, so that the names of the modules stay the same."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner
