"""cuSPARSELt's form of a 2:4 matrix as it is decoded, and the kernel for a few rows that reads it (on CUDA).

The decoder is compared with an encoder that puts one nibble after the other where the formulas say.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch.nn import functional

from harness.kernels import semi_structured as kernel
from harness.kernels import sparse_rows
from harness.measure.kernel_names import family_of
from harness.nn.quantizer import quantize_weight
from harness.nn.semi_structured import SemiStructuredLinear, compress_2_of_4
from harness.nn.sparse_8_bit import SparseFp8Linear, SparseInt8Linear
from tests.nn.test_semi_structured import two_of_four

TYPES = [torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]


def byte_of_16_bits(row: int, group: int, width: int) -> tuple[int, int]:
    """Where the nibble of a group is: its byte among the metadata, and 1 in the upper half of it."""
    byte = row // 64 * width * 8 + group // 8 * 256
    byte += row % 64 // 16 * 64 + row % 8 * 8 + group % 4 * 2 + group % 8 // 4
    return byte, row // 8 % 2


def byte_of_8_bits(row: int, group: int, width: int) -> tuple[int, int]:
    byte = row // 64 * width * 8 + group // 16 * 512 + row % 64 // 16 * 128 + row % 8 * 16
    byte += row // 8 % 2 + group // 8 % 2 * 2 + group // 2 % 2 * 4 + group // 4 % 2 * 8
    return byte, group % 2


def encoded(weight: torch.Tensor) -> torch.Tensor:
    """What the library makes of a 2:4 matrix [out, in], one group after the other."""
    out, width = weight.shape
    find = byte_of_16_bits if weight.element_size() == 2 else byte_of_8_bits
    values, plain = compress_2_of_4(weight)
    meta = torch.zeros(out * width // 8, dtype=torch.uint8)
    for row, group in itertools.product(range(out), range(width // 4)):
        nibble = int(plain[row, group // 2]) >> 4 * (group % 2) & 15
        byte, upper = find(row, group, width)
        assert int(meta[byte]) >> 4 * upper & 15 == 0
        meta[byte] |= nibble << 4 * upper
    return torch.cat([values.view(torch.uint8).flatten(), meta]).view(weight.dtype)


def matrix(out: int, width: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    weight = two_of_four(out, width, seed=seed)
    return (weight * 40).round().to(dtype) if dtype == torch.int8 else weight.to(dtype)


def rel_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    assert bool(torch.isfinite(value).all())
    return float((value.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def library(monkeypatch):
    """A stand-in for cuSPARSELt's form on the CPU, and as if the kernel could run there."""
    monkeypatch.setattr(torch, "_cslt_compress", encoded)
    monkeypatch.setattr(kernel, "is_available", lambda device, dtype: device.type == "cpu")
    monkeypatch.setattr(sparse_rows, "is_available", lambda device, dtype: device.type == "cpu")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("units", [1, 3])
def test_the_form_is_decoded(units, dtype):
    shape = (64 * units, units * 128 // dtype.itemsize)
    weight = matrix(*shape, dtype)
    packed = encoded(weight)
    assert packed.numel() * packed.element_size() * 8 == weight.numel() * (4 * weight.element_size() + 1)
    assert torch.equal(sparse_rows.unpack(packed, *shape).float(), weight.float())
    assert sparse_rows.is_readable(packed, weight)
    assert sparse_rows.is_readable(packed.view(shape[0], -1), weight)


def test_many_rows_are_checked_to_the_last(monkeypatch):
    monkeypatch.setattr(sparse_rows, "_CHUNK", 64)
    weight = matrix(192, 64)
    packed = encoded(weight)
    assert sparse_rows.is_readable(packed, weight)
    weight[-1] = 0
    assert not sparse_rows.is_readable(packed, weight)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_bytes_that_are_something_else_are_refused(dtype):
    weight = matrix(128, 128, dtype)
    packed = encoded(weight)
    other = packed.clone().view(torch.uint8)
    meta = weight.numel() // 2 * weight.element_size()
    pair = other[meta : meta + 2].clone()
    assert pair[0] != pair[1]
    other[meta : meta + 2] = pair.flip(0)
    assert not sparse_rows.is_readable(other.view(dtype), weight)
    assert not sparse_rows.is_readable(encoded(weight.view(64, 256)), weight)
    assert not sparse_rows.is_readable(packed[:-16], weight)
    assert not sparse_rows.is_readable(encoded(matrix(128, 128, dtype, seed=1)), weight)


@pytest.mark.parametrize("nibble", [0b0001, 0b0000, 0b1111])
def test_places_that_do_not_ascend_are_refused(nibble):
    """Though they decode: what the instruction makes of them is not defined."""
    weight = torch.zeros(64, 64, dtype=torch.bfloat16)
    packed = encoded(weight)
    assert sparse_rows.is_readable(packed, weight)
    other = packed.view(torch.uint8).clone()
    other[-1] = other[-1] & 0xF0 | nibble
    assert torch.equal(sparse_rows.unpack(other.view(torch.bfloat16), 64, 64), weight)
    assert not sparse_rows.is_readable(other.view(torch.bfloat16), weight)


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (96, 128), (128, 96)])
def test_sizes_that_fill_no_block_are_refused(shape):
    weight = matrix(*shape)
    values, meta = compress_2_of_4(weight)
    packed = torch.cat([values.view(torch.uint8), meta], 1).view(weight.dtype)
    assert not sparse_rows.is_readable(packed, weight)


