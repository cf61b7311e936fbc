"""Residual sums become biases of the products before them, where that changes nothing but a rounding."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn

from harness.kernels import dense, weight_only
from harness.kernels.rewriting import rewrite_linears
from harness.kernels.rewriting_residual import fold_residuals
from harness.nn.quantized import Int8Linear, QuantizedLinear
from harness.nn.quantizer import quantize_weight


@pytest.fixture(autouse=True)
def as_with_triton(monkeypatch):
    """As on a CUDA machine: graphs are rewritten; the operators still run in plain torch."""
    monkeypatch.setattr(dense, "has_triton", lambda device: True)
    monkeypatch.setattr(dense, "_runs", lambda *_: False)
    monkeypatch.setattr(weight_only, "share_a_launch", lambda form, rows, dtype, device: rows == 1)
    monkeypatch.setattr(weight_only, "_run_together", lambda x, weights: False)


def layer(kind: str, *, bias: bool = False) -> nn.Module:
    torch.manual_seed(3)
    linear = nn.Linear(128, 128, bias=bias)
    if kind == "dense":
        return linear
    own = None if linear.bias is None else linear.bias.detach()
    if kind == "int8":
        return Int8Linear.from_weight(quantize_weight(linear.weight.detach(), bits=8, sym=True), own)
    weight = quantize_weight(linear.weight.detach(), bits=4, group_size=64, sym=False)
    return QuantizedLinear.from_weight(weight, own)


def traced(function, *inputs) -> tuple[int, int, torch.Tensor]:
    """How many sums were folded, how many additions are left, and the result of the rewritten graph."""
    seen = []

    def backend(module, _inputs):
        rewrite_linears(module)
        folded = fold_residuals(module)
        added = (operator.add, operator.iadd, torch.add)
        seen.append((folded, sum(node.target in added for node in module.graph.nodes)))
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        y = torch.compile(function, backend=backend, dynamic=False)(*inputs)
    [(folded, left)] = seen
    return folded, left, y


KINDS = pytest.mark.parametrize("kind", ["dense", "packed", "int8"])


@KINDS
@pytest.mark.parametrize("how", ["before", "after", "torch", "in place"])
def test_a_sum_after_a_product_is_its_bias(kind, how):
    module = layer(kind)

    def block(x):
        y = module(torch.tanh(x))
        if how == "in place":
            y += x
            return y
        return torch.add(y, x) if how == "torch" else x + y if how == "before" else y + x

    x = torch.randn(1, 1, 128)
    folded, left, y = traced(block, x)
    assert (folded, left) == (1, 0)
    with torch.no_grad():
        torch.testing.assert_close(y, block(x.clone()))


@KINDS
def test_what_is_more_than_a_sum_of_one_row_stays(kind):
    plain, biased = layer(kind), layer(kind, bias=True)
    x = torch.randn(1, 1, 128)

    def used_twice(x):
        y = plain(x)
        return x + y, y * 2

    def of_another_shape(x):
        return plain(x) + x[..., :1]

    def of_another_type(x):
        return plain(x) + x.double()

    def made_afterwards(x):
        y = plain(x)
        return y + torch.tanh(x)

    def scaled(x):
        return torch.add(plain(x), x, alpha=2.0)

    def with_a_bias(x):
        return biased(x) + x

    def changed_and_read(x):
        kept = x * 2
        y = plain(torch.tanh(x))
        kept += y
        return kept * kept

    def changed_meanwhile(x):
        kept = x * 2
        y = plain(torch.tanh(x))
        kept.mul_(3)
        return y + kept

    functions = (used_twice, of_another_shape, of_another_type, made_afterwards, scaled, with_a_bias)
    for function in (*functions, changed_and_read, changed_meanwhile):
        folded, left, y = traced(function, x)
        assert (folded, left) == (0, 1), function.__name__
        with torch.no_grad():
            torch.testing.assert_close(y, function(x))
    rows = torch.randn(1, 2, 128)
    assert traced(lambda x: x + plain(x), rows)[0] == 0


@KINDS
def test_a_bias_lies_side_by_side(kind):
    module, seen = layer(kind), []

    def backend(graph, _inputs):
        rewrite_linears(graph)
        assert fold_residuals(graph) == 1
        for node in graph.graph.nodes:
            if node.op == "call_method" and node.target == "contiguous":
                seen.append(node)
        return graph.forward

    wide = torch.randn(1, 1, 256)

    def block(x, apart):
        return apart[..., ::2] + module(torch.tanh(x))

    torch._dynamo.reset()
    x = torch.randn(1, 1, 128)
    with torch.no_grad():
        y = torch.compile(block, backend=backend, dynamic=False)(x, wide)
        torch.testing.assert_close(y, block(x, wide))
    assert len(seen) == 1


@KINDS
def test_two_products_are_not_each_others_bias_twice(kind):
    one, other = layer(kind), layer(kind)

    def block(x):
        return one(torch.tanh(x)) + other(torch.sin(x))

    x = torch.randn(1, 1, 128)
    folded, left, y = traced(block, x)
    assert (folded, left) == (1, 0)
    with torch.no_grad():
        torch.testing.assert_close(y, block(x))
