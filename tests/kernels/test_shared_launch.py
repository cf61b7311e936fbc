"""Products with packed weights that read the same x: joined in a traced model, multiplied in one launch."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import harness.kernels
from harness.kernels import weight_only
from harness.kernels.rewriting import rewrite_linears
from harness.kernels.selection import Launch
from harness.kernels.stored import stored
from harness.nn.packing import pack_weight
from harness.nn.quantized import QuantizedLinear
from harness.nn.quantizer import quantize_weight
from tests.kernels.joining import Beside, products_of_calls

JOINED = torch.ops.harness.weight_only_linears.default
ALONE = torch.ops.harness.weight_only_linear.default
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def joined(monkeypatch):
    """As on a CUDA machine: graphs are rewritten; the operator still runs in plain torch."""
    monkeypatch.setattr(weight_only, "share_a_launch", lambda form, rows, dtype, device: rows == 1)
    monkeypatch.setattr(weight_only, "_launch_together", lambda x, weights: None)


def layer(out: int, columns: int = 256, *, bias: bool = False, **options) -> QuantizedLinear:
    written = {"bits": 4, "group_size": 128, "sym": False} | options
    torch.manual_seed(out)
    values = torch.randn(out) if bias else None
    return QuantizedLinear.from_weight(quantize_weight(torch.randn(out, columns), **written), values)


def calls_of(module: nn.Module, x: torch.Tensor) -> list[int]:
    return products_of_calls(module, x, rewrite_linears, (JOINED,), 1, (ALONE,))


@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize(
    ("layers", "calls"),
    [
        ([layer(64), layer(32), layer(32)], [3]),  # query, and fewer heads of keys and values
        ([layer(64, bias=True), layer(48, bias=True)], [2]),
        ([layer(64)] * 5, [3, 2]),
        ([layer(64), layer(32, bias=True)], [1, 1]),
        ([layer(64), layer(32, sym=True)], [1, 1]),
        ([layer(64), layer(32, bits=2)], [1, 1]),
        ([layer(64), layer(32, group_size=64)], [1, 1]),
        ([layer(64, per_tensor=True, group_size=-1), layer(32, group_size=-1)], [1, 1]),
        ([layer(64)], [1]),
    ],
    ids=["heads", "biases", "five", "one bias", "zero points", "bits", "groups", "per tensor", "alone"],
)
def test_what_is_joined(layers, calls):
    assert calls_of(Beside(*layers), torch.randn(1, 1, 256)) == calls


@pytest.mark.usefixtures("joined")
def test_another_input_and_more_rows_stay_apart():
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = layer(256), layer(64)

        def forward(self, x):
            return self.down(self.up(x))

    assert calls_of(Chain(), torch.randn(1, 1, 256)) == [1, 1]
    assert calls_of(Beside(layer(64), layer(32)), torch.randn(1, 2, 256)) == [1, 1]


def test_without_cuda_nothing_is_joined():
    assert calls_of(Beside(layer(64), layer(32)), torch.randn(1, 1, 256)) == [1, 1]


def test_the_operator_passes_torchs_own_checks():
    layers = [layer(16), layer(8)]
    tensors = [[getattr(each, name) for each in layers] for name in ("codes", "scales", "zeros")]
    form = (4, 128, layers[0].tile, 256)
    torch.library.opcheck(JOINED, (torch.randn(2, 256), *tensors, [], *form))
    found = JOINED(torch.ones(2, 256), *tensors, [], *form)
    for each, y in zip(layers, found, strict=True):
        assert torch.equal(y, each(torch.ones(2, 256)))


def test_the_launch_is_chosen_for_the_rows_of_all(monkeypatch):
    weights = [layer(4096).packed for _ in range(2)]
    launches = launches_on_hopper(monkeypatch)
    for together in (weights[:1], weights):
        multiply_together(torch.randn(1, 256, dtype=torch.bfloat16), together)
    assert [(launch.kernel, launch.stages) for launch in launches] == [("vector", 4), ("vector", 2)]


def test_heads_that_are_too_few_alone_are_multiplied_with_the_queries(monkeypatch):
    """Keys and values of grouped heads: small matrices, for which *matrix* would lose."""
    query, key, value = (layer(out, 1024).packed for out in (8192, 1024, 1024))
    launches = launches_on_hopper(monkeypatch)
    x = torch.randn(200, 1024, dtype=torch.bfloat16)
    for each in (query, key, value):
        assert weight_only.share_a_launch(stored(each).form, 200, x.dtype, x.device)
    multiply_together(x, [query, key, value])
    assert [launch.kernel for launch in launches] == ["matrix"]
    # Without the queries they are too small together as well: each for itself, none in such a launch.
    alone = []
    monkeypatch.setattr(weight_only, "_linear", lambda x, weight, bias: alone.append(weight) or x.clone())
    multiply_together(x, [key, value])
    assert (len(launches), len(alone)) == (1, 2)


def launches_on_hopper(monkeypatch) -> list[Launch]:
    """As on such a device, where nothing runs: the launches of several matrices that are asked for."""
    launches = []

    def multiply_several(x, matrices, biases, launch):
        launches.append(launch)
        return [x.new_zeros(x.shape[0], matrix.out_features) for matrix in matrices]

    runner = SimpleNamespace(multiply_several=multiply_several)
    monkeypatch.setitem(sys.modules, "harness.kernels.triton_weight_only", runner)
    monkeypatch.setattr(harness.kernels, "triton_weight_only", runner, raising=False)
    for name in ("has_triton", "runs_vector", "runs_matrix"):
        monkeypatch.setattr(weight_only, name, lambda device: True)
    return launches


def multiply_together(x, weights) -> None:
    codes, scales, zeros = zip(*((each.codes, each.scales, each.zeros) for each in weights), strict=True)
    first = weights[0]
    weight_only.linears(x, codes, scales, zeros, [], first.bits, first.group_size, first.tile, x.shape[1])


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("outs", [(4096, 4096, 4096), (2048, 256, 256), (100, 33), (11008, 11008)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_one_launch_gives_the_bits_of_several(rows, outs, dtype):
    from harness.kernels import triton_weight_only

    generator = torch.Generator("cuda").manual_seed(sum(outs))
    weights = [torch.randn(out, 4096, device="cuda", generator=generator) for out in outs]
    matrices = [
        stored(pack_weight(quantize_weight(weight, bits=4, sym=False, group_size=128))) for weight in weights
    ]
    biases = [torch.randn(out, device="cuda", generator=generator).to(dtype) for out in outs]
    x = torch.randn(rows, 4096, device="cuda", generator=generator).to(dtype)
    launch = Launch("vector", 16, stages=4) if rows == 1 else Launch("few", 16, 16, stages=2)
    for given in (biases, []):
        found = triton_weight_only.multiply_several(x, matrices, given, launch)
        for index, (y, matrix) in enumerate(zip(found, matrices, strict=True)):
            bias = given[index] if given else None
            assert y.shape == (rows, outs[index])
            assert torch.equal(y, triton_weight_only.multiply(x, matrix, bias, launch))


@pytest.mark.gpu
@needs_cuda
def test_layers_of_a_compiled_block_share_a_launch():
    module = Beside(layer(64), layer(32), layer(32)).cuda()
    x = torch.randn(1, 1, 256, device="cuda", dtype=torch.bfloat16)
    assert calls_of(module, x) == [3]
