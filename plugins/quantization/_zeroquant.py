"""What `zeroquant` and `zeroquant-lkd` share: their options, and packing one block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field, field_validator
from torch import nn

from harness import ConfigError, NotApplicable, NumericalFailure, Options, Paper
from harness.nn.anatomy import anatomy_of, norm_sites
from harness.nn.quantized import Int8Linear
from harness.nn.quantized_tokens import QuantizingNorm, quantize_input_once
from harness.nn.quantizer import quantize_row_groups
from harness.nn.surgery import replace_module

from ._weights import Int8Bits, WeightBits, quantizable, refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from harness import Context, ModelInfo
    from harness.nn.anatomy import Anatomy, NormSite
    from harness.nn.quantizer import QuantizedWeight

__all__ = ["PAPER", "BlockPacker", "ZeroQuantLayout", "misfit"]

PAPER = Paper(
    title="ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers",
    authors="Yao, Yazdani Aminabadi, Zhang, Wu, Li, He",
    year=2022,
    arxiv="2206.01861",
    venue="NeurIPS 2022",
)


class ZeroQuantLayout(Options):
    """How a block is stored and multiplied; the methods differ in how they find its weights."""

    w_bits_attn: WeightBits = Field(8, description="bits of a weight of the attention")
    w_bits_ffn: WeightBits = Field(8, description="bits of a weight of the FFN; 4: W4A8")
    w_groups: int = Field(-1, ge=-1, description="groups of output rows with a scale; -1: one per row")
    a_bits: Int8Bits = Field(8, description="bits of an activation")
    fuse: bool = Field(True, description="quantize in the norm, once for all layers that read it")

    @field_validator("w_groups")
    @classmethod
    def _not_zero(cls, value: int) -> int:
        if value == 0:
            raise ValueError("must be positive, or -1 for one scale per output row")
        return value


@dataclass(frozen=True)
class BlockPacker:
    """Replaces the linear layers of a model's blocks, one block at a time.

    Args:
        names: the linear layers to quantize, by full name.
        sites: norms that nothing but linear layers reads.
    """

    layout: ZeroQuantLayout
    anatomy: Anatomy
    names: tuple[str, ...]
    sites: tuple[NormSite, ...]

    @classmethod
    def of(cls, model: nn.Module, layout: ZeroQuantLayout) -> BlockPacker:
        """For an unquantized model.

        Raises:
            NotApplicable: it is quantized already, or `w_groups` does not divide the rows of a layer.
        """
        names, _ = quantizable(model, group_size=-1, ragged="raise", targets=None)
        for name in names:
            rows = model.get_submodule(name).out_features
            if layout.w_groups != -1 and rows % layout.w_groups:
                raise NotApplicable(
                    f"w_groups {layout.w_groups} does not divide the {rows} rows of {name}; "
                    "choose a divisor, or -1 for one scale per row"
                )
        anatomy = anatomy_of(model)
        sites = () if anatomy.residual_reads_norm else norm_sites(model)
        return cls(layout, anatomy, tuple(names), sites)

    def linears(self, block: nn.Module, name: str) -> Iterator[tuple[str, nn.Linear, int]]:
        """Name inside the block, layer and bits of each linear layer of the block called `name`."""
        ffn = {*self.anatomy.ffn_in, self.anatomy.ffn_out}
        for full in self.names:
            if full.startswith(f"{name}."):
                inside = full.removeprefix(f"{name}.")
                linear = block.get_submodule(inside)
                assert isinstance(linear, nn.Linear)
                yield inside, linear, self.layout.w_bits_ffn if inside in ffn else self.layout.w_bits_attn

    def quantize(self, name: str, weight: torch.Tensor, bits: int) -> QuantizedWeight:
        """Round a matrix [out, in]; failures name the layer."""
        row_groups = weight.shape[0] if self.layout.w_groups == -1 else self.layout.w_groups
        try:
            return quantize_row_groups(weight, bits=bits, row_groups=row_groups)
        except (NumericalFailure, ConfigError) as error:
            raise type(error)(f"{name}: {error}") from None

    def pack(self, block: nn.Module, name: str) -> int:
        """Quantize the block called `name` in place; returns how many of its norms quantize their output."""
        for inside, linear, bits in self.linears(block, name):
            weight = self.quantize(f"{name}.{inside}", linear.weight, bits)
            layer = Int8Linear.from_weight(weight, linear.bias, row_groups=self.layout.w_groups)
            replace_module(block, inside, layer)
            del linear
        return self._fuse(block, name) if self.layout.fuse else 0

    def _fuse(self, block: nn.Module, name: str) -> int:
        # A layer that a method before this one packed may not take tokens that are quantized already.
        mine = {full.removeprefix(f"{name}.") for full in self.names if full.startswith(f"{name}.")}
        fused: set[str] = set()
        for site in self.sites:
            norm = (
                QuantizingNorm.from_norm(block.get_submodule(site.norm))
                if mine >= {*site.consumers}
                else None
            )
            if norm is not None:
                replace_module(block, site.norm, norm)
                fused |= {*site.consumers}
        qkv = {*self.anatomy.qkv}
        if len(qkv) > 1 and mine >= qkv and not qkv & fused:
            quantize_input_once(block.get_submodule(self.anatomy.attention))
        return sum(1 for site in self.sites if fused & {*site.consumers})

    def record(self, context: Context, fused: int) -> None:
        """Store how many norms were fused, and why none where there is none."""
        note = None
        if self.layout.fuse and not fused:
            note = "the residual branch reads the norms too; query, key and value share one quantization"
            if self.sites:
                note = "the norms are of an unknown kind, or layers that another method packed read them too"
        context.record("fused_norms", fused, "norms", note)


def misfit(info: ModelInfo, layout: ZeroQuantLayout) -> str | None:
    """Why a model does not fit, as far as its configuration tells."""
    reason = refusal(info, group_size=-1, ragged="raise", targets=None)
    if reason is not None or layout.w_groups == -1:
        return reason
    for what, size in (("hidden size", info.hidden_size), ("FFN size", info.ffn_size)):
        if size % layout.w_groups:
            return f"w_groups {layout.w_groups} does not divide the {what} {size}; choose a divisor, or -1"
    return None
