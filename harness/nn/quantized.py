"""Linear layers whose weights are stored as packed integers; what is stored is what runs.

`QuantizedLinear` keeps activations in full precision (W4A16 and the like), `Int8Linear` multiplies
integers with integers (W8A8). Both take the place of an `nn.Linear` in any model, work on inputs of any
number of dimensions and on empty ones, decide by shapes and types only (so a CUDA graph can be captured)
and keep everything they need in their state dict.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from harness.errors import ConfigError, NotApplicable
from harness.kernels import int8, packed_int8, weight_only
from harness.nn.kept_types import KeptTypes
from harness.nn.packing import (
    PLANES,
    PackedWeight,
    choose_tile,
    pack_matrix,
    pack_weight,
    packed_columns,
    unpack_matrix,
)
from harness.nn.quantized_tokens import QuantizedTokens
from harness.nn.quantizer import QuantizedWeight

__all__ = ["ActivationScale", "Int8Linear", "PackedLinear", "QuantizedLinear", "stored_bias"]

ActivationScale = Literal["per-token", "per-tensor-dynamic", "per-tensor-static"]


class PackedLinear(KeptTypes):
    """A packed module in the place of an `nn.Linear`: its sizes, and inputs of any number of dimensions."""

    in_features: int
    out_features: int
    bits: int
    simulated = False

    def _flat(self, x: torch.Tensor, run: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """``run`` on x [..., in] as [rows, in], its result [rows, out] as [..., out]."""
        if x.shape[-1] != self.in_features:
            raise ConfigError(f"{type(self).__name__} takes {self.in_features} features, not {x.shape[-1]}")
        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], self.out_features)
        y = run(x.reshape(-1, self.in_features))
        return y.view(*x.shape[:-1], self.out_features)


def stored_bias(bias: torch.Tensor) -> nn.Parameter:
    """A bias [out] as a layer keeps it: with no gradient, and side by side, as the kernels read it."""
    return nn.Parameter(bias.detach().contiguous(), requires_grad=False)


class QuantizedLinear(PackedLinear):
    """A linear layer with packed 2- to 8-bit weights and full-precision activations.

    Args:
        in_features, out_features: as of `nn.Linear`.
        bits: 2, 3, 4 or 8.
        group_size: input columns per scale, or -1 for one scale per output row.
        sym: no zero points.
        per_tensor: one scale for the whole matrix.
        bias: with a bias, in `dtype`.
        reordered: columns are stored in another order (GPTQ's act-order); the input is gathered.
        scale_dtype: float16 or bfloat16 for groups, float32 for 8 bits per row.
        zero_dtype: uint8 for whole zero points, packed in `bits`; a floating type for any (HQQ).
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    order: torch.Tensor | None
    bias: nn.Parameter | None
    _kept = ("scales", "zeros")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group_size: int = -1,
        sym: bool = False,
        per_tensor: bool = False,
        bias: bool = False,
        reordered: bool = False,
        scale_dtype: torch.dtype = torch.float16,
        zero_dtype: torch.dtype = torch.uint8,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if bits not in PLANES:
            raise ConfigError(f"weights are stored in {sorted(PLANES)} bits, not {bits}")
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.sym = bits, group_size, sym
        groups = 1 if group_size == -1 else -(-in_features // group_size)
        columns = in_features if group_size == -1 else groups * group_size
        rows = 1 if per_tensor else out_features
        self.tile = choose_tile(columns, group_size)
        tiles = packed_columns(columns) // self.tile

        def buffer(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.register_buffer("codes", buffer(tiles, out_features, self.tile * bits // 8))
        self.register_buffer("scales", buffer(groups, rows, dtype=scale_dtype))
        zero_columns = rows if zero_dtype.is_floating_point else packed_columns(rows) * bits // 8
        zeros = None if sym else buffer(groups, zero_columns, dtype=zero_dtype)
        self.register_buffer("zeros", zeros)
        self.register_buffer("order", buffer(in_features, dtype=torch.int32) if reordered else None)
        self.bias = _bias(out_features, dtype, device) if bias else None

    @classmethod
    def from_weight(cls, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> QuantizedLinear:
        """Pack a quantized matrix [out, in]; `bias` [out] keeps its type."""
        packed = pack_weight(weight)
        layer = cls(
            packed.in_features,
            packed.out_features,
            bits=packed.bits,
            group_size=packed.group_size,
            sym=weight.sym,
            bias=bias is not None,
            reordered=weight.order is not None,
            scale_dtype=packed.scales.dtype,
            zero_dtype=torch.uint8 if packed.zeros is None else packed.zeros.dtype,
            device="meta",
        )
        layer.codes, layer.scales, layer.zeros = packed.codes, packed.scales, packed.zeros
        layer.order = weight.order
        if bias is not None:
            layer.bias = stored_bias(bias)
        layer._moved()
        return layer

    def _moved(self) -> None:
        weight_only.make_ready(self.codes.device)

    @property
    def packed(self) -> PackedWeight:
        """The stored matrix as kernels read it."""
        return PackedWeight(
            self.codes,
            self.scales,
            self.zeros,
            self.bits,
            self.group_size,
            self.tile,
            self.in_features,
            self.out_features,
        )

    def kernel_for(self, rows: int, dtype: torch.dtype) -> str:
        """The kernel that the forward pass runs for so many rows of activations of this type."""
        return weight_only.choose(self.packed, rows, dtype)

    @property
    def kernel_name(self) -> str:
        """The kernel of a decode step (one row) in the type that is usual on this device."""
        return self.kernel_for(1, torch.bfloat16 if self.codes.is_cuda else torch.float32)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [out, in] that the layer multiplies with."""
        weight = weight_only.dequantize(self.packed, dtype)
        return weight if self.order is None else weight[:, torch.argsort(self.order)]

    def dense_weight(self) -> torch.Tensor:
        """As `dequantize`: what is counted when the zeros of a layer are counted."""
        return self.dequantize()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., out] for x [..., in], in x's type."""
        return self._flat(x, self._multiply)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        if self.order is not None:
            x = x.index_select(1, self.order)
        return weight_only.linear(x, self.packed, self.bias)

    def extra_repr(self) -> str:
        zeros = ""
        if self.zeros is not None and self.zeros.is_floating_point():
            zeros = f", zeros={str(self.zeros.dtype).removeprefix('torch.')}"
        return (
            f"{self.in_features}, {self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, sym={self.sym}{zeros}, bias={self.bias is not None}"
        )


class Int8Linear(PackedLinear):
    """A linear layer that multiplies int8 activations with int8 weights, exactly, in int32 (W8A8).

    A scale may leave an integer product only where it is constant along the summed columns: weights
    have one scale per row, per group of rows or one in all, activations one per token or one in all.
    Weights of fewer bits (W4A8) are stored packed and unpacked to int8 in the product or before it.

    Args:
        in_features, out_features: as of `nn.Linear`.
        bits: of a stored weight: 2, 3, 4 or 8.
        row_groups: so many groups of consecutive rows share a weight scale; -1: every row has its own.
        per_tensor: one weight scale for the whole matrix.
        a_gran: ``per-token`` and ``per-tensor-dynamic`` find the scale in the input itself,
            ``per-tensor-static`` uses `input_scale`, found by calibration.
        bias: with a bias, in `dtype`.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    input_scale: torch.Tensor | None
    bias: nn.Parameter | None
    a_bits = 8
    group_size = -1
    sym = True
    _kept: tuple[str, ...] = ("scales", "input_scale")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int = 8,
        row_groups: int = -1,
        per_tensor: bool = False,
        a_gran: ActivationScale = "per-token",
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if bits not in PLANES:
            raise ConfigError(f"weights are stored in {sorted(PLANES)} bits, not {bits}")
        self.in_features, self.out_features, self.a_gran = in_features, out_features, a_gran
        self.bits, self.tile = bits, choose_tile(in_features, -1)
        if bits == 8:
            codes = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        else:
            tiles = packed_columns(in_features) // self.tile
            codes = torch.zeros(tiles, out_features, self.tile * bits // 8, dtype=torch.uint8, device=device)
        self.register_buffer("codes", codes)
        scales = 1 if per_tensor else out_features if row_groups == -1 else row_groups
        self.register_buffer("scales", torch.ones(scales, device=device))
        is_static = a_gran == "per-tensor-static"
        self.register_buffer("input_scale", torch.ones(1, device=device) if is_static else None)
        self.bias = _bias(out_features, dtype, device) if bias else None

    @classmethod
    def from_weight(
        cls,
        weight: QuantizedWeight,
        bias: torch.Tensor | None = None,
        *,
        a_gran: ActivationScale = "per-token",
        input_scale: torch.Tensor | None = None,
        row_groups: int = -1,
    ) -> Int8Linear:
        """Store a symmetric matrix [out, in] with one scale per row, per group of rows or in all.

        Args:
            row_groups: the groups that `quantize_row_groups` was asked for; -1: a scale for each row.

        Raises:
            NotApplicable: groups along the columns, or zero points, which no int8 product can apply.
            ConfigError: `input_scale` missing for ``per-tensor-static``, or given for another.
        """
        if not weight.sym or weight.scale.shape[1] != 1:
            raise NotApplicable(
                "an int8 product needs symmetric weights with one scale per row: scales or "
                f"zero points that vary along the columns cannot leave the sum (bits={weight.bits}, "
                f"sym={weight.sym}, group_size={weight.group_size})"
            )
        if (input_scale is not None) != (a_gran == "per-tensor-static"):
            raise ConfigError("a calibrated input scale belongs to a_gran=per-tensor-static alone")
        out, in_features = weight.codes.shape
        layer = cls(in_features, out, bits=weight.bits, a_gran=a_gran, bias=bias is not None, device="meta")
        if weight.bits == 8:
            layer.codes = _centred(weight.codes, 8)
        else:
            layer.codes = pack_matrix(weight.codes, weight.bits, layer.tile)
        scale = weight.scale[:, 0] if row_groups == -1 else weight.scale.view(row_groups, -1)[:, 0]
        layer.scales = scale.float().contiguous()
        if input_scale is not None:
            layer.input_scale = input_scale.detach().float().view(1).to(layer.codes.device)
        if bias is not None:
            layer.bias = stored_bias(bias)
        return layer

    @property
    def kernel_name(self) -> str:
        """The kernel of a decode step (one row) on this device."""
        return self.kernel_for(1, torch.float32)

    def kernel_for(self, rows: int, dtype: torch.dtype) -> str:
        """The kernel that the forward pass runs for so many rows, whatever their type."""
        if self.bits == 8:
            return int8.choose(self.codes.device)
        return packed_int8.choose(self.packed, rows)

    @property
    def packed(self) -> PackedWeight:
        """The stored matrix of fewer than 8 bits as kernels read it."""
        scales = self.scales.view(1, -1)
        return PackedWeight(
            self.codes, scales, None, self.bits, -1, self.tile, self.in_features, self.out_features
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [out, in] that the codes stand for."""
        return (self.int8_codes().float() * self.row_scales()[:, None]).to(dtype)

    def int8_codes(self) -> torch.Tensor:
        """The codes as int8 [out, in], unpacked where fewer bits are stored."""
        if self.bits == 8:
            return self.codes
        codes = unpack_matrix(self.codes, self.bits, self.tile)[:, : self.in_features]
        return _centred(codes, self.bits).contiguous()

    def row_scales(self) -> torch.Tensor:
        """The weight scales as the product reads them, float32 [out], or [1] for one in all."""
        groups = self.scales.numel()
        if groups in (1, self.out_features):
            return self.scales
        return self.scales[:, None].expand(-1, self.out_features // groups).reshape(-1)

    def dense_weight(self) -> torch.Tensor:
        """As `dequantize`: what is counted when the zeros of a layer are counted."""
        return self.dequantize()

    def forward(self, x: torch.Tensor | QuantizedTokens) -> torch.Tensor:
        """y [..., out] for x [..., in], in x's type; x may be quantized already, one scale per token.

        Raises:
            ConfigError: x is quantized and this layer has one activation scale for all tokens.
        """
        if isinstance(x, torch.Tensor):
            return self._flat(x, self._multiply)
        if self.a_gran != "per-token":
            raise ConfigError(f"a layer with a_gran={self.a_gran} cannot take tokens quantized one by one")
        scale, dtype = x.scale.reshape(-1, 1), x.dtype
        return self._flat(x.codes, lambda codes: self._multiply_codes(codes, scale, dtype)).to(dtype)

    def _multiply_codes(self, codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self.bits < 8:
            return packed_int8.linear_of_codes(codes, scale, self.packed, self.bias, dtype)
        return int8.linear_of_codes(codes, scale, self.codes, self.row_scales(), self.bias, dtype)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        per_token, scale = self.a_gran == "per-token", self.input_scale
        if self.bits < 8:
            return packed_int8.linear(x, self.packed, self.bias, per_token=per_token, scale=scale)
        return int8.linear(x, self.codes, self.row_scales(), self.bias, per_token=per_token, scale=scale)

    def extra_repr(self) -> str:
        groups = self.scales.numel()
        weights = "per-channel" if groups == self.out_features else f"{groups} row groups"
        weights = "per-tensor" if groups == 1 < self.out_features else weights
        bits = "" if self.bits == 8 else f"bits={self.bits}, "
        return (
            f"{self.in_features}, {self.out_features}, {bits}weights={weights}, "
            f"activations={self.a_gran}, bias={self.bias is not None}"
        )


def _centred(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned codes of a symmetric grid as int8 around zero."""
    return (codes.to(torch.int16) - (1 << bits - 1)).to(torch.int8)


def _bias(out_features: int, dtype: torch.dtype | None, device: torch.device | str | None) -> nn.Parameter:
    return nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False)
