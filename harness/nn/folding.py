"""Moving a scale per channel from one layer into the next without changing what the block computes.

Dividing a channel by `s` where it is produced and multiplying the input column of every consumer by `s`
preserves the function. Three places in a block allow it: a norm and the layers that read it, the value
and output projections of attention, and the up and down projections of a gated or ReLU FFN.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from harness.errors import NotApplicable, NumericalFailure
from harness.nn.anatomy import Anatomy, NormSite, anatomy_of, norm_sites

__all__ = [
    "POST_NORM",
    "divide_rows",
    "linears_of",
    "multiply_columns",
    "require_foldable_norms",
    "require_unchanged",
    "scale_norm_site",
    "scale_up_down",
    "scale_value_output",
    "value_channels",
]

POST_NORM = (
    "the residual branch reads the output of the norms (post-norm), so a scale cannot be folded into them"
)


def require_foldable_norms(model: nn.Module) -> tuple[NormSite, ...]:
    """The norms of a block that a scale can be folded into.

    Raises:
        NotApplicable: there is none, because the residual branch reads them too.
    """
    sites = norm_sites(model)
    if not sites or anatomy_of(model).residual_reads_norm:
        raise NotApplicable(POST_NORM)
    return sites


def require_unchanged(before: list[torch.Tensor], after: list[torch.Tensor], name: str) -> None:
    """Folding must not change a block; it would where something else reads a norm as well.

    Raises:
        NotApplicable: the outputs differ by more than rounding.
    """
    for old, new in zip(before, after, strict=True):
        tolerance = 1e-3 if old.dtype == torch.float32 else 5e-2
        difference = float((new - old).float().norm() / old.float().norm().clamp(min=1e-30))
        if not difference <= tolerance:
            raise NotApplicable(
                f"smoothing changes what {name} computes (by {difference:.1e}): "
                "something beside the known layers reads its norms"
            )


def linears_of(block: nn.Module, names: Iterable[str], where: str) -> list[nn.Linear]:
    """The linear layers of a block by name.

    Raises:
        NotApplicable: one is missing or no `nn.Linear` (another architecture, or already quantized).
    """
    found = []
    for name in names:
        try:
            module = block.get_submodule(name)
        except AttributeError:
            raise NotApplicable(f"{where} has no layer {name!r}: nothing can be folded there") from None
        if not isinstance(module, nn.Linear):
            raise NotApplicable(
                f"{where}.{name} is a {type(module).__name__}, not an nn.Linear: fold before quantizing"
            )
        found.append(module)
    return found


@torch.no_grad()
def scale_norm_site(block: nn.Module, site: NormSite, scale: torch.Tensor, where: str) -> None:
    """Divide a norm's output by `scale` [d], multiply the columns of all its consumers by it.

    Raises:
        NotApplicable: a consumer is missing, or the norm has no gain.
        NumericalFailure: a value does not fit the type of the weights.
    """
    consumers = linears_of(block, site.consumers, where)
    norm: Any = block.get_submodule(site.norm)
    if getattr(norm, "weight", None) is None:
        raise NotApplicable(f"{where}.{site.norm} has no gain to fold a scale into")
    offset = _gain_offset(norm)  # Gemma keeps gain - 1
    gain = (norm.weight.float() + offset) / scale - offset
    _store(norm.weight, gain, f"{where}.{site.norm}")
    if getattr(norm, "bias", None) is not None:
        _store(norm.bias, norm.bias.float() / scale, f"{where}.{site.norm}")
    for name, linear in zip(site.consumers, consumers, strict=True):
        multiply_columns(linear, scale, f"{where}.{name}")


@torch.no_grad()
def scale_value_output(
    block: nn.Module, anatomy: Anatomy, scale: torch.Tensor, head_dim: int, where: str
) -> None:
    """Divide the value projection's rows by `scale` [kv_heads * head_dim], undo it in the output's columns.

    Every query head of a group reads the same value head, so they share its scales.
    """
    value, out = linears_of(block, (anatomy.qkv[-1], anatomy.out), where)
    per_head = scale.view(-1, 1, head_dim)
    repeats = out.in_features // scale.numel()
    divide_rows(value, scale, f"{where}.{anatomy.qkv[-1]}")
    multiply_columns(out, per_head.expand(-1, repeats, -1).reshape(-1), f"{where}.{anatomy.out}")


def value_channels(peaks: torch.Tensor, kv_channels: int, head_dim: int) -> torch.Tensor:
    """The largest of `peaks` [heads * head_dim] over the query heads that share a value channel."""
    kv_heads = kv_channels // head_dim
    return peaks.view(kv_heads, -1, head_dim).amax(1).reshape(-1)


@torch.no_grad()
def scale_up_down(block: nn.Module, anatomy: Anatomy, scale: torch.Tensor, where: str) -> None:
    """Divide the rows of the last FFN input projection by `scale` [ffn], undo it in the down columns.

    Exact where the product is linear in that projection (a gated FFN) or the activation is ReLU.
    """
    up, down = linears_of(block, (anatomy.ffn_in[-1], anatomy.ffn_out), where)
    divide_rows(up, scale, f"{where}.{anatomy.ffn_in[-1]}")
    multiply_columns(down, scale, f"{where}.{anatomy.ffn_out}")


@torch.no_grad()
def multiply_columns(linear: nn.Linear, scale: torch.Tensor, name: str) -> None:
    """``W[:, j] *= scale[j]``."""
    _store(linear.weight, linear.weight.float() * scale, name)


@torch.no_grad()
def divide_rows(linear: nn.Linear, scale: torch.Tensor, name: str) -> None:
    """``W[i] /= scale[i]``, the bias too."""
    _store(linear.weight, linear.weight.float() / scale[:, None], name)
    if linear.bias is not None:
        _store(linear.bias, linear.bias.float() / scale, name)


def _store(parameter: torch.Tensor, value: torch.Tensor, name: str) -> None:
    parameter.copy_(value)
    if not bool(torch.isfinite(parameter).all()):
        raise NumericalFailure(f"{name}: scaled values do not fit {parameter.dtype}; use another dtype")


def _gain_offset(norm: nn.Module) -> float:
    """0 where the norm multiplies by its weight, 1 where it multiplies by one plus its weight."""
    probe: Any = copy.deepcopy(norm)
    for parameter in probe.parameters():
        parameter.zero_()
    x = torch.linspace(-1, 1, probe.weight.numel(), device=probe.weight.device)
    silent = bool((probe(x.to(probe.weight.dtype)[None]) == 0).all())
    return 0.0 if silent else 1.0
