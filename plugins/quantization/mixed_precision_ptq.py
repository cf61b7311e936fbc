"""Mixed-precision PTQ: a few FFN tensors at 16 bits save an 8-bit encoder that is 8-bit throughout.

Paper: Understanding and Overcoming the Challenges of Efficient Transformer Quantization. Yelysei
Bondarenko, Markus Nagel, Tijmen Blankevoort, 2021, arXiv:2109.12948.

Changes: every activation tensor of the blocks, the embeddings' sum and the head's input and output are
rounded to a static asymmetric grid with one range per tensor, the linear layers of the blocks to int8.
Kinds of tensors chosen by `policy` get `hi_bits` instead of `a_bits`: the residual sum after an FFN has a
few dimensions tens of times wider than the rest, and one 8-bit range leaves nothing for those.

A linear layer multiplies int8 with int8 (codes of 16 bits in two products). No kernel adds, normalises or
attends in 8 or 16 bits: those tensors are rounded and stay floats, which is simulated, and a 16-bit one
holds in bfloat16 what bfloat16 can. Weights outside the blocks stay as they are, and so does what a BERT
computes after its last block but for its logits.

Needs: calibration tokens.

Knobs: `bits` (8; 16 leaves weights as they are), `w_gran` (one weight scale per tensor as in the paper, or
per output row), `a_bits`, `hi_bits` (8, 16; 32: not rounded), `policy` (paper: input, output and sum of
the FFN; search: kinds of tensors by how much 16 bits in each alone helps, until the output differs by at
most `tol` or nothing more fits into `max_share` of all activations), `search_samples` (windows that the
search compares outputs on), `sites` (kinds of tensors, instead of a policy, as ffn_out/ffn_sum), `range`
(running: moved by each batch, with `momentum`; minmax; mse: clipped where that rounds best).

Hurts: attention and sums are imitated, so it is slower than what it imitates. Outliers in tensors that are
kept at 8 bits. On text unlike the calibration text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, field_validator

from harness import Method, Options, Paper, hookimpl
from harness.nn.activation_grid import ActivationQuantizer, tensor_grid
from harness.nn.activation_ranges import ActivationRange, RangeMethod, observe_ranges
from harness.nn.activation_sites import KINDS, Site, activation_sites, put_for_now

from ._activations import (
    WeightGranularity,
    calibration_windows,
    output_distance,
    quantize_everywhere,
    reference_outputs,
)
from ._weights import UNTRAINED, ActivationBits, whole_number

if TYPE_CHECKING:
    from torch import nn

    from harness import Context, ModelInfo

__all__ = ["METHOD", "PAPER_KINDS", "MixedPrecisionOptions", "promote", "rank_kinds"]

PAPER_KINDS = ("ffn_in", "ffn_out", "ffn_sum")
_OFF = 32

SiteBits = Annotated[Literal[8, 16, 32], BeforeValidator(whole_number)]


def _kinds(value: Any) -> Any:
    return tuple(part for part in value.split("/") if part) if isinstance(value, str) else value


class MixedPrecisionOptions(Options):
    """The paper's W8A8 setting with its choice of 16-bit tensors."""

    bits: ActivationBits = Field(8, description="bits of a weight; 16: as it is")
    w_gran: WeightGranularity = Field("per-tensor", description="what shares a weight scale")
    a_bits: SiteBits = Field(8, description="bits of an activation; 32: not rounded")
    hi_bits: SiteBits = Field(16, description="bits of the chosen activations; 32: not rounded")
    policy: Literal["paper", "search"] = Field("paper", description="which tensors get hi_bits")
    sites: Annotated[tuple[str, ...] | None, BeforeValidator(_kinds)] = Field(
        None, description="kinds of tensors that get hi_bits, instead of a policy"
    )
    tol: float = Field(0.01, ge=0, description="search: difference of the output that is small enough")
    max_share: float = Field(0.25, ge=0, le=1, description="search: share of activations at hi_bits, at most")
    search_samples: int = Field(16, ge=1, description="search: calibration windows to compare outputs on")
    range: RangeMethod = Field("running", description="how a static range is found")
    momentum: float = Field(0.9, ge=0, lt=1, description="of a running range, per batch of 8 windows")

    @field_validator("sites")
    @classmethod
    def _known(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        unknown = [kind for kind in value or () if kind not in KINDS]
        if unknown:
            raise ValueError(f"no activation is called {unknown[0]!r}; there are {', '.join(KINDS)}")
        return value


def rank_kinds(loss: Callable[[frozenset[str]], float], kinds: Sequence[str]) -> list[tuple[str, float]]:
    """Kinds of tensors with the loss that is left when each alone is promoted, the best first."""
    left = [(kind, loss(frozenset({kind}))) for kind in kinds]
    return sorted(left, key=lambda entry: entry[1])


def promote(
    loss: Callable[[frozenset[str]], float],
    ranking: Sequence[str],
    shares: Mapping[str, float],
    *,
    tol: float,
    max_share: float,
) -> tuple[str, ...]:
    """Promote kinds in the order of their rank until the loss is at most `tol`.

    A kind that would lift the share of promoted activations over `max_share` is passed over.
    """
    chosen: tuple[str, ...] = ()
    for kind in ranking:
        if loss(frozenset(chosen)) <= tol:
            break
        if sum(shares[one] for one in (*chosen, kind)) <= max_share:
            chosen = (*chosen, kind)
    return chosen


@torch.no_grad()
def transform(model: nn.Module, options: MixedPrecisionOptions, context: Context) -> nn.Module:
    return mixed_precision(model, options, calibration_windows(context), context.record)


def mixed_precision(
    model: nn.Module,
    options: MixedPrecisionOptions,
    batches: Sequence[torch.Tensor],
    record: Callable[[str, float, str, str | None], None],
) -> nn.Module:
    """Quantize a model in place, calibrated on batches of token ids [batch, tokens].

    Args:
        record: gets what was found: ``record(name, value, unit, note)``.
    """
    sites = activation_sites(model)

    def observed(bits: int) -> dict[Site, ActivationRange]:
        return observe_ranges(
            model, sites, batches, method=options.range, momentum=options.momentum, bits=min(bits, 16)
        )

    low = high = observed(options.a_bits)
    if options.range == "mse" and options.hi_bits != options.a_bits:  # what to clip depends on the bits
        high = observed(options.hi_bits)
    shares = _shares(low)
    if options.sites is not None:
        chosen = tuple(kind for kind in options.sites if kind in shares)
    elif options.policy == "paper":
        chosen = PAPER_KINDS
    else:
        chosen = _search(model, low, high, shares, options, batches, record)
    record("share_at_hi_bits", sum(shares[kind] for kind in chosen), "1", ", ".join(chosen) or None)
    grids = {}
    for site in sites:
        bits, ranges = (options.hi_bits, high) if site.kind in chosen else (options.a_bits, low)
        if bits != _OFF:
            grids[site] = tensor_grid(ranges[site].low, ranges[site].high, bits)
    quantize_everywhere(model, sites, grids, bits=options.bits, w_gran=options.w_gran)
    return model


def _shares(ranges: Mapping[Site, ActivationRange]) -> dict[str, float]:
    """The share of each kind in all activations that calibration computed."""
    total = sum(found.elements for found in ranges.values())
    shares: dict[str, float] = {}
    for site, found in ranges.items():
        shares[site.kind] = shares.get(site.kind, 0.0) + found.elements / total
    return shares


def _search(
    model: nn.Module,
    low_ranges: Mapping[Site, ActivationRange],
    high_ranges: Mapping[Site, ActivationRange],
    shares: Mapping[str, float],
    options: MixedPrecisionOptions,
    batches: Sequence[torch.Tensor],
    record: Callable[[str, float, str, str | None], None],
) -> tuple[str, ...]:
    """The kinds to promote, by the outputs of the model with its own weights and rounded activations."""
    windows: list[torch.Tensor] = []
    for batch in batches:
        room = options.search_samples - sum(map(len, windows))
        windows += [batch[:room]] if room > 0 else []
    reference = reference_outputs(model, windows)
    low, high = (
        {
            site: torch.nn.Identity()
            if bits == _OFF
            else ActivationQuantizer(tensor_grid(r.low, r.high, bits))
            for site, r in ranges.items()
        }
        for bits, ranges in ((options.a_bits, low_ranges), (options.hi_bits, high_ranges))
    )

    def loss(promoted: frozenset[str]) -> float:
        modules = {site: (high if site.kind in promoted else low)[site] for site in low}
        with put_for_now(model, modules):
            return output_distance(model, windows, reference)

    ranking = rank_kinds(loss, list(shares))
    kinds = [kind for kind, _ in ranking]
    chosen = promote(loss, kinds, shares, tol=options.tol, max_share=options.max_share)
    record("search_loss_before", loss(frozenset()), "1", "outputs with all activations at a_bits")
    record("search_loss", loss(frozenset(chosen)), "1", "ranking: " + ", ".join(kinds))
    return chosen


def applies(info: ModelInfo, options: MixedPrecisionOptions) -> str | None:
    if info.family == "other":
        return f"architecture {info.model_type!r} is not known"
    return UNTRAINED if info.scratch else None


METHOD = Method(
    name="mixed-precision-ptq",
    family="quantization",
    paper=Paper(
        title="Understanding and Overcoming the Challenges of Efficient Transformer Quantization",
        authors="Bondarenko, Nagel, Blankevoort",
        year=2021,
        arxiv="2109.12948",
        venue="EMNLP 2021",
    ),
    options=MixedPrecisionOptions,
    transform=transform,
    needs=("calibration",),
    applies=applies,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
