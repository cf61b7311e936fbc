"""Rewritten graphs in which something is changed in place read what the model as written reads."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from harness.kernels import decode_attention, dense, int8, weight_only
from harness.kernels.rewriting import rewrite_linears
from harness.kernels.rewriting_attention import rewrite_decode_attention
from harness.kernels.rewriting_int8 import join_int8
from harness.kernels.rewriting_residual import fold_residuals
from harness.nn.quantized import Int8Linear, QuantizedLinear
from harness.nn.quantizer import quantize_weight


@pytest.fixture(autouse=True)
def as_with_triton(monkeypatch):
    """As on a CUDA machine: graphs are rewritten; the operators still run in plain torch."""
    for module in (dense, decode_attention):
        monkeypatch.setattr(module, "has_triton", lambda device: True)
        monkeypatch.setattr(module, "_runs", lambda *_: False)
    monkeypatch.setattr(weight_only, "share_a_launch", lambda form, rows, dtype, device: rows == 1)
    monkeypatch.setattr(int8, "share_a_launch", lambda rows, out, columns, device: rows == 1)
    monkeypatch.setattr(weight_only, "_launch_together", lambda x, weights: None)
    monkeypatch.setattr(int8, "_run_together", lambda x, weights: False)


def layer(kind: str) -> nn.Module:
    torch.manual_seed(3)
    linear = nn.Linear(128, 128, bias=False)
    if kind == "dense":
        return linear
    if kind == "int8":
        return Int8Linear.from_weight(quantize_weight(linear.weight.detach(), bits=8, sym=True), None)
    weight = quantize_weight(linear.weight.detach(), bits=4, group_size=64, sym=False)
    return QuantizedLinear.from_weight(weight, None)


def same_when_rewritten(function, *inputs: torch.Tensor) -> list[torch.fx.Node]:
    """The calls of the rewritten graph, which computes and changes what the function does."""
    nodes: list[torch.fx.Node] = []

    def backend(module, _inputs):
        for rewrite in (rewrite_linears, join_int8, fold_residuals, rewrite_decode_attention):
            rewrite(module)
        nodes.extend(module.graph.nodes)
        return module.forward

    torch._dynamo.reset()
    expected, found = ([each.clone() for each in inputs] for _ in range(2))
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(function, backend=backend, dynamic=False)(*found), function(*expected)
        )
    torch.testing.assert_close(found, expected)
    return nodes


def most_joined(nodes: list[torch.fx.Node]) -> int:
    """How many products the call with the most of them has; 1 where none are joined."""
    places = {
        torch.ops.harness.linears.default: 1,
        torch.ops.harness.weight_only_linears.default: 1,
        torch.ops.harness.int8_linears.default: 2,
    }
    return max((len(node.args[places[node.target]]) for node in nodes if node.target in places), default=1)


def through_a_view(x):
    x.view(-1)[:7].mul_(3)


def a_part(x):
    x[..., :3] = 0.0


def by_an_operator(x):
    view = x.transpose(0, 1)
    view += 1


def by_an_option(x):
    functional.relu(x, inplace=True)


def by_a_function(x):
    torch.relu_(x)


def as_the_output(x):
    torch.tanh(5 * x, out=x)


def by_an_operator_of_a_library(x):
    torch.ops.aten.mul_.Tensor(x, x)


def of_a_list(x):
    torch._foreach_add_([x], 1.0)


WAYS = pytest.mark.parametrize(
    "change",
    [
        lambda x: x.mul_(3),
        through_a_view,
        a_part,
        by_an_operator,
        by_an_option,
        by_a_function,
        as_the_output,
        by_an_operator_of_a_library,
        of_a_list,
    ],
)
KINDS = pytest.mark.parametrize("kind", ["dense", "packed", "int8"])
X = torch.linspace(-2, 3, 128).view(1, 1, 128)


@KINDS
@WAYS
def test_products_are_not_joined_across_a_change_of_what_they_read(change, kind):
    layers = [layer(kind) for _ in range(3)]

    def block(x):
        x = x * 2
        first = layers[0](x)
        change(x)
        return first, layers[1](x), layers[2](x)

    assert most_joined(same_when_rewritten(block, X)) == 2  # those after it


@KINDS
def test_changes_of_something_else_keep_no_products_apart(kind):
    layers = [layer(kind) for _ in range(2)]

    def block(x, cache):
        y = layers[0](x)
        cache[..., :128] = y
        y.mul_(2)
        return y, layers[1](x)

    assert most_joined(same_when_rewritten(block, X, torch.zeros(1, 1, 200))) == 2


def test_a_weight_that_is_changed_is_read_in_its_turn():
    def block(x, weight, other):
        first = functional.linear(x, weight)
        other.mul_(2)
        return first, functional.linear(x, other)

    weight, other = torch.randn(2, 16, 128)
    assert most_joined(same_when_rewritten(block, X, weight, other)) == 1


def test_rows_that_were_copied_before_the_change_are_not_those_after_it():
    layers = [layer("packed") for _ in range(2)]

    def block(x):
        x = (x * 2).view(64, 2).t()
        before = x.reshape(1, 128)
        x.mul_(2)
        after = x.reshape(1, 128)
        return layers[0](after), layers[1](before)

    same_when_rewritten(block, X)


@KINDS
@WAYS
def test_what_is_added_is_not_read_before_it_is_changed(change, kind):
    module = layer(kind)

    def block(x):
        kept = x * 2
        y = module(torch.tanh(x))
        change(kept)
        return y + kept

    nodes = same_when_rewritten(block, X)
    assert not any(node.target == "contiguous" for node in nodes)


@pytest.mark.parametrize("changed", ["key", "value"])
def test_copies_of_shared_heads_are_read_where_these_have_changed_since(changed):
    def copies(x):
        batch, heads, length, width = x.shape
        wide = x[:, :, None, :, :].expand(batch, heads, 2, length, width)
        return wide.reshape(batch, heads * 2, length, width)

    def run(query, key, value):
        keys, values = copies(key), copies(value)
        (key if changed == "key" else value)[:, :, 3].zero_()
        return functional.scaled_dot_product_attention(query, keys, values)

    nodes = same_when_rewritten(run, torch.randn(1, 4, 1, 16), *torch.randn(2, 1, 2, 9, 16))
    [call] = [node for node in nodes if node.target is torch.ops.harness.decode_attention.default]
    assert {node.op for node in call.args[1:3]} == {"call_method"}
