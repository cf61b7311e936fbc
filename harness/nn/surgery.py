"""Finding and replacing modules, the same way in every family.

GPT-2 keeps its weights in transformers' `Conv1D`, transposed. `conv1d_to_linear` turns those into
`nn.Linear` once, at loading, so that every method meets `nn.Linear` with a weight `[out, in]` only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Annotated

import torch
from pydantic import AfterValidator
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from harness.errors import ConfigError
from harness.nn.anatomy import anatomy_of, blocks_of

__all__ = [
    "Targets",
    "block_linears",
    "conv1d_to_linear",
    "linear_from",
    "replace_linears",
    "replace_module",
]


def _regular_expression(value: str | None) -> str | None:
    try:
        re.compile(value or "")
    except re.error as error:
        raise ValueError(f"is no regular expression ({error})") from None
    return value


Targets = Annotated[str | None, AfterValidator(_regular_expression)]
"""The type of an option for `block_linears`: a regular expression of layers' names, or None for all."""


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where `name` (dotted, from `model`) is. The training flag carries over."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    old = getattr(parent, child)
    new.train(old.training)
    setattr(parent, child, new)


def linear_from(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """An `nn.Linear` that owns `weight` ([out, in]) and `bias` ([out]) without copying them."""
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=bias.requires_grad)
    return linear


def conv1d_to_linear(model: nn.Module) -> int:
    """Replace every `Conv1D` (weight [in, out]) by the equal `nn.Linear`; returns how many."""
    from transformers.pytorch_utils import Conv1D

    names = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    for name in names:
        conv = model.get_submodule(name)
        assert isinstance(conv, Conv1D)
        linear = linear_from(conv.weight.detach().t().contiguous(), conv.bias.detach())
        # What was trainable stays so: a detached tensor has lost the flag.
        linear.weight.requires_grad_(conv.weight.requires_grad)
        linear.bias.requires_grad_(conv.bias.requires_grad)
        replace_module(model, name, linear)
    return len(names)


def block_linears(model: nn.Module, *, targets: str | None = None) -> Iterator[tuple[str, nn.Linear]]:
    """The `nn.Linear` layers inside the blocks, in the order in which they run, by full name.

    Embeddings, norms and the output head are not inside the blocks. Layers that a method already
    replaced by another class are not `nn.Linear` and so are left out, and so are those whose weight another
    library packed into a tensor of its own (torchao).

    Args:
        targets: a regular expression that the full name must contain.

    Raises:
        ConfigError: `targets` is no regular expression or matches nothing.
    """
    try:
        pattern = re.compile(targets) if targets else None
    except re.error as error:
        raise ConfigError(f"targets {targets!r} is no regular expression: {error}") from None
    order = anatomy_of(model).linears
    found = 0
    for prefix, block in blocks_of(model):
        inside = {
            name: module
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear) and not is_traceable_wrapper_subclass(module.weight)
        }
        ranked = sorted(inside, key=lambda n: order.index(n) if n in order else len(order))
        for name in ranked:
            full = f"{prefix}.{name}"
            if pattern is None or pattern.search(full):
                found += 1
                yield full, inside[name]
    if pattern is not None and not found:
        raise ConfigError(f"targets {targets!r} matches no linear layer inside the blocks")


def replace_linears(
    model: nn.Module,
    make: Callable[[str, nn.Linear], nn.Module],
    *,
    targets: str | None = None,
) -> nn.Module:
    """Replace each of `block_linears` by ``make(full_name, linear)``; returns the model.

    One layer at a time, so that at most one full-precision weight lives beside its replacement.
    """
    for name in [name for name, _ in block_linears(model, targets=targets)]:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        replace_module(model, name, make(name, linear))
        del linear
    return model
