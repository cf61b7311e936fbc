"""A linear layer with 2:4 weights: of every four along the inputs at most two are not zero, and only those
are stored, with two bits each that say which.

Off CUDA the layer holds `values` and `meta` and decompresses them for every product. On CUDA, where
cuSPARSELt runs the shape and type, it holds the library's own form instead (`packed`); its state dict has
`values` and `meta` wherever it is, so that a saved model loads on any device.

Source: Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks" (arXiv:2104.08378).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional

from harness.errors import ConfigError
from harness.kernels import semi_structured as kernel
from harness.nn.packing import pack_rows, unpack_rows
from harness.nn.quantized import PackedLinear, stored_bias

__all__ = ["SemiStructuredLinear", "compress_2_of_4", "decompress_2_of_4", "misfit"]


def misfit(out_features: int, in_features: int, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why sparse tensor cores cannot run a matrix of this shape and type; None where they can."""
    multiple = kernel.ALIGNMENT[dtype]
    if out_features % multiple or in_features % multiple:
        return f"[{out_features}, {in_features}]: both sizes must be multiples of {multiple}"
    return None


def compress_2_of_4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The stored form of a matrix [out, in].

    Returns:
        values [out, in / 2], two of each group in their order, in the matrix's type; and uint8
        [out, in / 8], the places of the values in their groups, two bits each, the first in the low bits.

    Raises:
        ConfigError: 16 does not divide the width, or a group has more than two weights that are not zero.
    """
    out, width = weight.shape
    if not width or width % 16:
        raise ConfigError(f"2:4 weights are stored for widths that 16 divides, not {width}")
    groups = _numbers(weight.detach()).reshape(out, width // 4, 4)
    is_zero = groups == 0
    if bool(((~is_zero).sum(-1) > 2).any()):
        raise ConfigError("the weights are not 2:4: a group of four has more than two that are not zero")
    # Stable: those that are not zero first, in their order; zeros fill groups that have fewer.
    places = is_zero.to(torch.uint8).sort(dim=-1, stable=True).indices[..., :2].sort(dim=-1).values
    values = groups.gather(-1, places).view(out, width // 2).view(weight.dtype)
    return values, pack_rows(places.to(torch.uint8).view(out, width // 2), 2)


def decompress_2_of_4(values: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
    """The matrix [out, in] that `compress_2_of_4` was given."""
    out, half = values.shape
    places = unpack_rows(meta, 2, half).view(out, half // 2, 2).long()
    numbers = _numbers(values)
    dense = numbers.new_zeros(out, half // 2, 4).scatter_(-1, places, numbers.view(out, half // 2, 2))
    return dense.view(out, 2 * half).view(values.dtype)


def _numbers(weight: torch.Tensor) -> torch.Tensor:
    """What torch compares and gathers: float8 as its bytes, with one zero only."""
    if weight.dtype != torch.float8_e4m3fn:
        return weight
    codes = weight.contiguous().view(torch.int8)
    return torch.where(codes == -128, torch.zeros_like(codes), codes)


class SemiStructuredLinear(PackedLinear):
    """A linear layer that stores two of four weights (2:4): 0.5625 of the bytes in 16 bits.

    Args:
        in_features, out_features: as of `nn.Linear`; `in_features` a multiple of 16.
        bias: with a bias, in `dtype`.
        tuned: on CUDA, time the library's algorithms once for each number of rows; which one is the
            fastest may differ from run to run, and with it the last bits of a result.

    Weights in float32 have no sparse kernel: they are stored compressed and decompressed for the product.
    """

    values: torch.Tensor | None
    meta: torch.Tensor | None
    packed: torch.Tensor | None
    reads_rows = False
    """Whether `packed` is read without the library for a few rows."""
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        tuned: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if in_features % 16:
            raise ConfigError(f"2:4 weights are stored for widths that 16 divides, not {in_features}")
        self.in_features, self.out_features, self.tuned = in_features, out_features, tuned
        dtype = dtype or torch.get_default_dtype()
        half = in_features // 2
        # Zeros at places 0 and 1 of each group: a matrix of zeros.
        pairs = torch.arange(half, dtype=torch.uint8, device=device) % 2
        meta = pack_rows(pairs.expand(out_features, -1), 2)
        self.register_buffer("values", torch.zeros(out_features, half, dtype=dtype, device=device))
        self.register_buffer("meta", meta)
        self.register_buffer("packed", None, persistent=False)
        value = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if value is None else nn.Parameter(value, requires_grad=False)
        self._prefer_packed()

    @classmethod
    def from_dense(
        cls, weight: torch.Tensor, bias: torch.Tensor | None = None, *, tuned: bool = True
    ) -> SemiStructuredLinear:
        """Store a 2:4 matrix [out, in] in its own type; `bias` [out] keeps its type.

        Raises:
            ConfigError: as `compress_2_of_4`.
        """
        out, in_features = weight.shape
        layer = cls(in_features, out, tuned=tuned, dtype=weight.dtype, device="meta")
        layer._hold(weight, bias)
        return layer

    def _hold(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Store a 2:4 matrix [out, in], and a bias as it is."""
        self.values, self.meta = compress_2_of_4(weight)
        if bias is not None:
            self.bias = stored_bias(bias)
        self._prefer_packed()

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        held = self.values if self.packed is None else self.packed
        assert held is not None
        return held.dtype

    @property
    def bits(self) -> float:  # type: ignore[override]
        """Of a weight that is stored, its place not counted."""
        return 8.0 * self.dtype.itemsize

    def kernel_for(self, rows: int, dtype: torch.dtype) -> str:
        """The kernel that the forward pass runs for so many rows of this type."""
        if self.packed is None or dtype != self.dtype:
            return kernel.FALLBACK
        return kernel.name_of(rows, self.reads_rows)

    @property
    def kernel_name(self) -> str:
        """The kernel for one row of the weights' type."""
        return self.kernel_for(1, self.dtype)

    def dense_weight(self) -> torch.Tensor:
        """The matrix [out, in] that is stored, zeros included."""
        return self._stored()

    def _stored(self) -> torch.Tensor:
        if self.packed is not None:
            return kernel.decompress(self.packed, self.out_features, self.in_features)
        assert self.values is not None
        assert self.meta is not None
        return decompress_2_of_4(self.values, self.meta)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """As `dense_weight`, in another type."""
        return self.dense_weight().to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., out] for x [..., in], in x's type."""
        return self._flat(x, self._multiply)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        wants_gradient = x.requires_grad and torch.is_grad_enabled()
        if self.packed is None or x.dtype != self.dtype or wants_gradient:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return functional.linear(x, self.dense_weight().to(x.dtype), bias)
        fits = self.bias is None or self.bias.dtype == x.dtype
        bias = self.bias if fits else None
        y = kernel.linear(x, self.packed, bias, self.out_features, self.tuned, self.reads_rows)
        return y if self.bias is None or fits else (y + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.in_features}, {self.out_features}, 2:4, dtype={name}, bias={self.bias is not None}"

    # --- between the two forms ------------------------------------------------------------------------

    def _runs_packed(self) -> bool:
        """Whether cuSPARSELt multiplies what is stored, where it is."""
        assert self.values is not None
        runs = kernel.choose(self.values.device, self.values.dtype) == kernel.KERNEL
        return runs and misfit(self.out_features, self.in_features) is None

    def _prefer_packed(self) -> None:
        """Hold the library's form where it runs here, and nothing beside it."""
        if self._runs_packed():
            weight = self._stored()
            self.packed = kernel.compress(weight)
            self.reads_rows = kernel.reads_rows(self.packed, weight)
            self.values = self.meta = None

    def _unpack(self) -> None:
        """Hold `values` and `meta`."""
        if self.packed is not None:
            values, meta = compress_2_of_4(self._stored())
            self.values, self.meta, self.packed = values, meta, None
            self.reads_rows = False

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> Self:
        # The library's form belongs to one device and one type, and a cast would spoil its metadata.
        self._unpack()
        super()._apply(fn, recurse)
        self._prefer_packed()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            values, meta = compress_2_of_4(self._stored())
            destination[f"{prefix}values"], destination[f"{prefix}meta"] = values, meta

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        self._unpack()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._prefer_packed()
