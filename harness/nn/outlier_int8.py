"""Vector-wise int8 with the outlier columns of the input multiplied in the activation's own type.

A few features of a large language model are tens of times larger than the rest. One of them in a token
sets that token's int8 scale and leaves the others few levels. LLM.int8() takes every column of X that
reaches a threshold out of the integer product, finds the row scales of what is left, and adds the
product of the columns taken out in 16 bits.

Which columns those are depends on the data. `split_exact` takes all of them and has to ask the device
how many there are. `split_fixed` decides by shapes alone, so that a CUDA graph can be captured: the
`capacity` largest columns are looked at, those that reach the threshold are taken out, and the slots
that are left multiply zeros. Columns beyond the capacity stay in int8, and the layer counts them.

Source: Dettmers, Lewis, Belkada, Zettlemoyer 2022, "LLM.int8(): 8-bit Matrix Multiplication for
Transformers at Scale" (arXiv:2208.07339), section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from harness.errors import ConfigError, NumericalFailure
from harness.kernels import int8, outlier_int8
from harness.nn.quantized import Int8Linear, stored_bias
from harness.nn.quantizer import quantize_weight
from harness.records import Record

__all__ = ["CAPACITY", "OutlierInt8Linear", "Split", "split_exact", "split_fixed"]

CAPACITY = 64
"""Outlier columns of one call that the fixed form takes out of the integer product."""


@dataclass(frozen=True)
class Split:
    """An input X [rows, in] in two parts.

    Attributes:
        regular: X [rows, in] with the outlier columns set to zero.
        outliers: the outlier columns [rows, slots]; an unused slot holds zeros.
        columns: int64 [slots], which column of X each slot is; 0 where it is unused.
        found: int64 scalar on the device, how many columns of X are outliers.
    """

    regular: torch.Tensor
    outliers: torch.Tensor
    columns: torch.Tensor
    found: torch.Tensor


def _peaks(x: torch.Tensor, always: torch.Tensor | None) -> torch.Tensor:
    """The largest |x| of each column [in]; infinite for those that are outliers `always` (bool [in])."""
    peaks: torch.Tensor = torch.linalg.vector_norm(x, math.inf, dim=0)
    return peaks if always is None else peaks.masked_fill(always, math.inf)


def split_exact(x: torch.Tensor, threshold: float, *, always: torch.Tensor | None = None) -> Split:
    """Take out every column of X [rows, in] with a value of at least `threshold`.

    A column with NaN is no outlier: NaN compares with nothing and reaches the output through int8.

    Args:
        always: bool [in], columns that are taken out whatever they hold.
    """
    is_outlier = _peaks(x, always) >= threshold
    columns = is_outlier.nonzero()[:, 0]
    if not columns.numel():
        return Split(x, x[:, :0], columns, is_outlier.sum())
    regular = torch.where(is_outlier, x.new_zeros(()), x)
    return Split(regular, x.index_select(1, columns), columns, is_outlier.sum())


def split_fixed(
    x: torch.Tensor, threshold: float, capacity: int, *, always: torch.Tensor | None = None
) -> Split:
    """`split_exact` for the `capacity` largest columns, without asking the device anything.

    Where no more than `capacity` columns are outliers it is the same split, its slots in another order
    and some of them empty.
    """
    peaks = _peaks(x, always)
    # Where a column is NaN it ranks first: it would take a slot from a column that can be saved.
    ranked = torch.where(torch.isnan(peaks), peaks.new_zeros(()), peaks)
    largest, columns = torch.topk(ranked, min(capacity, x.shape[1]), sorted=False)
    is_used = (largest >= threshold) & ~torch.isnan(peaks[columns])
    is_taken = torch.zeros_like(peaks, dtype=torch.bool).scatter(0, columns, is_used)
    regular = torch.where(is_taken, x.new_zeros(()), x)
    outliers = torch.where(is_used, x.index_select(1, columns), x.new_zeros(()))
    # Unused slots all read the same column of the weight, which then comes from the cache.
    return Split(regular, outliers, columns * is_used, (peaks >= threshold).sum())


class OutlierInt8Linear(Int8Linear):
    """A linear layer in int8 but for the input columns that reach a threshold (LLM.int8()).

    Weights are int8 with one float32 scale per row. Without a compiler, off CUDA, the outliers are
    those of `split_exact`; else those of `split_fixed`. `counters` holds the columns seen, the outliers
    among them, and those beyond the capacity, over all calls since `reset_counters`.

    Args:
        in_features, out_features: as of `nn.Linear`.
        threshold: a column with |x| of at least this is an outlier; infinite: none is.
        capacity: columns that the fixed form takes out at most; with a threshold of zero, all.
        kept: how many columns of the weight are kept in 16 bits beside their int8 codes.
        kept_dtype: their type.
        kept_only: the kept columns have no codes (their weights did not count for the row scales), so
            they are outliers whatever they hold.
        bias: with a bias, in `dtype`.
    """

    kept: torch.Tensor | None
    place: torch.Tensor | None
    counters: torch.Tensor
    _kept = ("scales", "input_scale", "kept")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        threshold: float = 6.0,
        capacity: int = CAPACITY,
        kept: int = 0,
        kept_dtype: torch.dtype = torch.float16,
        kept_only: bool = False,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=dtype, device=device)
        if not threshold >= 0:
            raise ConfigError(f"the outlier threshold must be at least 0, not {threshold}")
        if capacity < 1:
            raise ConfigError(f"capacity must be at least 1 column, not {capacity}")
        self.threshold = threshold
        wanted = in_features if threshold == 0 else max(capacity, kept if kept_only else 0)
        self.capacity = min(wanted, in_features)
        self.kept_only = kept_only
        has_kept = kept > 0
        self.register_buffer(
            "kept", torch.zeros(kept, out_features, dtype=kept_dtype, device=device) if has_kept else None
        )
        place = torch.full((in_features,), -1, dtype=torch.int32, device=device) if has_kept else None
        self.register_buffer("place", place)
        # Not part of the state: it says what happened, and decides nothing.
        self.register_buffer("counters", torch.zeros(3, dtype=torch.int64, device=device), persistent=False)

    @classmethod
    def from_float(
        cls,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        threshold: float = 6.0,
        capacity: int = CAPACITY,
        columns: torch.Tensor | None = None,
        kept_only: bool = False,
    ) -> OutlierInt8Linear:
        """Quantize a matrix [out, in]; `bias` [out] keeps its type.

        Args:
            columns: int64, the columns to keep in 16 bits as well (the weight's own type where that has
                16 bits, else float16, or bfloat16 for what float16 cannot hold).
            kept_only: leave those columns out of the row scales and of the codes.

        Raises:
            NumericalFailure: weights are NaN or infinite.
        """
        if not bool(torch.isfinite(weight).all()):
            raise NumericalFailure("weights are NaN or infinite")
        columns = weight.new_zeros(0, dtype=torch.int64) if columns is None else columns
        out, in_features = weight.shape
        coded = weight.index_fill(1, columns, 0) if kept_only else weight
        quantized = quantize_weight(coded, bits=8, sym=True)
        layer = cls(
            in_features,
            out,
            threshold=threshold,
            capacity=capacity,
            kept=columns.numel(),
            kept_dtype=_kept_dtype(weight),
            kept_only=kept_only,
            device=weight.device,
        )
        layer.codes = (quantized.codes.to(torch.int16) - 128).to(torch.int8)
        layer.scales = quantized.scale[:, 0].float().contiguous()
        if layer.kept is not None and layer.place is not None:
            layer.kept.copy_(weight.index_select(1, columns).t())
            layer.place[columns] = torch.arange(columns.numel(), dtype=torch.int32, device=weight.device)
        if bias is not None:
            layer.bias = stored_bias(bias)
        return layer

    @property
    def kernel_name(self) -> str:
        """The kernels that the forward pass runs on this device: of the integers and of the outliers."""
        return f"{int8.choose(self.codes.device)} + outlier columns"

    def kernel_for(self, rows: int, dtype: torch.dtype) -> str:
        """As `kernel_name`: it depends neither on the rows nor on their type."""
        return self.kernel_name

    def column_weights(self, columns: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weights [out, n] of some columns (int64 [n]): as they were kept, else from their codes."""
        codes = self.codes.index_select(1, columns)
        weights = (codes.float() * self.scales[:, None]).to(dtype)
        if self.kept is None or self.place is None:
            return weights
        place = self.place.index_select(0, columns)
        kept = self.kept.index_select(0, place.clamp(min=0)).t().to(dtype)
        return torch.where(place >= 0, kept, weights)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [out, in] that outlier columns are multiplied with."""
        return self.column_weights(torch.arange(self.in_features, device=self.codes.device), dtype)

    def split(self, x: torch.Tensor, *, fixed: bool) -> Split:
        """The two parts of X [rows, in], in the fixed or the exact form."""
        always = self.place >= 0 if self.kept_only and self.place is not None else None
        if fixed:
            return split_fixed(x, self.threshold, self.capacity, always=always)
        return split_exact(x, self.threshold, always=always)

    def multiply(self, x: torch.Tensor, *, fixed: bool) -> torch.Tensor:
        """y [rows, out] of x [rows, in], in x's type."""
        parts = self.split(x, fixed=fixed)
        beyond = (parts.found - parts.columns.shape[0]).clamp(min=0)
        self.counters.add_(torch.stack((torch.full_like(beyond, self.in_features), parts.found, beyond)))
        # The scales of the rows are found in what is left when the outliers are out.
        y = int8.linear(parts.regular, self.codes, self.scales, self.bias)
        if not parts.columns.shape[0]:
            return y
        return torch.addmm(y, parts.outliers, self.column_weights(parts.columns, x.dtype).t())

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        needs_gradient = torch.is_grad_enabled() and x.requires_grad  # the kernels have no backward pass
        if not needs_gradient and outlier_int8.fits(x.device, x.dtype, self.in_features, self.capacity):
            return outlier_int8.linear(
                x,
                self.codes,
                self.row_scales(),
                self.bias,
                threshold=self.threshold,
                capacity=self.capacity,
                kept=self.kept,
                place=self.place,
                kept_only=self.kept_only,
                counters=self.counters,
            )
        return self.multiply(x, fixed=x.is_cuda or torch.compiler.is_compiling())

    def reset_counters(self) -> None:
        """Begin to count anew."""
        self.counters.zero_()

    @staticmethod
    def count_records(totals: torch.Tensor) -> list[Record]:
        """What `counters` of many layers, summed, say."""
        seen, found, beyond = totals.tolist()
        note = f"of {seen} columns in all calls, {found} reached the threshold"
        return [
            Record("outlier_column_share", found / seen if seen else 0.0, "1", note=note),
            Record("outlier_columns_beyond_capacity", beyond, "columns", note="these stayed in int8"),
        ]

    def extra_repr(self) -> str:
        kept = 0 if self.kept is None else self.kept.shape[0]
        return (
            f"{self.in_features}, {self.out_features}, threshold={self.threshold:g}, "
            f"capacity={self.capacity}, kept={kept}, bias={self.bias is not None}"
        )


def _kept_dtype(weight: torch.Tensor) -> torch.dtype:
    if weight.dtype in (torch.float16, torch.bfloat16):
        return weight.dtype
    fits = bool((weight.abs() <= torch.finfo(torch.float16).max).all())
    return torch.float16 if fits else torch.bfloat16
