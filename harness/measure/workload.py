"""What one prefill and one decode step have to compute and to read, counted on the modules that ran.

- **Linear layers**: ``2 · rows · in · out`` operations for every call of a linear layer (whatever it stores),
  with the rows that it was really called with: the head of a decoder sees one position at prefill, a skipped
  layer counts nothing.
- **Attention**: ``4 · batch · width`` operations for every pair of a query and a key that it may see (``QKᵀ``
  and ``PV``; `width` is heads × head size, of the output projection): ``T·(T+1)/2`` pairs for a causal
  prefill of T tokens, fewer under a window, ``T²`` in an encoder; a step sees the keys that are stored when
  half of the new tokens are made.
- **Bytes of a step**: the parameters and buffers of all modules that ran, as stored, once each (of an
  embedding the rows that were looked up), and the keys and values that are stored at that time. Nothing can
  run without reading those, so a time below these bytes over the bandwidth is impossible.

Norms, activations, softmax and rotary embeddings are left out, as usual for model FLOPs: they are below one
per cent of the operations.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from harness.errors import NotApplicable
from harness.measure.generation import Generation, forward_only, random_prompt
from harness.measure.linears import is_embedding_like, is_linear_like
from harness.measure.meter import Measured
from harness.measure.storage import bytes_per_tensor, own_tensors, tensors_in
from harness.nn.anatomy import anatomy_of, blocks_of
from harness.nn.quantized_tokens import QuantizedTokens

__all__ = ["PhaseWork", "Work", "cache_of", "cache_read_bytes", "counted", "visible_pairs", "work_of"]

_SHARED = "work"


@dataclass(frozen=True, slots=True)
class PhaseWork:
    """One call: floating-point operations, and the bytes that it cannot avoid reading."""

    linear_flops: float
    attention_flops: float
    weight_bytes: int
    cache_bytes: float = 0.0

    @property
    def flops(self) -> float:
        return self.linear_flops + self.attention_flops

    @property
    def read_bytes(self) -> float:
        return self.weight_bytes + self.cache_bytes


@dataclass(frozen=True, slots=True)
class Work:
    """Both phases; `decode` is None where nothing is decoded."""

    prefill: PhaseWork
    decode: PhaseWork | None


@dataclass
class Counter:
    """What ran under `counted`: linear operations, and the tensors that were read."""

    linear_flops: float = 0.0
    read: list[torch.Tensor] = field(default_factory=list)
    looked_up: Mapping[int, int] = field(default_factory=dict)  # bytes by embedding

    @property
    def weight_bytes(self) -> int:
        return bytes_per_tensor(self.read) + sum(self.looked_up.values())


def work_of(measured: Measured) -> Work:
    """Counted once a cell, by one eager run that warms everything up as well."""
    if _SHARED not in measured.shared:
        measured.shared[_SHARED] = _count(measured)
    work = measured.shared[_SHARED]
    assert isinstance(work, Work)
    return work


@contextmanager
def counted(model: nn.Module) -> Iterator[Counter]:
    """Count the linear operations and the weights of everything that runs inside."""
    counter = Counter()
    looked_up: dict[int, int] = {}
    counter.looked_up = looked_up
    seen: set[int] = set()

    def linear_ran(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kinds = (torch.Tensor, QuantizedTokens)
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, kinds)]
        if inputs:
            counter.linear_flops += 2.0 * inputs[0].numel() * _size(module, "out_features")
        if id(module) not in seen:
            seen.add(id(module))
            counter.read += [*module.parameters(), *module.buffers()]

    def embedding_ran(module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, torch.Tensor):
            held = bytes_per_tensor(tensor for _, tensor in own_tensors(module))
            table = max(_size(module, "num_embeddings"), 1)
            rows = output.numel() // max(_size(module, "embedding_dim"), 1)
            looked_up[id(module)] = min(rows, table) * held // table

    def other_ran(module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        if id(module) not in seen:
            seen.add(id(module))
            counter.read += [tensor for _, tensor in own_tensors(module)]

    handles = []
    inside = ""
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if is_linear_like(module):
            handles.append(module.register_forward_pre_hook(linear_ran, with_kwargs=True))
            inside = f"{name}."
        elif is_embedding_like(module):
            handles.append(module.register_forward_hook(embedding_ran))
        elif any(True for _ in own_tensors(module)):
            handles.append(module.register_forward_pre_hook(other_ran, with_kwargs=True))
    try:
        with _not_compiled():
            yield counter
    finally:
        for handle in handles:
            handle.remove()


def visible_pairs(tokens: int, window: int | None = None, *, causal: bool = True) -> float:
    """Pairs of a query and a key that it sees, for one sequence.

    >>> visible_pairs(4), visible_pairs(4, window=2), visible_pairs(4, causal=False)
    (10.0, 7.0, 16.0)
    """
    if not causal:
        return float(tokens * tokens)
    limit = min(tokens, window or tokens)
    return limit * (limit + 1) / 2 + (tokens - limit) * float(limit)


def cache_of(generation: Generation) -> Any:
    """The cache that a generation fills: the one of fixed size, or the model's own growing one."""
    return generation.cache


