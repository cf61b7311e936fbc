"""The kernel for dense weights and one row, and how it gets into a traced model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.testing._internal.two_tensor import TwoTensor

from harness.kernels import dense
from harness.kernels.rewriting import rewrite_linears

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def with_triton(monkeypatch):
    """As on a CUDA machine: graphs are rewritten; the operator still runs in plain torch."""
    monkeypatch.setattr(dense, "has_triton", lambda device: True)
    monkeypatch.setattr(dense, "_runs", lambda *_: False)


def traced(function, *inputs) -> tuple[list[torch.fx.GraphModule], object]:
    """The graphs that dynamo makes of a call, rewritten, and the result of running them."""
    graphs = []

    def backend(module, _inputs):
        module.count = rewrite_linears(module)
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    return graphs, torch.compile(function, backend=backend, dynamic=False)(*inputs)


def calls_of(graph: torch.fx.GraphModule, target) -> int:
    return sum(node.target is target for node in graph.graph.nodes)


@pytest.mark.parametrize("with_bias", [False, True])
def test_without_cuda_the_operator_is_linear(with_bias):
    x = torch.randn(3, 16)
    weights = [torch.randn(out, 16) for out in (5, 7)]
    biases = [torch.randn(out) for out in (5, 7)] if with_bias else []
    found = torch.ops.harness.linears(x, weights, biases)
    for index, y in enumerate(found):
        bias = biases[index] if with_bias else None
        assert torch.equal(y, functional.linear(x, weights[index], bias))


def test_the_operator_passes_torchs_own_checks():
    x, weights = torch.randn(2, 16), [torch.randn(5, 16), torch.randn(7, 16)]
    torch.library.opcheck(torch.ops.harness.linears.default, (x, weights, []))


@pytest.mark.usefixtures("with_triton")
def test_products_of_one_input_become_one_call():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(16, 16, bias=False) for _ in range(4))

        def forward(self, x):
            return self.o(self.q(x).tanh() * self.k(x) + self.v(x))

    module, x = Attention().requires_grad_(False), torch.randn(1, 1, 16)
    [graph], y = traced(module, x)
    assert graph.count == 4
    assert calls_of(graph, torch.ops.harness.linears.default) == 2  # query, key and value; output
    assert calls_of(graph, torch._C._nn.linear) == 0
    torch.testing.assert_close(y, module(x))


@pytest.mark.usefixtures("with_triton")
def test_more_products_than_a_launch_takes_are_several_calls():
    layers = nn.ModuleList(nn.Linear(16, 8) for _ in range(5)).requires_grad_(False)

    def run(x):
        return torch.cat([layer(x) for layer in layers], -1)

    x = torch.randn(1, 16)
    [graph], y = traced(run, x)
    assert calls_of(graph, torch.ops.harness.linears.default) == 2
    torch.testing.assert_close(y, run(x))


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize(
    ("weight", "rows"),
    [
        (torch.randn(8, 16), dense.MOST_ROWS + 1),  # the library is as fast
        (torch.randn(8, 12), 1),  # rows that are not 16 bytes apart
        (torch.randn(16, 8).T, 1),  # not contiguous
        (torch.randn(8, 16).double(), 1),
    ],
    ids=["many rows", "odd width", "transposed", "float64"],
)
def test_what_the_kernel_cannot_run_stays(weight, rows):
    x = torch.randn(rows, weight.shape[1], dtype=weight.dtype)
    [graph], y = traced(lambda x, w: functional.linear(x, w), x, weight)
    assert graph.count == 0
    torch.testing.assert_close(y, functional.linear(x, weight))


@pytest.mark.usefixtures("with_triton")
def test_a_weight_that_is_computed_stays():
    weight, x = torch.randn(8, 16), torch.randn(1, 16)
    [graph], y = traced(lambda x, w: functional.linear(x, w * 2), x, weight)
    assert graph.count == 0
    torch.testing.assert_close(y, functional.linear(x, weight * 2))


@pytest.mark.usefixtures("with_triton")
def test_weights_of_a_class_of_their_own_stay():
    """As torchao's: their class says what a product with them is, and a kernel cannot read them."""
    own = TwoTensor(torch.randn(8, 16), torch.randn(8, 16))
    own_bias, x = TwoTensor(torch.randn(8), torch.randn(8)), torch.randn(1, 16)
    for inputs in ((x, own), (x, torch.randn(8, 16), own_bias)):
        [graph], y = traced(lambda *inputs: functional.linear(*inputs), *inputs)
        assert graph.count == 0
        expected = functional.linear(*inputs)
        torch.testing.assert_close((y.a, y.b), (expected.a, expected.b))


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize(
    "bias",
    [torch.randn(1), torch.randn(()), torch.randn(1, 8), torch.randn(16)[::2]],
    ids=["one number", "no dimension", "a row", "strides"],
)
def test_a_bias_that_the_kernel_would_read_wrongly_stays(bias):
    weight, x = torch.randn(8, 16), torch.randn(1, 16)
    assert not dense.fits_bias(bias, weight)
    [graph], y = traced(lambda *inputs: functional.linear(*inputs), x, weight, bias)
    assert graph.count == 0
    torch.testing.assert_close(y, functional.linear(x, weight, bias))


