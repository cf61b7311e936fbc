"""PEG: a range for each group of embedding dimensions keeps outlier dimensions from spoiling the others.

Paper: Understanding and Overcoming the Challenges of Efficient Transformer Quantization. Yelysei
Bondarenko, Markus Nagel, Tijmen Blankevoort, 2021, arXiv:2109.12948.

Changes: the input, the output and the residual sum of every FFN are rounded to static asymmetric 8 bits
with one range for each of `groups` groups of dimensions. Dimensions are sorted by their calibrated range
first, in one order for the three, so that wide ones share a group. All other activation tensors of the
blocks have one range each, and the linear layers of the blocks are int8.

A linear layer that reads grouped dimensions keeps its columns in that order and computes one int8 product
for each group. No kernel adds, normalises or attends in 8 bits: those tensors are rounded and stay
floats, which is simulated.

Needs: calibration tokens.

Knobs: `groups` (1: one range per tensor; as many as dimensions: one each; K in the paper), `permute` (sort
by range first), `ragged` (groups of nearly equal size where they do not divide the width), `sites` (ffn:
the three; all: every tensor outside attention, the FFN's inner ones in orders of their own), `a_bits` (8 is
all there is), `bits` (8; 16 leaves weights as they are), `w_gran` (one weight scale per tensor as in the
paper, or per output row), `range` (minmax, or running: moved by each batch, with `momentum`).

Hurts: each group is one more product with fewer columns. Where one dimension dwarfs all others sorting
puts the next widest beside it, and unsorted groups can do better. On text unlike the calibration text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field

from harness import ConfigError, Method, NotApplicable, Options, Paper, hookimpl
from harness.nn.activation_grid import ActivationGrid, group_sizes, grouped_grid, tensor_grid
from harness.nn.activation_ranges import ActivationRange, observe_ranges
from harness.nn.activation_sites import IN_ATTENTION, Site, activation_sites

from ._activations import WeightGranularity, calibration_windows, quantize_everywhere
from ._weights import UNTRAINED, ActivationBits, whole_number

if TYPE_CHECKING:
    from torch import nn

    from harness import Context, ModelInfo

__all__ = ["METHOD", "PegOptions", "range_order"]

_TRIO = ("ffn_in", "ffn_out", "ffn_sum")
_STREAM = (*_TRIO, "attn_in", "attn_out", "attn_sum", "block_out")
_INNER = {"context": "context", "ffn_gate": "ffn", "ffn_up": "ffn", "ffn_hidden": "ffn"}


class PegOptions(Options):
    """The paper's six groups with permutation."""

    aliases: ClassVar[Mapping[str, str]] = {"K": "groups", "k": "groups"}

    groups: int = Field(6, ge=1, description="groups of embedding dimensions, each with its range")
    permute: bool = Field(True, description="sort dimensions by range before they are grouped")
    ragged: bool = Field(False, description="groups of nearly equal size where they do not divide the width")
    sites: Literal["ffn", "all"] = Field("ffn", description="tensors with a range per group")
    a_bits: Annotated[Literal[8], BeforeValidator(whole_number)] = Field(
        8, description="bits of an activation"
    )
    bits: ActivationBits = Field(8, description="bits of a weight; 16: as it is")
    w_gran: WeightGranularity = Field("per-tensor", description="what shares a weight scale")
    range: Literal["minmax", "running"] = Field("minmax", description="how a static range is found")
    momentum: float = Field(0.9, ge=0, lt=1, description="of a running range, per batch of 8 windows")


def range_order(widths: Iterable[torch.Tensor]) -> torch.Tensor:
    """The order int64 [d] that sorts dimensions by range, the narrowest first; ties as they come.

    Tensors that are added need the same groups, so they share an order: by the sum of their ranges [d],
    each relative to its mean.
    """
    total = torch.stack([width / width.mean().clamp(min=1e-30) for width in widths]).sum(0)
    return torch.argsort(total, stable=True)


@torch.no_grad()
def transform(model: nn.Module, options: PegOptions, context: Context) -> nn.Module:
    return per_embedding_groups(model, options, calibration_windows(context))


def per_embedding_groups(model: nn.Module, options: PegOptions, batches: Sequence[torch.Tensor]) -> nn.Module:
    """Quantize a model in place, calibrated on batches of token ids [batch, tokens].

    Raises:
        NotApplicable: the groups do not divide a width, and `ragged` is off.
    """
    sites = activation_sites(model)
    shared = _shared_orders(sites, options)
    ranges = observe_ranges(
        model,
        sites,
        batches,
        method=options.range,
        momentum=options.momentum,
        per_dimension={site for together in shared for site in together},
    )
    grids = {
        site: tensor_grid(found.low, found.high, options.a_bits)
        for site, found in ranges.items()
        if found.low.ndim == 0
    }
    for together in shared:
        grids |= _grouped({site: ranges[site] for site in together}, options)
    quantize_everywhere(model, sites, grids, bits=options.bits, w_gran=options.w_gran)
    return model


def _shared_orders(sites: Sequence[Site], options: PegOptions) -> list[list[Site]]:
    """The grouped sites of each block, those with one order together: all as wide as the residual stream."""
    found: dict[tuple[int | None, str], list[Site]] = {}
    for site in sites:
        if site.block is None or site.kind in IN_ATTENTION:
            continue
        if site.kind in (_TRIO if options.sites == "ffn" else _STREAM):
            found.setdefault((site.block, "stream"), []).append(site)
        elif options.sites == "all" and site.kind in _INNER:
            found.setdefault((site.block, _INNER[site.kind]), []).append(site)
    return list(found.values())


def _grouped(ranges: Mapping[Site, ActivationRange], options: PegOptions) -> dict[Site, ActivationGrid]:
    order = range_order(found.width for found in ranges.values()) if options.permute else None
    grids = {}
    for site, found in ranges.items():
        try:
            sizes = group_sizes(found.low.numel(), options.groups, ragged=options.ragged)
        except ConfigError as error:
            raise NotApplicable(f"{site.name}: {error}") from None
        grids[site] = grouped_grid(found.low, found.high, options.a_bits, sizes, order)
    return grids


def applies(info: ModelInfo, options: PegOptions) -> str | None:
    if info.family == "other":
        return f"architecture {info.model_type!r} is not known"
    if info.scratch:
        return UNTRAINED
    try:
        for width in (info.hidden_size, *([info.ffn_size] if options.sites == "all" else [])):
            group_sizes(width, options.groups, ragged=options.ragged)
    except ConfigError as error:
        return str(error)
    return None


METHOD = Method(
    name="peg",
    family="quantization",
    paper=Paper(
        title="Understanding and Overcoming the Challenges of Efficient Transformer Quantization",
        authors="Bondarenko, Nagel, Blankevoort",
        year=2021,
        arxiv="2109.12948",
        venue="EMNLP 2021",
    ),
    options=PegOptions,
    transform=transform,
    needs=("calibration",),
    applies=applies,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