def test_a_layer_says_which_kernel_runs_how_many_rows(library):
    layer = SemiStructuredLinear.from_dense(matrix(64, 128), tuned=False)
    assert layer.packed is not None
    assert layer.reads_rows
    assert layer.kernel_name == sparse_rows.NAME == "triton 2:4 few"
    assert layer.kernel_for(8, torch.bfloat16) == sparse_rows.NAME
    assert layer.kernel_for(9, torch.bfloat16) == kernel.KERNEL
    assert layer.kernel_for(1, torch.float16) == kernel.FALLBACK
    assert copy.deepcopy(layer).kernel_name == sparse_rows.NAME


@pytest.mark.parametrize("shape", [(64, 128), (32, 128)], ids=["other bytes", "other sizes"])
def test_a_layer_that_is_not_readable_keeps_the_librarys_kernel(library, shape, monkeypatch):
    def otherwise(weight):
        values, meta = compress_2_of_4(weight)
        return torch.cat([values.view(torch.uint8), meta], 1).view(weight.dtype)

    monkeypatch.setattr(torch, "_cslt_compress", otherwise)
    layer = SemiStructuredLinear.from_dense(matrix(*shape))
    assert layer.packed is not None
    assert not layer.reads_rows
    assert layer.kernel_for(1, torch.bfloat16) == kernel.KERNEL


def test_few_rows_go_to_the_kernel_and_more_to_the_library(library, monkeypatch):
    weight, bias = matrix(64, 128), torch.randn(64)
    seen = []

    def few(x, packed, bias, out_features):
        seen.append(("few", x.shape[0], bias is not None))
        return functional.linear(x, sparse_rows.unpack(packed, out_features, x.shape[1]), bias)

    def many(packed, x, out_features, *, bias=None, tuned=False):
        seen.append(("many", x.shape[0], bias is not None))
        return functional.linear(x, sparse_rows.unpack(packed, out_features, x.shape[1]), bias)

    monkeypatch.setattr(sparse_rows, "multiply", few)
    monkeypatch.setattr(kernel, "product", many)
    layer = SemiStructuredLinear.from_dense(weight, bias.bfloat16())
    for rows in (1, 8, 9):
        x = torch.randn(rows, 128).bfloat16()
        assert torch.equal(layer(x), functional.linear(x, weight, bias.bfloat16()))
    assert seen == [("few", 1, True), ("few", 8, True), ("many", 9, True)]
    seen.clear()
    x = torch.randn(2, 128).bfloat16()
    y = SemiStructuredLinear.from_dense(weight, bias)(x)  # a bias of another type is added afterwards
    assert torch.equal(y, (functional.linear(x, weight) + bias).bfloat16())
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=False)
    with torch.inference_mode():
        assert torch.equal(compiled(x), layer(x))
    assert seen == [("few", 2, False), ("few", 2, True), ("few", 2, True)]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_layers_of_8_bits_scale_what_the_kernel_adds_up(library, kind, monkeypatch):
    weight, bias = two_of_four(64, 128), torch.randn(64)
    if kind == "int8":
        layer = SparseInt8Linear.from_weight(quantize_weight(weight, bits=8, sym=True), bias)
    else:
        layer = SparseFp8Linear.from_float(weight, bias)
    assert layer.kernel_name == "decompress+" + layer._dense_kernel()  # in float32
    assert layer.kernel_for(8, torch.bfloat16) == f"triton 2:4 few {kind}"
    assert layer.kernel_for(9, torch.bfloat16) == f"cusparselt 2:4 {kind}"
    seen = []

    def few(codes, packed, rows, columns, bias, dtype):
        seen.append(tuple(codes.shape))
        dense = sparse_rows.unpack(packed, columns.shape[0], codes.shape[1]).float()
        return (functional.linear(codes.float(), dense) * rows * columns + bias).to(dtype)

    monkeypatch.setattr(sparse_rows, "multiply_8_bit", few)
    monkeypatch.setattr(kernel, "decompress", sparse_rows.unpack)
    x = torch.randn(2, 128).bfloat16()
    expected = functional.linear(x.float(), layer.dense_weight(), bias)
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=False)
    with torch.inference_mode():
        for y in (layer(x), compiled(x)):
            assert y.dtype == torch.bfloat16
            assert rel_error(y, expected) <= (2e-2 if kind == "int8" else 5e-2)
    assert seen == [(2, 128), (2, 128)]


