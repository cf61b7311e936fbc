"""Tiny models with layers of every stored form."""

from __future__ import annotations

import torch
from torch import nn

from harness.nn.fp8 import Fp8Linear
from harness.nn.quantized import Int8Linear, QuantizedLinear
from harness.nn.quantizer import QuantizedWeight, quantize_weight
from harness.nn.surgery import replace_linears
from harness.testing.models import tiny_model


def integer_model(
    family: str, *, bits: int, group_size: int = 32, sym: bool = False, act_order: bool = False
) -> nn.Module:
    """A tiny model whose block linears hold packed integers."""

    def make(_: str, linear: nn.Linear) -> nn.Module:
        weight, order = linear.weight, None
        if act_order:
            order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1))
            weight = weight[:, order]
        made = quantize_weight(weight, bits=bits, group_size=group_size, sym=sym)
        if order is not None:
            made = QuantizedWeight(
                made.codes, made.scale, made.zero, bits, group_size, made.in_features, order.to(torch.int32)
            )
        return QuantizedLinear.from_weight(made, linear.bias)

    return replace_linears(tiny_model(family), make)


def int8_model(family: str, *, a_gran: str = "per-token", bits: int = 8) -> nn.Module:
    """A tiny model whose block linears multiply int8 with int8."""
    static = torch.tensor([0.02]) if a_gran == "per-tensor-static" else None

    def make(_: str, linear: nn.Linear) -> nn.Module:
        weight = quantize_weight(linear.weight, bits=bits, sym=True)
        return Int8Linear.from_weight(weight, linear.bias, a_gran=a_gran, input_scale=static)

    return replace_linears(tiny_model(family), make)


def fp8_model(family: str, **options) -> nn.Module:
    """A tiny model whose block linears multiply float8 with float8."""
    make = lambda _, linear: Fp8Linear.from_float(linear.weight, linear.bias, **options)  # noqa: E731
    return replace_linears(tiny_model(family), make)
