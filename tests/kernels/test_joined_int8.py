"""Int8 products that read the same row: joined in a traced model, multiplied in one launch.

Without a CUDA device: ``TRITON_INTERPRET=1 python -m pytest tests/kernels/test_joined_int8.py``.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.kernels import int8, int8_launches
from harness.kernels.rewriting_int8 import join_int8
from harness.nn.quantized import Int8Linear
from harness.nn.quantized_tokens import QuantizingNorm
from harness.nn.quantizer import quantize_weight
from tests.kernels.interpreting import DEVICES, DTYPES, OLD_NUMPY
from tests.kernels.joining import Beside, products_of_calls

JOINED = torch.ops.harness.int8_linears.default
ALONE = (torch.ops.harness.int8_linear.default, torch.ops.harness.int8_linear_of_codes.default)


def stored(out: int, columns: int, *, per_channel: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(out)
    codes = torch.randint(-127, 128, (out, columns), generator=generator, dtype=torch.int8)
    return codes, torch.rand(out if per_channel else 1, generator=generator) / 1e3


def inputs(outs, columns, dtype, *, is_rounded, per_channel=True, with_bias=False):
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(1, columns, generator=generator).to(dtype)
    scale = None
    if is_rounded:
        x, scale = int8.quantize(x, None, per_token=True)
    weights, scales = zip(*(stored(out, columns, per_channel=per_channel) for out in outs), strict=True)
    biases = [torch.randn(out, generator=generator).to(dtype) for out in outs] if with_bias else []
    return x, scale, list(weights), list(scales), biases, dtype


# --- the operator -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_rounded", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_without_cuda_it_is_each_product_for_itself(is_rounded, with_bias):
    given = inputs((24, 16), 32, torch.float32, is_rounded=is_rounded, with_bias=with_bias)
    x, scale, weights, scales, biases, dtype = given
    for place, y in enumerate(int8.linears(*given)):
        bias = biases[place] if biases else None
        if is_rounded:
            expected = int8.linear_of_codes(x, scale, weights[place], scales[place], bias, dtype)
        else:
            expected = int8.linear(x, weights[place], scales[place], bias)
        assert torch.equal(y, expected)


def test_the_operator_passes_torchs_own_checks():
    for is_rounded in (False, True):
        given = inputs((24, 16), 32, torch.float32, is_rounded=is_rounded, with_bias=True)
        torch.library.opcheck(JOINED, given)


@OLD_NUMPY
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_rounded", [False, True])
@pytest.mark.parametrize("outs", [(64, 16, 16), (9, 40), (8, 8, 8)], ids=str)
@pytest.mark.parametrize("form", [(True, True), (False, False)], ids=str)
def test_one_launch_has_the_bits_of_several(outs, form, is_rounded, dtype, device):
    from harness.kernels.triton_int8_gemv import gemv, gemv_several

    per_channel, with_bias = form
    given = inputs(outs, 208, dtype, is_rounded=is_rounded, per_channel=per_channel, with_bias=with_bias)
    x, scale, *lists, _ = given
    x, scale = x.to(device), None if scale is None else scale.to(device)
    weights, scales, biases = ([each.to(device) for each in found] for found in lists)
    found = gemv_several(x, scale, weights, scales, biases, dtype)
    for place, y in enumerate(found):
        bias = biases[place] if biases else None
        launch = int8_launches.choose(1, max(outs), 208)
        assert torch.equal(y, gemv(x, scale, weights[place], scales[place], bias, dtype, launch=launch))
        assert y.shape == (1, outs[place])


# --- in a traced model --------------------------------------------------------------------------------


@pytest.fixture
def joined(monkeypatch):
    """As on a CUDA machine: graphs are rewritten; the operator still runs in plain torch."""
    monkeypatch.setattr(int8, "share_a_launch", lambda rows, out, columns, device: rows == 1)
    monkeypatch.setattr(int8, "_run_together", lambda x, weights: False)


def layer(out: int, *, bias: bool = False) -> Int8Linear:
    torch.manual_seed(out)
    weight = quantize_weight(torch.randn(out, 64), bits=8, sym=True)
    return Int8Linear.from_weight(weight, torch.randn(out) if bias else None)


def calls_of(module: nn.Module, x: torch.Tensor) -> list[int]:
    return products_of_calls(module, x, join_int8, (JOINED,), 2, ALONE)


@pytest.mark.usefixtures("joined")
def test_products_of_one_row_are_joined_and_of_two_are_not():
    module = Beside(layer(48), layer(16), layer(16), layer(32))
    assert calls_of(module, torch.randn(1, 1, 64)) == [3, 1]
    assert calls_of(module, torch.randn(1, 2, 64)) == [1, 1, 1, 1]


@pytest.mark.usefixtures("joined")
def test_a_bias_and_another_row_keep_products_apart():
    assert calls_of(Beside(layer(48), layer(16, bias=True)), torch.randn(1, 1, 64)) == [1, 1]

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = layer(64), layer(32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    assert calls_of(Chain(), torch.randn(1, 1, 64)) == [1, 1]


def test_without_cuda_nothing_is_joined():
    assert calls_of(Beside(layer(48), layer(16)), torch.randn(1, 1, 64)) == [1, 1]


@pytest.mark.usefixtures("joined")
def test_layers_behind_a_norm_share_its_codes():
    norm = QuantizingNorm.from_norm(nn.LayerNorm(64))
    assert norm is not None

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.beside = norm, Beside(layer(48), layer(16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.beside(self.norm(x))

    assert calls_of(Block(), torch.randn(1, 1, 64)) == [2]