def test_moving_and_casting_are_checked_anew(library, monkeypatch):
    layer = SemiStructuredLinear.from_dense(matrix(64, 128))
    monkeypatch.setattr(kernel, "decompress", sparse_rows.unpack)
    monkeypatch.setattr(kernel, "is_available", lambda device, dtype: False)
    layer = layer.to(torch.float16)
    assert (layer.packed, layer.reads_rows) == (None, False)
    monkeypatch.setattr(kernel, "is_available", lambda device, dtype: device.type == "cpu")
    layer = layer.to(torch.bfloat16)
    assert layer.reads_rows
    assert torch.equal(layer.dense_weight(), matrix(64, 128))


def test_without_cuda_it_is_not_there():
    assert not sparse_rows.is_available(torch.device("cpu"), torch.bfloat16)
    assert not kernel.reads_rows(encoded(matrix(64, 64)), matrix(64, 64))


def test_a_profile_counts_it_as_a_product():
    assert family_of("sparse_few_kernel") == "gemm"


@pytest.mark.parametrize("rows", range(1, sparse_rows.MOST_ROWS + 1))
@pytest.mark.parametrize("out", [64, 4096, 11008])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_launches_fill_the_matrix(rows, out, dtype):
    launch = sparse_rows.launch_for(rows, out, dtype)
    assert out % (16 * launch.blocks) == 0
    assert launch.warps.bit_count() == 1
    assert launch.stages >= 1


def test_where_rows_are_many_a_program_has_less_on_its_way_or_shares_x():
    few, many = (sparse_rows.launch_for(1, out, torch.bfloat16) for out in (4096, 11008))
    assert (few.stages, many.stages) == (4, 2)
    assert few.blocks == many.blocks == 1
    assert sparse_rows.launch_for(8, 4096, torch.bfloat16).wide
    assert [sparse_rows.launch_for(8, 11008, dtype).blocks for dtype in TYPES] == [2] * len(TYPES)
    few, many = (sparse_rows.launch_for(1, out, torch.int8) for out in (4096, 11008))
    assert (few.stages, many.stages) == (4, 2)
    assert few.blocks == many.blocks == 1
    assert sparse_rows.launch_for(8, 4096, torch.int8).stages == 2
    for rows in (1, 8):
        launch = sparse_rows.launch_for(rows, 2 * 11008, torch.bfloat16)
        assert (launch.blocks, launch.stages) == (2, 1)
    assert sparse_rows.launch_for(1, 11008, torch.float8_e4m3fn).blocks == 2


# --- on CUDA ------------------------------------------------------------------------------------------

needs_library = pytest.mark.skipif(
    not kernel.is_available(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.bfloat16)
    or not sparse_rows.is_available(torch.device("cuda"), torch.bfloat16),
    reason="needs a CUDA device with cuSPARSELt and Triton",
)
SIZES = [(64, 64), (128, 192), (4096, 4096), (11008, 4096), (4096, 11008)]


def readable(out: int, width: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """A 2:4 matrix and the library's form of it."""
    weight = matrix(out, width, dtype).cuda()
    packed = kernel.compress(weight)
    assert sparse_rows.is_readable(packed, weight)
    return weight, packed


@pytest.mark.gpu
@needs_library
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SIZES)
def test_the_librarys_form_is_what_is_decoded(shape, dtype):
    weight = matrix(*shape, dtype).cuda()
    packed = kernel.compress(weight)
    assert torch.equal(sparse_rows.unpack(packed, *shape).float(), weight.float())
    assert sparse_rows.is_readable(packed, weight) is (shape[1] * dtype.itemsize % 128 == 0)


@pytest.mark.gpu
@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_products_are_those_of_the_dense_matrix(rows, shape, dtype):
    weight, packed = readable(*shape, dtype)
    x = torch.randn(rows, shape[1], device="cuda", dtype=dtype)
    for bias in (None, torch.randn(shape[0], device="cuda", dtype=dtype)):
        y = sparse_rows.multiply(x, packed, bias, shape[0])
        assert (y.shape, y.dtype) == ((rows, shape[0]), dtype)
        expected = functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
        assert rel_error(y, expected) <= 4e-3
        assert torch.equal(y, sparse_rows.multiply(x, packed, bias, shape[0]))


