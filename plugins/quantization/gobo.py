"""GOBO: a few outliers kept exactly, all other weights as 3-bit places in a table of 8 values.

Paper: GOBO: Quantizing Attention-Based NLP Models for Low Latency and Energy Efficient Inference. Ali
Hadi Zadeh, Isak Edo, Omar Mohamed Awad, Andreas Moshovos, 2020, arXiv:2005.03842.

Changes: every linear layer inside the blocks (`targets`: those whose full name contains the regular
expression). The weights of a layer follow a Gaussian; those where its log-density is below `threshold`
are outliers, kept with their place. The others become `bits`-bit indices into a table of the layer
(`scope`: layer), which starts as the means of equally many sorted weights each and is then refined for
the L1 distance, at most `max_iter` times. `embeddings`: the word embedding too, and a head tied to it.

Needs: nothing.

Knobs: `bits`; `threshold` (natural logarithm of a density in the unit of the weights, so narrow layers
keep fewer outliers); `max_iter`; `embeddings`; `scope`; `targets`.

Hurts: at 2 bits. Activations stay in full precision. On CUDA a single row reads the packed indices;
everywhere else the matrix is written out before it is multiplied, which saves memory and no time.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from harness import ConfigError, Method, NotApplicable, NumericalFailure, Options, Paper, hookimpl
from harness.nn.codebook import CodebookLinear
from harness.nn.codebook_embedding import CodebookEmbedding, find_embedding, replace_embedding
from harness.nn.codebook_weight import CodebookWeight, Outliers, nearest_codes
from harness.nn.surgery import Targets, replace_module

from ._weights import quantizable, refusal

if TYPE_CHECKING:
    from torch import nn

    from harness import Context, ModelInfo

__all__ = ["METHOD", "GoboOptions", "find_centroids", "gobo_quantize", "outlier_mask"]


class GoboOptions(Options):
    bits: int = Field(3, ge=2, le=4, description="bits of an index")
    threshold: float = Field(-4.0, description="log-density in the layer's Gaussian that makes an outlier")
    max_iter: int = Field(100, ge=1, description="refinements of the table, at most")
    embeddings: bool = Field(False, description="quantize the word embedding and a tied head too")
    scope: Literal["layer"] = Field("layer", description="what shares a table")
    targets: Targets = Field(None, description="regular expression of full layer names")


def outlier_mask(weight: torch.Tensor, threshold: float) -> torch.Tensor:
    """True where the log-density of the weights' own Gaussian is below `threshold`; none if all are equal."""
    mean, deviation = float(weight.double().mean()), float(weight.double().std(correction=0))
    if deviation == 0:
        return torch.zeros_like(weight, dtype=torch.bool)
    distance = (weight.double() - mean) / deviation
    return -distance.square() / 2 - math.log(deviation * math.sqrt(2 * math.pi)) < threshold


def find_centroids(values: torch.Tensor, bits: int, max_iter: int = 100) -> tuple[torch.Tensor, list[float]]:
    """An ascending table float64 [<= 2^bits] for values, and its L1 distance before every refinement.

    The values are sorted once: clusters are ranges then, and their sums differences of running sums. The
    table is that of the last distance, the smallest. Values of no more kinds than the table has places
    are the table themselves.
    """
    ordered = values.flatten().double().sort().values
    kinds = torch.unique_consecutive(ordered)
    clusters = 2**bits
    if kinds.numel() <= clusters:
        return kinds, [0.0]
    sums = torch.nn.functional.pad(ordered.cumsum(0), (1, 0))  # sums[i]: of the first i values
    edges = torch.arange(clusters + 1, device=values.device) * ordered.numel() // clusters
    table = best = _means(sums, edges, torch.zeros(clusters, dtype=torch.float64, device=values.device))
    distances: list[float] = []
    for _ in range(max_iter):
        halfway = torch.searchsorted(ordered, (table[1:] + table[:-1]) / 2)
        edges = torch.cat([edges[:1], halfway, edges[-1:]])
        distance = _l1_distance(ordered, sums, edges, table)
        if distances and distance >= distances[-1]:
            break
        distances.append(distance)
        best, table = table, _means(sums, edges, table)
    return best, distances


