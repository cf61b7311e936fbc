"""The state of linear layers: what they store, how sparse they are, what runs them.

A linear layer is anything with `in_features` and `out_features`: `nn.Linear` and every quantized or
sparse replacement. A replacement keeps all that it stores in parameters and buffers and may say

- ``simulated: bool``: it computes the paper's form in dense arithmetic (absent: it does not);
- ``kernel_name: str``: what runs it;
- ``pattern: str``: the N:M of its zeros, as ``3:8``; reported where the weights hold it;
- ``bits: float``: the nominal bits of a stored weight, for the ratio on paper;
- ``dense_weight() -> Tensor``: the weight [out, in] it stands for, so that its zeros can be counted;
- ``folded_biases: int``: biases that it holds inside another tensor, which count as parameters too.

An embedding is anything with `num_embeddings` and `embedding_dim`: `nn.Embedding` and every packed
replacement, which keeps its rows in buffers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from harness.measure.storage import bytes_per_tensor, tensor_key

__all__ = [
    "LinearState",
    "is_embedding_like",
    "is_linear_like",
    "linear_states",
    "nm_pattern",
    "own_parameter_count",
    "packed_rows",
    "parameter_count",
    "sparsity",
]

_PATTERNS = ((1, 16), (1, 8), (1, 4), (2, 8), (2, 4), (4, 8))  # the strictest first


@dataclass(frozen=True, slots=True)
class LinearState:
    """One linear layer, measured.

    `weights` is ``in_features * out_features``, `parameters` counts the bias too; `held_bytes` is all
    that the layer holds, `weight_bytes` the same without the bias.
    """

    kind: str
    dtype: str
    weights: int
    parameters: int
    held_bytes: int
    weight_bytes: int
    stored_bits_per_weight: float
    nominal_bits: float | None
    sparsity: float | None
    nm_pattern: str | None
    simulated: bool
    kernel: str | None


def linear_states(model: nn.Module, prefixes: tuple[str, ...]) -> dict[str, LinearState]:
    """The linear layers whose full name starts with one of the prefixes; none inside another."""
    states: dict[str, LinearState] = {}
    inside = ""
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if is_linear_like(module) and name.startswith(prefixes):
            states[name] = _state(module)
            inside = f"{name}."
    return states


def is_linear_like(module: nn.Module) -> bool:
    """True for modules that say how many features they take and make."""
    features = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(size, int) for size in features)


def is_embedding_like(module: nn.Module) -> bool:
    """True for modules that say how many rows they hold and how wide those are."""
    sizes = (getattr(module, "num_embeddings", None), getattr(module, "embedding_dim", None))
    return all(isinstance(size, int) for size in sizes)


def packed_rows(module: nn.Module) -> int:
    """The weights that an embedding without parameters of its own stands for; 0 for any other module."""
    if not is_embedding_like(module) or any(True for _ in module.parameters(recurse=False)):
        return 0
    rows, width = getattr(module, "num_embeddings", 0), getattr(module, "embedding_dim", 0)
    return int(rows) * int(width)


def own_parameter_count(module: nn.Module) -> int:
    """Logical parameters of a module that is no linear layer, without its children's."""
    return packed_rows(module) + sum(parameter.numel() for parameter in module.parameters(recurse=False))


@torch.no_grad()
def _state(module: nn.Module) -> LinearState:
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    # A bias is not a weight, wherever in the layer it is kept.
    weight_tensors = [t for name, t in named.items() if name.rpartition(".")[2] != "bias"]
    bias_tensors = [t for name, t in named.items() if name.rpartition(".")[2] == "bias"]
    weight_bytes = bytes_per_tensor(weight_tensors)
    out_features, in_features = _shape(module)
    weights = out_features * in_features
    dense = _dense_weight(module)
    zeros = None if dense is None else sparsity(dense)
    return LinearState(
        kind=type(module).__name__,
        dtype=_dtype(module, weight_tensors),
        weights=weights,
        parameters=weights
        + sum(bias.numel() for bias in bias_tensors)
        + int(getattr(module, "folded_biases", 0)),
        held_bytes=bytes_per_tensor(named.values()),
        weight_bytes=weight_bytes,
        stored_bits_per_weight=8 * weight_bytes / weights if weights else 0.0,
        nominal_bits=_nominal_bits(module),
        sparsity=zeros,
        nm_pattern=None
        if dense is None or not zeros
        else nm_pattern(dense, str(getattr(module, "pattern", ""))),
        simulated=bool(getattr(module, "simulated", False)),
        kernel=getattr(module, "kernel_name", None),
    )


