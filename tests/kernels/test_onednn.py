"""Products by oneDNN are those of plain torch, gradients included, and happen only where meant to."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from harness.kernels import onednn
from harness.kernels.onednn import FEWEST_ROWS, OneDnnProducts, onednn_products
from harness.testing.models import tiny_model
from harness.training import causal_loss

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN"
)


@pytest.fixture
def products(monkeypatch):
    """The shapes of all products that went to oneDNN."""
    seen = []
    product = onednn._product

    def noted(x, weight, bias=None):
        seen.append((tuple(x.shape), tuple(weight.shape)))
        return product(x, weight, bias)

    monkeypatch.setattr(onednn, "_product", noted)
    return seen


def _random(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(64,), (4, 16), (2, 2, 32)])
def test_a_linear_layer_is_the_same(products, leading, bias):
    x, weight, b = _random(*leading, 48), _random(40, 48), _random(40) if bias else None
    exact = functional.linear(x.double(), weight.double(), None if b is None else b.double())
    with OneDnnProducts():
        found = functional.linear(x, weight, b)
        found_transposed = functional.linear(x, _random(48, 40).t(), b)
    assert len(products) == 2
    assert found.shape == (*leading, 40)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-5)
    torch.testing.assert_close(
        found_transposed, functional.linear(x, _random(48, 40).t(), b), rtol=0, atol=2e-5
    )


def test_a_conv1d_layer_is_the_same(products):
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(40, 48)
    x = _random(3, 16, 48)
    with torch.no_grad(), OneDnnProducts():
        found = layer(x)
    assert products == [((48, 48), (40, 48))]
    torch.testing.assert_close(found, layer(x), rtol=0, atol=2e-5)


def test_gradients_are_those_of_autograd(products):
    def gradients(mode):
        given = [_random(2, 16, 24), _random(20, 24), _random(20)]
        for each in given:
            each.requires_grad_()
        with mode:
            functional.linear(*given).square().sum().backward()
        return [each.grad for each in given]

    expected = gradients(onednn.nullcontext())
    assert not products
    found = gradients(OneDnnProducts())
    assert len(products) == 3
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_gradients_that_nobody_wants_are_not_computed(products):
    x, weight = _random(32, 24), _random(20, 24).requires_grad_()
    with OneDnnProducts():
        functional.linear(x, weight).sum().backward()
    assert len(products) == 2
    assert x.grad is None


def test_a_model_trains_alike():
    model, tokens = tiny_model("llama"), torch.arange(64).view(2, 32) % 50
    causal_loss(model, tokens).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with OneDnnProducts():
        loss = causal_loss(model, tokens)
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


class _Odd(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (_random(FEWEST_ROWS - 1, 24), _random(20, 24)),
        (_random(64, 24, dtype=torch.float64), _random(20, 24, dtype=torch.float64)),
        (_random(64, 24).bfloat16(), _random(20, 24).bfloat16()),
        (_random(64, 24).as_subclass(_Odd), _random(20, 24)),
        (_random(64, 24), _random(20, 24).as_subclass(_Odd)),
    ],
    ids=["few rows", "float64", "bfloat16", "subclass", "subclass of weight"],
)
def test_everything_else_is_left_to_torch(products, x, weight):
    with OneDnnProducts():
        found = functional.linear(x, weight)
    assert not products
    assert torch.equal(found, functional.linear(x, weight))


@pytest.mark.parametrize(
    "bias", [_random(80)[::2], _random(1), _random(1).expand(40)], ids=["strides", "one number", "expanded"]
)
def test_a_bias_that_onednn_would_read_wrongly_is_left_to_torch(products, bias):
    x, weight = _random(64, 48), _random(40, 48)
    with OneDnnProducts():
        found = functional.linear(x, weight, bias), torch.addmm(bias, x, weight.t())
    assert not products
    for each in found:
        torch.testing.assert_close(each, functional.linear(x, weight, bias))


def test_autocast_is_left_to_torch(products):
    with OneDnnProducts(), torch.autocast("cpu", torch.bfloat16):
        assert functional.linear(_random(64, 24), _random(20, 24)).dtype == torch.bfloat16
    assert not products


def test_what_does_not_fit_together_fails_as_ever():
    with OneDnnProducts(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        functional.linear(_random(64, 24), _random(20, 25))


@pytest.mark.parametrize(
    ("maker", "machine", "faster"),
    [
        ("AuthenticAMD", "x86_64", True),
        ("GenuineIntel", "x86_64", False),
        (None, "x86_64", False),
        ("AuthenticAMD", "aarch64", False),
    ],
)
def test_it_is_used_where_mkl_has_no_fast_path(monkeypatch, maker, machine, faster):
    monkeypatch.setattr(onednn, "_maker", lambda: maker)
    monkeypatch.setattr(onednn.platform, "machine", lambda: machine)
    assert onednn._is_faster.__wrapped__() == (faster and torch.backends.mkl.is_available())


def test_scoring_uses_it_and_a_plain_call_does_not(products, monkeypatch):
    from harness.evaluate.windows import logits_of

    monkeypatch.setattr(onednn, "_is_faster", lambda: True)
    model, tokens = tiny_model("llama"), torch.arange(64).view(2, 32) % 50
    with torch.no_grad():
        plain = model(tokens).logits
        assert not products
        scored = logits_of(model, tokens)
    assert products
    torch.testing.assert_close(scored, plain, rtol=0, atol=1e-4)


def test_no_gpu_is_touched_by_it():
    with onednn_products(torch.device("meta")) as mode:
        assert mode is None