def _means(sums: torch.Tensor, edges: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The mean of each cluster; an empty one keeps what it had `before`."""
    counts = edges.diff()
    return torch.where(counts > 0, sums[edges].diff() / counts.clamp(min=1), before)


def _l1_distance(
    ordered: torch.Tensor, sums: torch.Tensor, edges: torch.Tensor, table: torch.Tensor
) -> float:
    low, high = edges[:-1], edges[1:]
    split = torch.searchsorted(ordered, table).clamp(low, high)  # values before it lie below their centroid
    below = table * (split - low) - (sums[split] - sums[low])
    above = (sums[high] - sums[split]) - table * (high - split)
    return float((below + above).sum())


@torch.no_grad()
def gobo_quantize(
    weight: torch.Tensor, *, bits: int = 3, threshold: float = -4.0, max_iter: int = 100
) -> tuple[CodebookWeight, list[float]]:
    """A matrix [out, in] as indices, table and outliers, and the L1 distances on the way.

    Raises:
        ConfigError: every weight would be an outlier.
        NumericalFailure: a weight is NaN or infinite.
    """
    if not bool(torch.isfinite(weight).all()):
        raise NumericalFailure("weights to quantize are NaN or infinite")
    weight = weight.detach()
    mask = outlier_mask(weight, threshold)
    if bool(mask.all()):
        raise ConfigError(
            f"threshold={threshold} makes every weight an outlier: their standard deviation is "
            f"{float(weight.double().std(correction=0)):.3g}, so use a lower threshold"
        )
    table, distances = find_centroids(weight[~mask], bits, max_iter)
    table = torch.nn.functional.pad(table[None], (0, 2**bits - table.numel()), mode="replicate")[0].float()
    codes = nearest_codes(weight.float(), table)
    places = mask.flatten().nonzero()[:, 0]
    index = places.to(torch.int32) if weight.numel() < 2**31 else places
    outliers = Outliers(index, weight.flatten()[places])
    return CodebookWeight(codes, table, bits, weight.shape[1], outliers=outliers), distances


@torch.no_grad()
def transform(model: nn.Module, options: GoboOptions, context: Context) -> nn.Module:
    names, _ = quantizable(model, group_size=-1, ragged="raise", targets=options.targets)
    embedding = find_embedding(model) if options.embeddings else None
    if options.embeddings and embedding is None:
        raise NotApplicable("embeddings=true: the word embedding is no plain nn.Embedding")
    kept = weights = refinements = 0

    def quantized(name: str, weight: torch.Tensor) -> CodebookWeight:
        nonlocal kept, weights, refinements
        try:
            found, distances = gobo_quantize(
                weight, bits=options.bits, threshold=options.threshold, max_iter=options.max_iter
            )
        except (ConfigError, NumericalFailure) as error:
            raise type(error)(f"{name}: {error}") from None
        assert found.outliers is not None
        kept, weights = kept + found.outliers.index.numel(), weights + weight.numel()
        refinements = max(refinements, len(distances))
        return found

    with context.progress("quantize", len(names)) as done:
        for position, name in enumerate(names):
            linear = model.get_submodule(name)
            layer = CodebookLinear.from_weight(quantized(name, linear.weight), linear.bias)
            replace_module(model, name, layer)
            del linear
            done(position + 1)
    if embedding is not None:
        name, old = embedding
        new = CodebookEmbedding.from_weight(quantized(name, old.weight), old.weight.dtype)
        replace_embedding(model, name, new)
    context.record("outlier_share", kept / weights, "1")
    context.record("most_table_refinements", refinements, "1")
    return model


def applies(info: ModelInfo, options: GoboOptions) -> str | None:
    return refusal(info, group_size=-1, ragged="raise", targets=options.targets)


METHOD = Method(
    name="gobo",
    family="quantization",
    paper=Paper(
        title="GOBO: Quantizing Attention-Based NLP Models for Low Latency and Energy Efficient Inference",
        authors="Zadeh, Edo, Awad, Moshovos",
        year=2020,
        arxiv="2005.03842",
        venue="MICRO 2020",
    ),
    options=GoboOptions,
    transform=transform,
    applies=applies,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
