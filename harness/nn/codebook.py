"""Layers whose weights are packed places in a table of values; what is stored is what runs.

`CodebookLinear` takes the place of an `nn.Linear` of full-precision activations. The codes lie in the tiles
of `harness.nn.packing`, as in `QuantizedLinear`, so that a kernel can read them in the same way.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from harness.errors import ConfigError
from harness.kernels import table as table_kernels
from harness.kernels import weight_only
from harness.kernels.stored import StoredMatrix
from harness.nn.codebook_weight import SCALE_BLOCK, CodebookWeight, Outliers, ScaleCodes
from harness.nn.kept_types import KeptTypes
from harness.nn.packing import PLANES, choose_tile, pack_matrix, packed_columns, unpack_matrix
from harness.nn.quantized import PackedLinear, stored_bias

__all__ = ["CodebookLinear", "PackedCodebook"]


class PackedCodebook(KeptTypes):
    """A matrix [rows, columns] of packed places in a table: what linear layers and embeddings share.

    Args:
        bits: 2, 3, 4 or 8 bits a place.
        group_size: columns per scale, or -1 for no scales.
        double_quant: the scales are stored in 8 bits.
        outliers: how many weights are kept as they are, in `outlier_dtype`.
    """

    codes: torch.Tensor
    table: torch.Tensor
    scales: torch.Tensor | None
    scale_steps: torch.Tensor | None
    scale_mean: torch.Tensor | None
    outlier_index: torch.Tensor | None
    outlier_values: torch.Tensor | None
    _kept = ("table", "scales", "scale_steps", "scale_mean", "outlier_values")

    def _register(
        self,
        rows: int,
        columns: int,
        *,
        bits: int,
        group_size: int = -1,
        double_quant: bool = False,
        outliers: int = 0,
        outlier_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if bits not in PLANES:
            raise ConfigError(f"weights are stored in {sorted(PLANES)} bits, not {bits}")
        self.bits, self.group_size, self.columns = bits, group_size, columns
        groups = 0 if group_size == -1 else -(-columns // group_size)
        stored = groups * group_size if groups else columns
        self.tile = choose_tile(stored, group_size)

        def buffer(name: str, *shape: int, dtype: torch.dtype, present: bool = True) -> None:
            tensor = torch.zeros(shape, dtype=dtype, device=device) if present else None
            self.register_buffer(name, tensor)

        tiles = packed_columns(stored) // self.tile
        double = bool(groups) and double_quant
        buffer("codes", tiles, rows, self.tile * bits // 8, dtype=torch.uint8)
        buffer("table", 2**bits, dtype=torch.float32)
        scale_dtype = torch.int8 if double else torch.float32
        buffer("scales", groups, rows, dtype=scale_dtype, present=bool(groups))
        buffer("scale_steps", -(-groups * rows // SCALE_BLOCK), dtype=torch.float32, present=double)
        buffer("scale_mean", 1, dtype=torch.float32, present=double)
        buffer("outlier_index", outliers, dtype=torch.int32, present=bool(outliers))
        buffer("outlier_values", outliers, dtype=outlier_dtype, present=bool(outliers))

    def _store(self, weight: CodebookWeight) -> None:
        """Take over a matrix; the module's own sizes follow from it."""
        outliers, scales = weight.outliers, weight.scales
        self._register(
            weight.codes.shape[0],
            weight.in_features,
            bits=weight.bits,
            group_size=weight.group_size,
            double_quant=isinstance(scales, ScaleCodes),
            device="meta",
        )
        self.codes = pack_matrix(weight.codes, weight.bits, self.tile)
        self.table = weight.table.float().contiguous()
        if isinstance(scales, ScaleCodes):
            self.scales, self.scale_steps, self.scale_mean = scales.codes, scales.steps, scales.mean
        elif scales is not None:
            self.scales = scales.float().contiguous()
        if outliers is not None and outliers.index.numel():
            self.outlier_index, self.outlier_values = outliers.index, outliers.values
        self._moved()

    def _moved(self) -> None:
        weight_only.make_ready(self.codes.device)

    def _unpacked(self, codes: torch.Tensor) -> torch.Tensor:
        """Places uint8 [rows, columns] of packed codes, padding only up to whole groups."""
        places = unpack_matrix(codes, self.bits, self.tile)
        stored = self.columns if self.scales is None else self.scales.shape[0] * self.group_size
        return places[:, :stored]

    @property
    def codebook_weight(self) -> CodebookWeight:
        """The stored matrix, unpacked."""
        scales: torch.Tensor | ScaleCodes | None = self.scales
        if self.scales is not None and self.scale_steps is not None and self.scale_mean is not None:
            scales = ScaleCodes(self.scales, self.scale_steps, self.scale_mean)
        outliers = None
        if self.outlier_index is not None and self.outlier_values is not None:
            outliers = Outliers(self.outlier_index, self.outlier_values)
        codes = self._unpacked(self.codes)
        return CodebookWeight(codes, self.table, self.bits, self.columns, scales, self.group_size, outliers)

    @property
    def stored(self) -> StoredMatrix:
        """The stored matrix as kernels read it."""
        columns = self.codes.shape[0] * self.tile
        return StoredMatrix(
            self.codes,
            self.bits,
            self.tile,
            columns if self.group_size == -1 else self.group_size,
            self.columns,
            self.scales,
            None,
            self.table,
            self.scale_steps,
            self.scale_mean,
            self.outlier_index,
            self.outlier_values,
        )

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [rows, columns] that the codes stand for, outliers exact."""
        if table_kernels.fits(self.stored, dtype):
            return table_kernels.dequantize(self.stored, dtype)
        return self.codebook_weight.dequantize(dtype)

    def _described(self) -> str:
        parts = [f"bits={self.bits}"]
        if self.scales is not None:
            parts.append(f"group_size={self.group_size}, double_quant={self.scale_steps is not None}")
        if self.outlier_index is not None:
            parts.append(f"outliers={self.outlier_index.numel()}")
        return ", ".join(parts)


class CodebookLinear(PackedCodebook, PackedLinear):
    """A linear layer with packed places in a table and full-precision activations.

    Args:
        in_features, out_features: as of `nn.Linear`.
        bias: with a bias, in `dtype`.

    The others are those of `PackedCodebook`.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group_size: int = -1,
        double_quant: bool = False,
        outliers: int = 0,
        outlier_dtype: torch.dtype = torch.float32,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._register(
            out_features,
            in_features,
            bits=bits,
            group_size=group_size,
            double_quant=double_quant,
            outliers=outliers,
            outlier_dtype=outlier_dtype,
            device=device,
        )
        self.bias = None
        if bias:
            zeros = torch.zeros(out_features, dtype=dtype, device=device)
            self.bias = nn.Parameter(zeros, requires_grad=False)

    @classmethod
    def from_weight(cls, weight: CodebookWeight, bias: torch.Tensor | None = None) -> CodebookLinear:
        """Pack a matrix [out, in]; `bias` [out] keeps its type."""
        layer = cls(weight.in_features, weight.codes.shape[0], bits=weight.bits, device="meta")
        layer._store(weight)
        if bias is not None:
            layer.bias = stored_bias(bias)
        return layer

    def kernel_for(self, rows: int, dtype: torch.dtype) -> str:
        """What the forward pass runs for so many rows of activations of this type."""
        return table_kernels.choose(self.stored, rows, dtype)

    @property
    def kernel_name(self) -> str:
        """What a decode step (one row) runs in the type that is usual on this device."""
        return self.kernel_for(1, torch.bfloat16 if self.codes.is_cuda else torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., out] for x [..., in], in x's type."""
        return self._flat(x, self._multiply)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        if table_kernels.runs(x, self.stored):
            return table_kernels.linear(x, self.stored, self.bias)
        return functional.linear(x, self.dense_weight(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self._described()}, bias={self.bias is not None}"