def sparsity(weight: torch.Tensor) -> float:
    """The share of exact zeros."""
    if not weight.numel():
        return 0.0
    return 1.0 - int(torch.count_nonzero(weight)) / weight.numel()


def nm_pattern(weight: torch.Tensor, said: str = "") -> str | None:
    """``N:M`` where in every group of M inputs at most N weights are not zero; the strictest found.

    A weight that is zero altogether has no pattern.

    Args:
        said: the pattern that the layer says it has, as ``3:8``; looked for beside the usual ones.

    >>> nm_pattern(torch.tensor([[0.0, 1.0, 2.0, 0.0], [3.0, 0.0, 0.0, 0.0]]))
    '2:4'
    >>> nm_pattern(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), "3:4")
    '3:4'
    """
    filled = weight != 0
    zeros = 1.0 - int(filled.sum()) / max(filled.numel(), 1)
    if zeros == 1.0:
        return None
    patterns = set(_PATTERNS)
    if re.fullmatch(r"\d+:[1-9]\d*", said):
        n, _, m = said.partition(":")
        patterns.add((int(n), int(m)))
    # Of patterns with as many zeros the one of shorter groups is the stricter.
    for kept, group in sorted(patterns, key=lambda each: (each[0] / each[1], each[1])):
        if weight.shape[-1] % group or zeros < 1.0 - kept / group:
            continue
        in_group = filled.reshape(-1, group).sum(dim=-1)
        if int(in_group.max()) <= kept:
            return f"{kept}:{group}"
    return None


def parameter_count(model: nn.Module, linears: Mapping[str, LinearState]) -> int:
    """Logical parameters: in x out (and bias) of the given linear layers, plus all other parameters.

    A packed weight or embedding counts as the weights it stands for; tied parameters count once.
    """
    counted: set[object] = set()
    total = sum(state.parameters for state in linears.values())
    total += sum(packed_rows(module) for module in model.modules())
    for name, parameter in model.named_parameters():
        if _owner_among(name, linears):
            continue
        key = tensor_key(parameter) if type(parameter) is nn.Parameter else id(parameter)
        if key not in counted:
            counted.add(key)
            total += parameter.numel()
    return total


def _owner_among(name: str, linears: Mapping[str, LinearState]) -> bool:
    while name:
        name = name.rpartition(".")[0]
        if name in linears:
            return True
    return False


def _dense_weight(module: nn.Module) -> torch.Tensor | None:
    """The weight [out, in] as floats, where the layer has one or can make one."""
    make = getattr(module, "dense_weight", None)
    weight = make() if callable(make) else getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return None
    if weight.is_meta or tuple(weight.shape) != _shape(module):
        return None
    if weight.layout != torch.strided:
        return weight.to_dense()
    if type(weight) in (torch.Tensor, nn.Parameter):
        return weight
    unpack = getattr(weight, "dequantize", None)
    try:
        # A packed tensor of another library: it knows itself what it stands for, or it does not.
        return unpack() if callable(unpack) else weight.to_dense()
    except NotImplementedError:
        return None


def _shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features)."""
    sizes = (getattr(module, "out_features", 0), getattr(module, "in_features", 0))
    return int(sizes[0]), int(sizes[1])


def _nominal_bits(module: nn.Module) -> float | None:
    bits = getattr(module, "bits", None)
    if isinstance(bits, (int, float)):
        return float(bits)
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.is_floating_point():
        return 8.0 * weight.element_size()
    return None


def _dtype(module: nn.Module, tensors: list[torch.Tensor]) -> str:
    """The dtype of the largest tensor: the packed weight, not its scales."""
    weight = getattr(module, "weight", None)
    largest = (
        weight
        if isinstance(weight, torch.Tensor)
        else max(tensors, key=lambda tensor: tensor.numel() * tensor.element_size(), default=None)
    )
    return "" if largest is None else str(largest.dtype).removeprefix("torch.")
