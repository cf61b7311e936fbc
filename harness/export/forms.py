"""What a linear layer stores, in terms that every checkpoint format shares.

A layer of the harness keeps its codes in the order in which its kernels read them. Here they are taken
out of it: columns in their own order, a scale and a zero point for each group of columns, and how the
input is rounded. A layer that no standard format can express gives the reason instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harness.nn.fp8 import Fp8Linear
from harness.nn.integer_linear import IntegerLinear
from harness.nn.outlier_int8 import OutlierInt8Linear
from harness.nn.packing import unpack_weight
from harness.nn.quantized import ActivationScale, Int8Linear, QuantizedLinear
from harness.nn.semi_structured import SemiStructuredLinear
from harness.nn.sparse_8_bit import SparseFp8Linear, SparseInt8Linear
from harness.nn.static_int8 import StaticInt8Linear

__all__ = [
    "DenseForm",
    "FloatForm",
    "Form",
    "Inputs",
    "IntegerForm",
    "NoForm",
    "dense_form_of",
    "form_of",
    "weight_of",
]


@dataclass(frozen=True)
class Inputs:
    """How the input of a layer is rounded: to 8 bits, symmetrically.

    Args:
        granularity: one scale per token, or one for all of the input.
        scale: float32 [1], found by calibration; None: found in the input itself.
    """

    granularity: ActivationScale
    scale: torch.Tensor | None = None


@dataclass(frozen=True)
class IntegerForm:
    """A weight [out, in] whose values are ``scale * (code - zero)``.

    Args:
        codes: uint8 [out, in], columns in their own order.
        scale: [out, groups], in the type in which it is stored.
        zero: uint8 [out, groups]; None: ``2^(bits - 1)`` throughout (symmetric).
        group_size: columns per scale, or -1 for one group.
        group_of: int32 [in], the group of each column; None: groups are consecutive columns.
        inputs: None: the input is not rounded.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bits: int
    group_size: int
    bias: torch.Tensor | None
    group_of: torch.Tensor | None = None
    inputs: Inputs | None = None

    @property
    def scheme(self) -> str:
        """Such as ``W4A16 g128 asym``."""
        groups = "" if self.group_size == -1 else f" g{self.group_size}"
        sym = "" if self.zero is None else " asym"
        order = "" if self.group_of is None else " act-order"
        return f"W{self.bits}A{16 if self.inputs is None else 8}{groups}{sym}{order}"

    def dequantize(self) -> torch.Tensor:
        """The matrix [out, in] in float32."""
        places = self.places()
        zero: Any = 2 ** (self.bits - 1) if self.zero is None else self.zero.float()[:, places]
        weight: torch.Tensor = (self.codes.float() - zero) * self.scale.float()[:, places]
        return weight

    def places(self) -> torch.Tensor:
        """The group of each column, int64 [in]."""
        columns = self.codes.shape[1]
        if self.group_of is not None:
            return self.group_of.long()
        size = columns if self.group_size == -1 else self.group_size
        return torch.arange(columns, device=self.codes.device) // size


@dataclass(frozen=True)
class FloatForm:
    """A weight [out, in] in 8-bit floating point (E4M3) times a scale.

    Args:
        scale: float32 [out], or [1] for one in all.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None
    inputs: Inputs

    scheme = "FP8"

    def dequantize(self) -> torch.Tensor:
        """The matrix [out, in] in float32."""
        return self.codes.float() * self.scale[:, None]


@dataclass(frozen=True)
class DenseForm:
    """A weight [out, in] as it is multiplied with.

    `differs` says how the layer that it was taken out of computes otherwise; None: it does not.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    differs: str | None = None

    scheme = "dense"

    def dequantize(self) -> torch.Tensor:
        """The matrix [out, in] in float32."""
        return self.weight.float()


@dataclass(frozen=True)
class NoForm:
    """A layer that no standard format can express."""

    reason: str


Form = IntegerForm | FloatForm | DenseForm
_ROUNDED = "its input is not rounded to 8 bits"


def form_of(module: nn.Module) -> Form | NoForm:
    """What a layer stores, its tensors on the device of the layer, or why there is no standard form of it.

    By the very class of the layer: one that is derived from a known class may compute something else.
    """
    make = _FORMS.get(type(module))
    if make is None:
        return NoForm(_OTHERS.get(type(module).__name__, f"no standard format has {type(module).__name__}"))
    return make(module)


def dense_form_of(module: nn.Module) -> DenseForm | NoForm:
    """The plain matrix of any layer or embedding that can tell it, in float32 where it is computed.

    What a plain layer leaves out, the rounding of the input, stands in `DenseForm.differs`.
    """
    form = form_of(module)
    if isinstance(form, DenseForm):
        return form
    layer: Any = module
    if isinstance(form, IntegerForm | FloatForm):
        differs = None if form.inputs is None else _ROUNDED
        return DenseForm(form.dequantize(), form.bias, differs)
    if isinstance(layer, StaticInt8Linear):
        return DenseForm(layer.dequantize(), _bias_in_offset(layer), _ROUNDED)
    if isinstance(layer, OutlierInt8Linear):
        return DenseForm(layer.dequantize(), _bias(layer), _ROUNDED)
    weight = getattr(layer, "weight", None)
    if isinstance(weight, torch.Tensor) and type(weight.data) is not torch.Tensor:
        tell = getattr(weight, "dequantize", None)
        return form if tell is None else DenseForm(tell(), _bias(layer), "another library multiplies it")
    if isinstance(layer, nn.Linear):  # it imitates what another library would compute
        return DenseForm(layer.weight.detach(), _bias(layer), getattr(layer, "kernel_name", None))
    rows = getattr(layer, "rows", None)  # of a packed embedding
    tell = getattr(layer, "dense_weight", None) or getattr(rows, "dense_weight", None)
    differs = _ROUNDED if getattr(layer, "a_bits", 16) < 16 else None
    return form if tell is None else DenseForm(tell(), _bias(layer), differs)


