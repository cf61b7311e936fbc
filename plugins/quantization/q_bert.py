"""Q-BERT: blocks where the loss bends sharply keep more bits; rows share ranges in small groups.

Paper: Q-BERT: Hessian Based Ultra Low Precision Quantization of BERT. Sheng Shen, Zhen Dong, Jiayu Ye et al.,
2020 (AAAI), arXiv:1909.05840.

Changes: every linear layer inside the blocks. A block's sensitivity is ``|mean| + std`` of the top eigenvalue
of the loss Hessian in its weights over `n_subsets` parts of the calibration data, by power iteration
(`power_iters`, `tol`). The `hi_share` most sensitive blocks get `hi_bits`, the others `lo_bits`. Each matrix
has `groups` groups of consecutive output rows (-1: one per row; none spans two heads in part), each with its
own asymmetric range. With `a_bits` 8 tokens are rounded to int8 and the product is exact in int32; 16 leaves
activations. The token embedding is packed in `emb_bits` (16: left), with a head that is tied to it; position
and type embeddings and norms stay. `steps` trains under the rounding, straight through.

The loss is next-token cross-entropy; for encoders, which have no labels here, half the squared distance of
the normalised mean embeddings from the original's, whose Hessian is of the Gauss-Newton form. A gradient
above `grad_norm_max` is noted: far from a minimum the Hessian says little. Differences from the paper: bits
are those that can be packed (2, 3, 4, 8), activations have a dynamic symmetric scale per token, and a group's
scale and zero point are stored with each of its rows, as existing kernels read them ((16 + bits) / columns
bits a weight).

Needs: calibration (unless one number of bits is left for all), training for `steps`.

Knobs: `lo_bits` and `hi_bits` first; then `groups`: more are finer, and free here.

Hurts: at 2 bits without training. The top eigenvalue says nothing of the others, nor of how far rounding
moves the weights: on the bundled models the order of sensitivity is better than its reverse at 3/2 bits
and worse at 4/3. Second derivatives take the memory of a gradient's graph. Models with
random weights (`shape:`) are not analysed: their first blocks get `hi_bits`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field, model_validator
from torch import nn

from harness import ConfigError, Method, Options, Paper, hookimpl
from harness.nn.anatomy import anatomy_of, blocks_of
from harness.nn.integer_linear import IntegerLinear
from harness.nn.quantized import QuantizedLinear
from harness.nn.quantized_embedding import quantize_embedding
from harness.nn.row_groups import quantize_in_row_groups, row_group_sizes
from harness.nn.surgery import replace_module

from ._block_curvature import block_eigenvalues, calibration_loss, distance_loss, sensitivities
from ._row_group_training import RoundedLinear
from ._weights import ActivationBits, EmbeddingBits, WeightBits, quantizable, refusal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness import Context, ModelInfo

__all__ = ["METHOD", "QBertOptions", "allocate"]


class QBertOptions(Options):
    lo_bits: WeightBits = Field(2, description="bits of a weight in the less sensitive blocks")
    hi_bits: WeightBits = Field(3, description="bits of a weight in the more sensitive blocks")
    hi_share: float = Field(0.5, ge=0, le=1, description="share of blocks that get hi_bits")
    groups: int = Field(128, ge=-1, description="row groups of a matrix with a range each; -1: one per row")
    emb_bits: EmbeddingBits = Field(8, description="bits of the token embedding; 16: as it is")
    a_bits: ActivationBits = Field(8, description="bits of an activation; 16: as it is")
    n_subsets: int = Field(10, ge=1, description="parts of the calibration data that eigenvalues vary over")
    power_iters: int = Field(50, ge=1, description="Hessian-vector products for an eigenvalue, at most")
    tol: float = Field(1e-2, gt=0, description="relative change of an eigenvalue that ends the iteration")
    grad_norm_max: float | None = Field(None, gt=0, description="note a larger gradient; default: none")
    steps: int = Field(0, ge=0, description="training steps under the rounding")

    @model_validator(mode="after")
    def _consistent(self) -> QBertOptions:
        if self.lo_bits > self.hi_bits:
            raise ValueError(f"lo_bits={self.lo_bits} is above hi_bits={self.hi_bits}")
        if self.groups == 0:
            raise ValueError("groups must be positive, or -1 for one per row")
        return self

    @property
    def mixes(self) -> bool:
        """Whether blocks can get different bits."""
        return self.lo_bits < self.hi_bits and 0 < self.hi_share < 1


def allocate(omegas: Sequence[float], options: QBertOptions) -> list[int]:
    """Bits of each block: `hi_bits` for the share with the largest sensitivities, earlier ones first."""
    count = round(options.hi_share * len(omegas))
    order = sorted(range(len(omegas)), key=lambda block: -omegas[block])
    high = set(order[:count])
    return [options.hi_bits if block in high else options.lo_bits for block in range(len(omegas))]


def transform(model: nn.Module, options: QBertOptions, context: Context) -> nn.Module:
    names, _ = quantizable(model, group_size=-1, ragged="raise", targets=None)
    sizes = {name: _sizes(model, name, options.groups, context.info) for name in names}
    bits_of_block = allocate(_omegas(model, options, context), options)
    prefixes = [f"{name}." for name, _ in blocks_of(model)]
    bits = {
        name: next(b for b, prefix in zip(bits_of_block, prefixes, strict=True) if name.startswith(prefix))
        for name in names
    }
    if options.steps:
        _train(model, sizes, bits, options, context)
    kind = IntegerLinear if options.a_bits == 8 else QuantizedLinear
    weights = {name: _linear(model, name).weight.numel() for name in names}
    average = sum(bits[name] * count for name, count in weights.items()) / sum(weights.values())
    context.record("average_bits", average, "bits", f"bits of the blocks: {bits_of_block}")
    with torch.no_grad(), context.progress("quantize", len(names)) as done:
        for index, name in enumerate(names):
            linear = _linear(model, name)
            weight = quantize_in_row_groups(linear.weight, bits=bits[name], sizes=sizes[name])
            replace_module(model, name, kind.from_weight(weight, linear.bias))
            del linear
            done(index + 1)
        if options.emb_bits != 16:
            quantize_embedding(model, lambda weight: _packed_rows(weight, options))
    return model


def _packed_rows(weight: torch.Tensor, options: QBertOptions) -> Any:
    groups = weight.shape[0] if options.groups == -1 else min(options.groups, weight.shape[0])
    sizes = row_group_sizes(weight.shape[0], groups)
    return quantize_in_row_groups(weight, bits=options.emb_bits, sizes=sizes)


def _linear(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


def _sizes(model: nn.Module, name: str, groups: int, info: ModelInfo) -> list[int]:
    """The row groups of a layer; those of query, key and value do not split heads.

    Raises:
        ConfigError: more groups than rows, or groups that split a head.
    """
    rows = _linear(model, name).out_features
    width = getattr(model.config, "head_dim", None) or info.head_dim
    has_heads = name.endswith(anatomy_of(model).qkv) and rows % width == 0
    try:
        return row_group_sizes(rows, groups, rows // width if has_heads else 1)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _omegas(model: nn.Module, options: QBertOptions, context: Context) -> list[float]:
    """The sensitivity of each block; equal ones where nothing depends on them."""
    if not options.mixes or context.info.synthetic:
        return [0.0] * len(blocks_of(model))
    tokens = context.calibration()
    if len(tokens) < options.n_subsets:
        raise ConfigError(
            f"n_subsets={options.n_subsets} needs as many calibration sequences; there are {len(tokens)} "
            "(--calibration-samples)"
        )
    found = context.cache(
        {
            "curvature": [options.n_subsets, options.power_iters, options.tol],
            "calibration": list(tokens.shape),
        },
        lambda: block_eigenvalues(
            model,
            tokens.tensor_split(options.n_subsets),
            calibration_loss(context.info.kind),
            context,
            iterations=options.power_iters,
            tolerance=options.tol,
        ),
    )
    omegas = sensitivities(found["eigenvalues"])
    listed = ", ".join(f"{omega:.3g}" for omega in omegas)
    context.record("largest_sensitivity", max(omegas), "1", f"of the blocks: {listed}")
    context.record(
        "unconverged_eigenvalues", found["unconverged"], "1", f"of {len(omegas) * options.n_subsets}"
    )
    norm, most = found["gradient_norm"], options.grad_norm_max
    far = f"above grad_norm_max={most}: the model is not near a minimum" if most and norm > most else None
    context.record("gradient_norm", norm, "1", far)
    return omegas


def _train(
    model: nn.Module,
    sizes: dict[str, list[int]],
    bits: dict[str, int],
    options: QBertOptions,
    context: Context,
) -> None:
    """Train with the linear layers rounded; leaves `RoundedLinear` layers to be packed."""
    for name in sizes:
        rounded = RoundedLinear(
            _linear(model, name), bits=bits[name], sizes=sizes[name], a_bits=options.a_bits
        )
        replace_module(model, name, rounded)
    loss = distance_loss(context.teacher()) if context.info.kind == "encoder" else None
    context.train(model, loss=loss, steps=options.steps)


def applies(info: ModelInfo, options: QBertOptions) -> str | None:
    if reason := refusal(info, group_size=-1, ragged="raise", targets=None):
        return reason
    heads, kv_heads = info.num_heads, info.num_kv_heads
    fused = 3 if info.family == "gpt2" else 1
    for what, rows, units in (
        ("query", fused * heads * info.head_dim, fused * heads),
        ("key", fused * kv_heads * info.head_dim, fused * kv_heads),
        ("output", info.hidden_size, 1),
        ("FFN", info.ffn_size, 1),
    ):
        try:
            row_group_sizes(rows, options.groups, units)
        except ConfigError as error:
            return f"{what} matrix: {error}"
    return None


def needs(options: QBertOptions) -> tuple[str, ...]:
    return (*(["calibration"] if options.mixes else []), *(["training"] if options.steps else []))


METHOD = Method(
    name="q-bert",
    family="quantization",
    paper=Paper(
        title="Q-BERT: Hessian Based Ultra Low Precision Quantization of BERT",
        authors="Shen, Dong, Ye et al.",
        year=2020,
        arxiv="1909.05840",
        venue="AAAI 2020",
    ),
    options=QBertOptions,
    transform=transform,
    needs=needs,
    applies=applies,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