@pytest.mark.gpu
@needs_library
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("shape", [(64, 128), (128, 384), (4096, 4096), (11008, 4096), (4096, 11008)])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_products_of_8_bits_are_scaled_and_rounded_once(rows, shape, dtype):
    weight, packed = readable(*shape, dtype)
    codes = (torch.randn(rows, shape[1], device="cuda") * 30).round().to(dtype)
    scales = torch.rand(rows, 1, device="cuda") + 0.5, torch.rand(shape[0], device="cuda") + 0.5
    exact = codes.double() @ weight.double().T * scales[0].double() * scales[1].double()
    for bias in (None, torch.randn(shape[0], device="cuda")):
        expected = exact if bias is None else exact + bias.double()
        for out_dtype, most in (
            (torch.float32, 1e-6 if dtype == torch.int8 else 1e-3),
            (torch.bfloat16, 4e-3),
        ):
            y = sparse_rows.multiply_8_bit(codes, packed, *scales, bias, out_dtype)
            assert (y.shape, y.dtype) == ((rows, shape[0]), out_dtype)
            assert rel_error(y, expected) <= most
            assert torch.equal(y, sparse_rows.multiply_8_bit(codes, packed, *scales, bias, out_dtype))


@pytest.mark.gpu
@needs_library
@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("warps", [1, 2, 4, 8])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("rows", [2, 11])
def test_every_launch_gives_the_product(rows, wide, stages, warps, blocks):
    weight, packed = readable(128, 64 * 21)
    x = torch.randn(rows, weight.shape[1], device="cuda").bfloat16()
    launch = sparse_rows.SparseLaunch(blocks, warps, stages, wide)
    y = sparse_rows.prepare(x, packed, None, 128, launch).run()
    assert rel_error(y, x.float() @ weight.float().T) <= 4e-3


@pytest.mark.gpu
@needs_library
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_value_is_where_it_belongs(dtype):
    """Products with the identity are exact: a value in another place would show."""
    weight, packed = readable(128, 256, dtype)
    unit = torch.eye(256, device="cuda").to(dtype)
    ones = torch.ones(8, 1, device="cuda"), torch.ones(128, device="cuda")
    for start in range(0, 256, 8):
        x = unit[start : start + 8]
        if dtype.itemsize == 2:
            y = sparse_rows.multiply(x, packed, None, 128)
        else:
            y = sparse_rows.multiply_8_bit(x, packed, *ones, None, torch.float32)
        assert torch.equal(y.float(), weight.T[start : start + 8].float())


@pytest.mark.gpu
@needs_library
@pytest.mark.parametrize("rows", [1, 3])
def test_memory_around_the_input_is_not_read(rows):
    """Beyond the last column there are zeros, whatever lies there; rows beyond the last are not stored."""
    weight, packed = readable(64, 64)
    around = torch.full((rows + 8, 64 * 40), float("nan"), device="cuda").bfloat16()
    x = around[:rows, :64]
    x.normal_()
    y = torch.full((rows + 1, 64), 7.0, device="cuda").bfloat16()
    call = sparse_rows.prepare(x, packed, None, 64, sparse_rows.SparseLaunch(1, 4, 4))
    arguments = [y if each is call.output else each for each in call.arguments]
    call.kernel[call.grid](*arguments, **call.constants)
    assert rel_error(y[:rows], x.float() @ weight.float().T) <= 4e-3
    assert bool((y[rows] == 7).all())


@pytest.mark.gpu
@needs_library
def test_inputs_that_lie_at_odd_places_are_copied():
    weight, packed = readable(64, 128)
    wide = torch.randn(4, 131, device="cuda").bfloat16()
    for x in (wide[:, 1:129], wide[:, :128], wide.T.contiguous().T[:, :128]):
        assert rel_error(sparse_rows.multiply(x, packed, None, 64), x.float() @ weight.float().T) <= 4e-3


@pytest.mark.gpu
@needs_library
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [1, 8])
def test_a_layer_is_captured(rows, compiled):
    weight = matrix(512, 1024).cuda()
    layer = SemiStructuredLinear.from_dense(weight, torch.randn(512).bfloat16().cuda())
    assert layer.kernel_for(rows, torch.bfloat16) == sparse_rows.NAME
    x = torch.randn(rows, 1024, device="cuda").bfloat16()
    run = torch.compile(layer, fullgraph=True, dynamic=False) if compiled else layer
    with torch.inference_mode():
        run(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run(x)
        for _ in range(2):
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(y, layer(x))
            assert rel_error(y, functional.linear(x.float(), weight.float(), layer.bias.float())) <= 4e-3