def test_the_kernel_is_given_only_a_bias_that_it_reads_rightly(monkeypatch):
    monkeypatch.setattr(dense, "has_triton", lambda device: True)
    x, weight = torch.randn(1, 16), torch.empty(8 * 16 + 64)
    weight = weight[-weight.data_ptr() // 4 % 16 :][: 8 * 16].view(8, 16)
    assert dense._runs(x, [weight], [torch.randn(8)])
    assert not dense._runs(x, [weight], [torch.randn(16)[::2]])
    assert not dense._runs(x, [weight], [torch.randn(1)])


@pytest.mark.usefixtures("with_triton")
def test_products_under_autocast_keep_their_type():
    layers = [nn.Linear(16, 8).requires_grad_(False) for _ in range(2)]

    def run(x):
        first = layers[0](x)
        with torch.autocast("cpu", torch.bfloat16):
            return first, layers[1](x)

    x = torch.randn(1, 16)
    [graph], y = traced(run, x)
    assert graph.count == 1
    assert [each.dtype for each in y] == [torch.float32, torch.bfloat16]
    torch.testing.assert_close(y, run(x))


def test_without_triton_nothing_is_rewritten():
    weight, x = torch.randn(8, 16), torch.randn(1, 16)
    [graph], _ = traced(lambda x, w: functional.linear(x, w), x, weight)
    assert graph.count == 0


# --- on a GPU -----------------------------------------------------------------------------------------

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (96, 64), (33, 200), (7, 2056)]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_multiplies(shape, dtype):
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", generator=generator).to(dtype)

    for count in (1, 2, 3):
        weights = [randn(shape[0] + 5 * index, shape[1]) for index in range(count)]
        biases = [randn(weight.shape[0]) for weight in weights] if count != 2 else []
        x = randn(1, shape[1])
        assert dense._runs(x, weights, biases)
        found = dense.linears(x, weights, biases)
        for index, y in enumerate(found):
            expected = x.double() @ weights[index].double().T
            if biases:
                expected += biases[index].double()
            assert y.dtype == dtype
            assert float((y.double() - expected).norm() / expected.norm()) < tolerance
        again = dense.linears(x, weights, biases)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.gpu
@needs_cuda
def test_a_matrix_that_is_not_aligned_is_left_to_the_library():
    storage = torch.randn(64 * 64 + 1, device="cuda").bfloat16()
    weight, x = storage[1:].view(64, 64), torch.randn(1, 64, device="cuda").bfloat16()
    assert not dense._runs(x, [weight], [])
    [y] = dense.linears(x, [weight], [])
    torch.testing.assert_close(y, functional.linear(x, weight))


@pytest.mark.gpu
@needs_cuda
def test_matrices_may_lie_gigabytes_apart():
    first = torch.randn(64, 64, device="cuda").bfloat16()
    between = torch.empty(9 << 29, dtype=torch.bfloat16, device="cuda")  # 9 GiB
    last = torch.randn(64, 64, device="cuda").bfloat16()
    apart = abs(last.data_ptr() - first.data_ptr())
    far = between.view(-1, 64)[-64:] if apart < 9 << 30 else last
    far.copy_(last)
    x = torch.randn(1, 64, device="cuda").bfloat16()
    for weights in ([first, far], [far, first]):
        found = dense.linears(x, weights, [])
        for weight, y in zip(weights, found, strict=True):
            torch.testing.assert_close(y, functional.linear(x, weight), rtol=2e-2, atol=2e-2)