def weight_of(module: nn.Module) -> torch.Tensor:
    """The matrix [out, in] that a layer or embedding says it multiplies with, float32 unless it is plain."""
    layer: Any = module
    for name in ("dequantize", "dense_weight"):
        if hasattr(layer, name):
            weight: torch.Tensor = getattr(layer, name)()
            return weight
    form = dense_form_of(module)
    assert isinstance(form, DenseForm)
    return form.weight


def _of_linear(module: Any) -> Form | NoForm:
    weight, bias = module.weight.detach(), _bias(module)
    if type(weight) is not torch.Tensor:
        return NoForm(f"its weight is a {type(weight).__name__}, which belongs to another library")
    if getattr(module, "simulated", False):
        return NoForm("its weight imitates in dense arithmetic what another library would compute")
    return DenseForm(weight, bias)


def _of_quantized(module: Any, inputs: Inputs | None = None) -> Form | NoForm:
    weight = unpack_weight(module.packed)
    if weight.zero is not None and weight.zero.is_floating_point():
        return NoForm("its zero points are no whole numbers, and no standard format has others")
    columns, group_size = module.in_features, module.group_size
    if group_size != -1 and columns % group_size:
        return NoForm(
            f"groups of {group_size} do not divide its {columns} columns; no standard format has a shorter "
            "last group"
        )
    out = module.out_features
    scale = weight.scale.expand(out, -1)
    zero = None if weight.zero is None else weight.zero.expand(out, -1)
    codes, group_of = weight.codes[:, :columns], None
    if module.order is not None:
        order = module.order.long()
        codes = codes.new_empty(codes.shape).index_copy_(1, order, codes)
        if group_size != -1:
            places = torch.arange(columns, dtype=torch.int32, device=order.device) // group_size
            group_of = torch.empty_like(places).index_copy_(0, order, places)
            if torch.equal(group_of, places):
                group_of = None
    return IntegerForm(codes, scale, zero, module.bits, group_size, _bias(module), group_of, inputs)


def _of_integer(module: Any) -> Form | NoForm:
    return _of_quantized(module, Inputs("per-token"))


def _of_int8(module: Any) -> Form:
    codes = (module.int8_codes().to(torch.int16) + (1 << module.bits - 1)).to(torch.uint8)
    scale = module.row_scales().expand(module.out_features)[:, None]
    inputs = Inputs(module.a_gran, module.input_scale)
    return IntegerForm(codes, scale, None, module.bits, -1, _bias(module), None, inputs)


def _of_fp8(module: Any) -> Form | NoForm:
    if module.codes.dtype != torch.float8_e4m3fn:
        return NoForm("it is in E5M2, and compressed-tensors has E4M3 only")
    return FloatForm(module.codes, module.scales, _bias(module), Inputs(module.a_gran, module.input_scale))


def _of_sparse_fp8(module: Any) -> Form:
    return FloatForm(module.codes_of_all(), module.scales, _bias(module), Inputs(module.a_gran))


def _of_semi_structured(module: Any) -> Form:
    return DenseForm(module.dense_weight(), _bias(module))


def _bias(module: Any) -> torch.Tensor | None:
    """The bias of a layer, or of the layer that it stands around."""
    bias = getattr(module, "bias", None)
    if bias is None:
        bias = getattr(getattr(module, "base", None), "bias", None)
    return None if bias is None else bias.detach()


def _bias_in_offset(layer: StaticInt8Linear) -> torch.Tensor:
    """The bias [out], out of the offset that also holds what the zero points of the input add.

    Zeros where nothing but rounding is left of it.
    """
    middle = 128 if layer.a_bits == 8 else 128 * 256 + 128
    shift = layer.input_scale.double() * (middle - layer.input_zero.double())  # [groups]
    sizes = torch.tensor(layer.sizes, device=shift.device)
    columns = shift.repeat_interleave(sizes)  # [in], as they are stored
    if layer.order is not None:
        columns = torch.empty_like(columns).index_copy_(0, layer.order.long(), columns)
    weight = layer.dequantize().double()
    bias = layer.offset.double() - weight @ columns
    rounding = 8 * torch.finfo(torch.float32).eps * (weight.abs() @ columns.abs())
    return (torch.zeros_like(bias) if bool((bias.abs() <= rounding).all()) else bias).float()


_FORMS: dict[type[nn.Module], Callable[[Any], Form | NoForm]] = {
    nn.Linear: _of_linear,
    QuantizedLinear: _of_quantized,
    IntegerLinear: _of_integer,
    Int8Linear: _of_int8,
    Fp8Linear: _of_fp8,
    SemiStructuredLinear: _of_semi_structured,
    # As dense codes with zeros: no format here stores 2:4 in 8 bits.
    SparseInt8Linear: _of_int8,
    SparseFp8Linear: _of_sparse_fp8,
}

_OTHERS = {
    "CodebookLinear": "no standard format has tables of values (GOBO's, NF4's) in compressed-tensors or GPTQ",
    "OutlierInt8Linear": "columns of outliers in 16 bits have no standard form in compressed-tensors or GPTQ",
    "StaticInt8Linear": "its input has zero points on a static grid, and other tensors are rounded as well",
}
