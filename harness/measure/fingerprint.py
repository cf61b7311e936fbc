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

_CHUNK_WORDS = {"cpu": 1 << 17, "cuda": 1 << 22}  # of 8 bytes: what suits the caches
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # odd; as a signed 64-bit number
_MODULUS = 1 << 64
_MURMUR = (0xFF51AFD7ED558CCD - (1 << 64), 0xC4CEB9FE1A85EC53 - (1 << 64))
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
            yield name, f"{value.__module__}.{_routine_name(value)}"
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


def _routine_name(routine: Any) -> str:
    """Its name; a method made of a partial has none, and is named after the function inside."""
    inner = getattr(routine, "__func__", routine)
    inner = getattr(inner, "func", inner)
    return str(getattr(inner, "__qualname__", type(inner).__qualname__))


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
    positions = {device: _positions(device) for device in {t.device for t in _plain(tensors)}}
    sums: dict[tuple[Any, ...], torch.Tensor] = {}
    for tensor in _plain(tensors):
        key = tensor_key(tensor)
        if key not in sums:
            sums[key] = _mixed_sum(tensor, positions[tensor.device])
    read = _read_all(sums)
    return {
        name: _joined([read[tensor_key(plain)] for plain in plain_tensors(tensor)])
        for name, tensor in tensors.items()
    }


def _plain(tensors: Mapping[Any, torch.Tensor]) -> Iterator[torch.Tensor]:
    for tensor in tensors.values():
        yield from plain_tensors(tensor)


def _chunk_words(device: torch.device) -> int:
    return _CHUNK_WORDS.get(device.type, _CHUNK_WORDS["cpu"])


def _positions(device: torch.device) -> torch.Tensor:
    """What sets the places of a chunk apart: int64 [chunk], multiples of the golden ratio."""
    return torch.arange(_chunk_words(device), device=device).mul_(_GOLDEN)


def _read_all(sums: dict[tuple[Any, ...], torch.Tensor]) -> dict[tuple[Any, ...], int]:
    by_device: dict[torch.device, dict[tuple[Any, ...], torch.Tensor]] = {}
    for key, found in sums.items():
        by_device.setdefault(found.device, {})[key] = found
    read: dict[tuple[Any, ...], int] = {}
    for device, named in by_device.items():
        values = [0] * len(named) if device.type == "meta" else torch.stack([*named.values()]).tolist()
        read.update(zip(named, values, strict=True))
    return read


def _joined(parts: list[int]) -> int:
    total = 0
    for part in parts:
        total = (total * _GOLDEN + part) % _MODULUS
    return total


def _mixed_sum(tensor: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The sum (an int64 scalar on the tensor's device) of its words mixed with their positions."""
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    if tensor.is_meta or not tensor.numel():
        return total
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = raw.numel() // 8 * 8
    words = raw[:whole]
    if words.storage_offset() % 8:
        words = words.clone()
    chunks = [*words.view(torch.int64).split(len(positions))] if whole else []
    for number, chunk in enumerate(chunks):
        first = _signed(number * len(positions) * _GOLDEN)
        total += _mixed(chunk, positions[: chunk.numel()], first).sum()
    if whole < raw.numel():  # at most seven bytes more, each a word
        tail = raw[whole:].to(torch.int64)
        total += _mixed(tail, positions[: tail.numel()], _signed(whole // 8 * _GOLDEN)).sum()
    return total


def _signed(number: int) -> int:
    """The number modulo 2^64 as the signed integer with the same bits."""
    return (number + _MODULUS // 2) % _MODULUS - _MODULUS // 2


def _mixed(words: torch.Tensor, positions: torch.Tensor, first: int) -> torch.Tensor:
    """Each word with its position through the finaliser of MurmurHash3 (a bijection of 64 bits).

    Every bit of a word reaches every bit of the result. A plain weighted sum would not do: the flipped
    signs of two weights are two equal high bits, and those cancel.
    """
    mixed = torch.add(words, positions).add_(first)
    for factor in _MURMUR:
        _xor_shift_(mixed).mul_(factor)
    return _xor_shift_(mixed)


def _xor_shift_(words: torch.Tensor) -> torch.Tensor:
    # int64 shifts are arithmetic; the mask makes this one logical.
    return words.bitwise_xor_((words >> 33).bitwise_and_((1 << 31) - 1))
