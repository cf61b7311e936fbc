"""A cheap fingerprint of a model: enough to say afterwards which modules changed, without a copy.

Tensors are reduced to a 64-bit checksum of their bits and positions. The arithmetic is on integers
modulo 2^64, where the order of a sum does not matter, so the checksum does not depend on the device
or on the number of threads.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harness.measure.storage import own_tensors, plain_tensors, tensor_key

__all__ = ["ModuleFingerprint", "TensorFingerprint", "checksums", "fingerprint_modules"]

_CHUNK_WORDS = 4 * 1024 * 1024  # of 8 bytes: 32 MB of temporaries a pass
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # odd; as a signed 64-bit number
_MODULUS = 1 << 64
_CONFIG_FIELDS = ("sliding_window", "layer_types", "num_hidden_layers", "rope_parameters", "is_causal")


@dataclass(frozen=True, slots=True, order=True)
class TensorFingerprint:
    """Shape, dtype and checksum of a tensor; equal fingerprints mean equal bits."""

    shape: tuple[int, ...]
    dtype: str
    checksum: int


@dataclass(frozen=True, slots=True)
class ModuleFingerprint:
    """What decides what a module computes, its children left out.

    `attributes` are the public numbers, strings, flags and functions of the module, the fields of its
    configuration that steer attention, its hooks, and whether its call is compiled.
    """

    kind: str  # full name of the class
    text: str  # extra_repr
    tensors: tuple[tuple[str, TensorFingerprint], ...]
    attributes: tuple[tuple[str, str], ...]


def fingerprint_modules(model: nn.Module) -> dict[str, ModuleFingerprint]:
    """The fingerprint of every module, by full name; a module reachable twice counts once."""
    modules = list(model.named_modules())
    tensors = {
        (name, own_name): tensor for name, module in modules for own_name, tensor in own_tensors(module)
    }
    sums = checksums(tensors)
    own: dict[str, list[tuple[str, TensorFingerprint]]] = {name: [] for name, _ in modules}
    for (name, own_name), tensor in tensors.items():
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        own[name].append((own_name, TensorFingerprint(shape, dtype, sums[name, own_name])))
    return {
        name: ModuleFingerprint(
            kind=f"{type(module).__module__}.{type(module).__qualname__}",
            text=module.extra_repr(),
            tensors=tuple(sorted(own[name])),
            attributes=tuple(sorted(_attributes(module))),
        )
        for name, module in modules
    }


# --- attributes -------------------------------------------------------------------------------------


def _attributes(module: nn.Module) -> Iterator[tuple[str, str]]:
    for name, value in vars(module).items():
        if name.startswith("_") or name == "training":
            continue
        if _is_plain(value):
            yield name, repr(value)
        elif inspect.isroutine(value):
            yield name, f"{value.__module__}.{value.__qualname__}"
        elif name == "forward":  # replaced on the instance by some other callable
            yield name, type(value).__qualname__
    if getattr(module, "_compiled_call_impl", None) is not None:
        yield "compiled", "True"
    if hooks := _foreign_hooks(module):
        yield "hooks", ", ".join(hooks)
    config = getattr(module, "config", None)
    if config is not None:
        yield "config._attn_implementation", repr(getattr(config, "_attn_implementation", None))
        for field in _CONFIG_FIELDS:
            yield f"config.{field}", repr(getattr(config, field, None))


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _foreign_hooks(module: nn.Module) -> list[str]:
    """Names of the forward hooks, without those that transformers installs to record outputs."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    named = [(str(getattr(hook, "__module__", "")), hook) for hook in hooks]
    return sorted(
        str(getattr(hook, "__qualname__", type(hook).__qualname__))
        for origin, hook in named
        if not origin.startswith("transformers.")
    )


# --- checksums --------------------------------------------------------------------------------------


@torch.no_grad()
def checksums(tensors: Mapping[Any, torch.Tensor]) -> dict[Any, int]:
    """A 64-bit checksum of the bits of each tensor and of their positions; 0 for a meta tensor.

    A change within one 8-byte word always changes it, any other change almost surely. Tied tensors
    are read once, and results cross from the device once for all, not once a tensor.
    """
    factors: dict[torch.device, torch.Tensor] = {}
    parts: dict[tuple[Any, ...], list[torch.Tensor]] = {}
    keys: dict[Any, list[tuple[Any, ...]]] = {}
    for name, tensor in tensors.items():
        keys[name] = []
        for plain in plain_tensors(tensor):
            key = tensor_key(plain)
            if key not in parts:
                if plain.device not in factors and not plain.is_meta:
                    factors[plain.device] = _position_factors(plain.device)
                parts[key] = _chunk_sums(plain, factors)
            keys[name].append(key)
    read = _read_all(parts)
    return {name: _joined([part for key in found for part in read[key]]) for name, found in keys.items()}


def _read_all(parts: dict[tuple[Any, ...], list[torch.Tensor]]) -> dict[tuple[Any, ...], list[int]]:
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensors in parts.values():
        for tensor in tensors:
            by_device.setdefault(tensor.device, []).append(tensor)
    values = {device: iter(torch.stack(found).tolist()) for device, found in by_device.items()}
    return {key: [int(next(values[tensor.device])) for tensor in tensors] for key, tensors in parts.items()}


def _joined(parts: list[int]) -> int:
    total = 0
    for part in parts:
        total = (total * _GOLDEN + part + 1) % _MODULUS
    return total


def _chunk_sums(tensor: torch.Tensor, factors: dict[torch.device, torch.Tensor]) -> list[torch.Tensor]:
    """Sums (int64 scalars on the tensor's device), one a chunk, of the words mixed by position."""
    if tensor.is_meta or not tensor.numel():
        return []
    by_position = factors[tensor.device]
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = raw.numel() // 8 * 8
    words = raw[:whole]
    if words.storage_offset() % 8:
        words = words.clone()
    chunks = [*words.view(torch.int64).split(_CHUNK_WORDS)] if whole else []
    if whole < raw.numel():
        chunks.append(raw[whole:].to(torch.int64))
    return [_mixed(chunk, by_position[: chunk.numel()]).sum() for chunk in chunks]


def _mixed(words: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    # Each of the three steps is a bijection of 64-bit words. The shifts carry high bits down:
    # by multiplication alone two flipped signs could cancel in the sum.
    return _xor_shift(_xor_shift(words, 32) * factors, 29)


def _xor_shift(words: torch.Tensor, bits: int) -> torch.Tensor:
    shifted = (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)
    return shifted.bitwise_xor_(words)


def _position_factors(device: torch.device) -> torch.Tensor:
    """Odd factors int64 [_CHUNK_WORDS], one a position, that look random (the mixer of SplitMix64)."""
    mixed = torch.arange(1, _CHUNK_WORDS + 1, device=device) * _GOLDEN
    mixed = _xor_shift(mixed, 30) * (0xBF58476D1CE4E5B9 - _MODULUS)
    mixed = _xor_shift(mixed, 27) * (0x94D049BB133111EB - _MODULUS)
    return _xor_shift(mixed, 31) | 1
