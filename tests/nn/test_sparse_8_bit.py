"""2:4 weights in 8 bits: codes and results of `Int8Linear` and `Fp8Linear`, in 0.625 of their bytes."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from harness.errors import ConfigError, NumericalFailure
from harness.export.forms import form_of
from harness.measure.storage import storage_bytes
from harness.nn.fp8 import Fp8Linear
from harness.nn.quantized import Int8Linear
from harness.nn.quantizer import quantize_activation, quantize_weight
from harness.nn.sparse_8_bit import SparseFp8Linear, SparseInt8Linear

from .test_semi_structured import two_of_four

needs_cuda = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.backends.cusparselt.is_available()),
    reason="needs CUDA and cuSPARSELt",
)


def bytes_of(layer: torch.nn.Module) -> int:
    return storage_bytes([*layer.parameters(), *layer.buffers()])


KINDS = ["int8", "int8-per-tensor", "fp8"]


def layers(kind: str = "int8", out: int = 64, width: int = 128, *, bias: bool = True):
    """The sparse layer and the dense one of the same 2:4 matrix."""
    matrix = two_of_four(out, width)
    values = torch.randn(out, generator=torch.Generator().manual_seed(1)) if bias else None
    if kind == "fp8":
        return SparseFp8Linear.from_float(matrix, values), Fp8Linear.from_float(matrix, values)
    weight = quantize_weight(matrix, bits=8, sym=True, per_tensor=kind != "int8")
    return SparseInt8Linear.from_weight(weight, values), Int8Linear.from_weight(weight, values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 128), (5, 128), (2, 3, 128), (0, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_computes_what_the_dense_layer_computes(shape, kind, dtype):
    sparse, dense = layers(kind)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = sparse(x)
    assert (y.shape, y.dtype) == ((*shape[:-1], 64), dtype)
    assert torch.equal(y, dense(x))


def test_the_product_is_that_of_the_rounded_numbers():
    sparse, _ = layers(bias=False)
    x = torch.randn(7, 128, generator=torch.Generator().manual_seed(3))
    codes, scale = quantize_activation(x)
    exact = (codes.double() @ sparse.int8_codes().double().T) * scale.double() * sparse.scales.double()
    assert float((sparse(x).double() - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_bytes_are_five_eighths_of_8_bits(kind):
    sparse, dense = layers(kind, 512, 1024, bias=False)
    assert bytes_of(sparse) == 512 * 512 + 512 * 1024 // 8 + 4 * 512
    assert (bytes_of(sparse) - 4 * 512) / (bytes_of(dense) - 4 * 512) == 0.625
    assert (sparse.bits, sparse.a_bits, sparse.simulated) == (8, 8, False)


@pytest.mark.parametrize("kind", KINDS)
def test_it_holds_two_of_every_four(kind):
    sparse, dense = layers(kind)
    codes = sparse.codes_of_all().float()
    assert int((codes != 0).view(64, -1, 4).sum(-1).max()) == 2
    assert torch.equal(codes, (dense.codes if kind == "fp8" else dense.int8_codes()).float())
    torch.testing.assert_close(sparse.dequantize(), dense.dequantize(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_saved_layer_comes_back(kind):
    sparse, _ = layers(kind)
    file = io.BytesIO()
    torch.save(sparse.state_dict(), file)
    file.seek(0)
    other = type(sparse)(128, 64, bias=True)
    assert not other(torch.ones(1, 128)).any()
    other.load_state_dict(torch.load(file))
    x = torch.randn(3, 128)
    assert torch.equal(other(x), sparse(x))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_cast_leaves_codes_and_scales(kind):
    sparse, _ = layers(kind)
    cast = copy.deepcopy(sparse).to(torch.bfloat16)
    assert cast.scales.dtype == torch.float32
    assert cast.codes_of_all().dtype == sparse.codes_of_all().dtype
    assert torch.equal(cast.codes_of_all().float(), sparse.codes_of_all().float())
    assert torch.equal(cast.scales, sparse.scales)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_off_cuda_it_says_what_it_runs(kind):
    sparse, dense = layers(kind)
    assert sparse.kernel_name == f"decompress+{dense.kernel_name}"


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_it_is_exported_as_the_dense_codes(kind):
    ours, theirs = (form_of(layer) for layer in layers(kind))
    assert type(ours) is type(theirs)
    for name in ("codes", "scale", "bias"):
        assert torch.equal(getattr(ours, name).float(), getattr(theirs, name).float()), name
    assert ours.inputs == theirs.inputs


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (quantize_weight(two_of_four(8, 32), bits=4, sym=True), "needs 8 bits"),
        (quantize_weight(two_of_four(8, 32), bits=8, sym=True, group_size=16), "no groups"),
        (quantize_weight(torch.ones(8, 32), bits=8, sym=True), "not 2:4"),
    ],
    ids=["bits", "groups", "dense"],
)
def test_what_cannot_be_stored_so_is_refused(weight, words):
    with pytest.raises(ConfigError, match=words):
        SparseInt8Linear.from_weight(weight)


def test_float8_weights_that_are_no_numbers_are_refused():
    with pytest.raises(NumericalFailure, match="NaN or infinite"):
        SparseFp8Linear.from_float(two_of_four(8, 32) * float("inf"))


def test_float8_weights_that_round_to_minus_zero_are_zeros():
    """They are no zero bytes, but a group that holds them is 2:4 all the same."""
    matrix = torch.zeros(4, 32)
    matrix[:, 0], matrix[:, 1], matrix[:, 2] = -1e-6, 448.0, 2.0
    layer = SparseFp8Linear.from_float(matrix)
    assert torch.equal(layer.codes_of_all().float()[0, :4], torch.tensor([0.0, 448, 2, 0]))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("rows", [1, 7, 64, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_on_cuda_the_library_multiplies_the_same_codes(rows, dtype, kind):
    sparse, dense = layers(kind, 256, 512)
    before = sparse.codes_of_all()
    sparse, dense = sparse.cuda(), dense.cuda()
    assert sparse.packed is not None
    library = "cusparselt 2:4" if rows > 8 or not sparse.reads_rows else "triton 2:4 few"
    assert sparse.kernel_for(rows, torch.bfloat16) == f"{library} {kind}"
    assert torch.equal(sparse.codes_of_all().cpu().float(), before.float())
    x = torch.randn(rows, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(rows)).to(dtype)
    y, expected = sparse(x).double(), dense(x).double()
    assert float((y - expected).norm() / expected.norm()) <= (1e-6 if dtype == torch.float32 else 6e-3)
    back = copy.deepcopy(sparse).cpu()
    assert back.packed is None
    assert torch.equal(back.codes_of_all().float(), before.float())


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_on_cuda_it_is_captured(kind):
    sparse = layers(kind, 256, 512)[0].cuda()
    x = torch.randn(16, 512, device="cuda").bfloat16()
    sparse(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, sparse(x))