def cache_read_bytes(cache: Any, tokens: float) -> float:
    """Bytes of a cache that attention reads when so many tokens are stored in each sequence."""
    layers = getattr(cache, "layers", None) or ()
    keys = [getattr(layer, "keys", None) for layer in layers]
    if not keys or not all(isinstance(each, torch.Tensor) and each.dim() >= 2 for each in keys):
        return float(bytes_per_tensor(tensor for tensor in tensors_in(cache) if tensor.numel() > 1))
    total = 0.0
    for layer, key in zip(layers, keys, strict=True):
        assert isinstance(key, torch.Tensor)
        filled = min(1.0, tokens / max(key.shape[-2], 1))
        total += filled * bytes_per_tensor([key, layer.values])
    return total


# --- one cell -----------------------------------------------------------------------------------------


def _count(measured: Measured) -> Work:
    scenario, info = measured.scenario, measured.info
    model = getattr(measured.model, "_orig_mod", measured.model).eval()
    prompt = random_prompt(
        info.vocab_size, scenario.batch_size, scenario.prompt_len, measured.seed, measured.device
    )
    if info.kind == "encoder":
        with counted(model) as forward:
            forward_only(model, prompt)
        attention = sum(
            4.0 * scenario.batch_size * width * visible_pairs(scenario.prompt_len, causal=False)
            for width, _ in _attention_layers(measured, model)
        )
        return Work(PhaseWork(forward.linear_flops, attention, forward.weight_bytes), None)
    generation = Generation(model, prompt, max(scenario.new_tokens, 1))
    with counted(model) as prefill:
        generation.prefill()
    with counted(model) as step:
        generation.step()
    stored = scenario.prompt_len + (scenario.new_tokens + 1) / 2
    layers = _attention_layers(measured, model)
    at_prefill = sum(width * visible_pairs(scenario.prompt_len, window) for width, window in layers)
    at_step = sum(width * min(stored, window or stored) for width, window in layers)
    decode = PhaseWork(
        step.linear_flops,
        4.0 * scenario.batch_size * at_step,
        step.weight_bytes,
        cache_read_bytes(cache_of(generation), stored),
    )
    return Work(
        PhaseWork(prefill.linear_flops, 4.0 * scenario.batch_size * at_prefill, prefill.weight_bytes),
        decode if scenario.new_tokens else None,
    )


def _attention_layers(measured: Measured, model: nn.Module) -> list[tuple[int, int | None]]:
    """(heads x head size, window) of each layer that attends; recurrent layers are left out."""
    info = measured.info
    try:
        out = anatomy_of(model).out
        widths = [_size(block.get_submodule(out), "in_features") for _, block in blocks_of(model)]
    except (NotApplicable, AttributeError):
        widths = [info.num_heads * info.head_dim] * info.num_layers
    windows = _windows(model, len(widths))
    return [
        (width, window) for width, window in zip(widths, windows, strict=True) if window is None or window
    ]


def _windows(model: nn.Module, layers: int) -> list[int | None]:
    """The window of each layer: None for all tokens, 0 for a layer that does not attend."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    from harness.nn.ring_cache import ring_size

    config = getattr(model, "config", None)
    if config is None:
        return [None] * layers
    types, options = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    known: dict[str, int | None] = {
        "full_attention": None,
        "sliding_attention": options.get("sliding_window"),
    }
    found = [known[kind] if kind in known else ring_size(kind) or 0 for kind in types]
    return found if len(found) == layers else [None] * layers


def _size(module: nn.Module, name: str) -> int:
    size = getattr(module, name, 0)
    return size if isinstance(size, int) else 0


def _not_compiled() -> AbstractContextManager[Any]:
    """Compiled parts run as they were written: a hook in compiled code would compile it anew."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
