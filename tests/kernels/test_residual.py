"""Residual sums become biases of the products before them, where that changes nothing but a rounding."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn

from harness.kernels import dense, semi_structured, sparse_rows, weight_only
from harness.kernels.rewriting import rewrite_linears
from harness.kernels.rewriting_residual import fold_residuals
from harness.nn.quantized import Int8Linear, QuantizedLinear
from harness.nn.quantizer import quantize_weight
from harness.nn.semi_structured import SemiStructuredLinear
from harness.nn.sparse_8_bit import SparseFp8Linear, SparseInt8Linear
from tests.kernels.test_joined_sparse import prepare_several
from tests.kernels.test_sparse_rows import encoded, needs_library, rel_error
from tests.nn.test_semi_structured import two_of_four


@pytest.fixture(autouse=True)
def as_with_triton(monkeypatch):
    """As on a CUDA machine: graphs are rewritten; the operators still run in plain torch."""
    monkeypatch.setattr(dense, "has_triton", lambda device: True)
    monkeypatch.setattr(dense, "_runs", lambda *_: False)
    monkeypatch.setattr(weight_only, "share_a_launch", lambda form, rows, dtype, device: rows == 1)
    monkeypatch.setattr(weight_only, "_launch_together", lambda x, weights: None)


@pytest.fixture
def library(monkeypatch):
    """A stand-in for cuSPARSELt's form on the CPU, and for the kernel that reads it."""
    monkeypatch.setattr(torch, "_cslt_compress", encoded)
    monkeypatch.setattr(semi_structured, "is_available", lambda device, dtype: device.type == "cpu")
    monkeypatch.setattr(sparse_rows, "is_available", lambda device, dtype: device.type == "cpu")
    monkeypatch.setattr(sparse_rows, "prepare_several", prepare_several)


def layer(kind: str, *, bias: bool = False) -> nn.Module:
    torch.manual_seed(3)
    if kind.startswith("2:4"):
        return sparse_layer(kind, bias=bias)
    linear = nn.Linear(128, 128, bias=bias)
    if kind == "dense":
        return linear
    own = None if linear.bias is None else linear.bias.detach()
    if kind == "int8":
        return Int8Linear.from_weight(quantize_weight(linear.weight.detach(), bits=8, sym=True), own)
    weight = quantize_weight(linear.weight.detach(), bits=4, group_size=64, sym=False)
    return QuantizedLinear.from_weight(weight, own)


def sparse_layer(kind: str, *, bias: bool = False) -> SemiStructuredLinear:
    weight, own = two_of_four(128, 128), torch.randn(128).bfloat16() if bias else None
    if kind == "2:4 int8":
        return SparseInt8Linear.from_weight(quantize_weight(weight, bits=8, sym=True), own, tuned=False)
    if kind == "2:4 fp8":
        return SparseFp8Linear.from_float(weight, own, tuned=False)
    return SemiStructuredLinear.from_dense(weight.bfloat16(), own, tuned=False)


def input_of(kind: str, rows: int = 1) -> torch.Tensor:
    x = torch.randn(1, rows, 128)
    return x.bfloat16() if kind.startswith("2:4") else x


def assert_close(found, expected) -> None:
    """But for a rounding, which is coarse in 16 bits."""
    is_short = torch.bfloat16 in [each.dtype for each in (found if isinstance(found, tuple) else [found])]
    within = {"rtol": 2e-2, "atol": 5e-2} if is_short else {}
    torch.testing.assert_close(found, expected, **within)


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


SPARSE = ["2:4", "2:4 int8", "2:4 fp8"]
KINDS = pytest.mark.parametrize("kind", ["dense", "packed", "int8", *SPARSE])


@pytest.mark.usefixtures("library")
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

    x = input_of(kind)
    folded, left, y = traced(block, x)
    assert (folded, left) == (1, 0)
    with torch.no_grad():
        assert_close(y, block(x.clone()))


@pytest.mark.usefixtures("library")
@KINDS
def test_what_is_more_than_a_sum_of_one_row_stays(kind):
    plain, biased = layer(kind), layer(kind, bias=True)
    x = input_of(kind)

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
            assert_close(y, function(x))
    assert traced(lambda x: x + plain(x), input_of(kind, rows=2))[0] == 0


@pytest.mark.usefixtures("library")
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

    x = input_of(kind)
    wide = torch.randn(1, 1, 256).to(x.dtype)

    def block(x, apart):
        return apart[..., ::2] + module(torch.tanh(x))

    torch._dynamo.reset()
    with torch.no_grad():
        y = torch.compile(block, backend=backend, dynamic=False)(x, wide)
        assert_close(y, block(x, wide))
    assert len(seen) == 1


@pytest.mark.usefixtures("library")
@KINDS
def test_two_products_are_not_each_others_bias_twice(kind):
    one, other = layer(kind), layer(kind)

    def block(x):
        return one(torch.tanh(x)) + other(torch.sin(x))

    x = input_of(kind)
    folded, left, y = traced(block, x)
    assert (folded, left) == (1, 0)
    with torch.no_grad():
        assert_close(y, block(x))


@pytest.mark.usefixtures("library")
def test_the_librarys_product_keeps_its_sum(monkeypatch):
    """It may round before it adds a bias."""
    module = sparse_layer("2:4")
    module.reads_rows = False

    def product(packed, x, out_features, *, bias=None, tuned=False):
        assert bias is None
        return (x.float() @ sparse_rows.unpack(packed, out_features, 128).float().T).to(x.dtype)

    monkeypatch.setattr(semi_structured, "product", product)
    x = input_of("2:4")
    folded, left, y = traced(lambda x: x + module(torch.tanh(x)), x)
    assert (folded, left) == (0, 1)
    assert_close(y, x + module(torch.tanh(x)))


@pytest.mark.gpu
@needs_library
@pytest.mark.parametrize("kind", SPARSE)
def test_a_sum_after_a_sparse_product_is_the_kernels_bias(kind):
    module = sparse_layer(kind).cuda()
    assert module.reads_rows
    x = input_of(kind).cuda()

    def block(x):
        return x + module(torch.tanh(x))

    folded, left, y = traced(block, x)
    assert (folded, left) == (1, 0)
    assert_close(y, block(x))
    exact = x.double() + torch.tanh(x).double() @ module.dense_weight().double().T
    assert rel_error(y, exact) <= {"2:4": 4e-3, "2:4 int8": 2e-2, "2:4 fp8": 5e-2}[kind]
