"""The weight-only kernels against plain torch: on a CUDA device, or in Triton's interpreter.

Without a CUDA device: ``TRITON_INTERPRET=1 python -m pytest tests/kernels/test_weight_only.py``, where triton
and a numpy below 2.4 are installed. The interpreter of Triton 3.6 takes bounds of loops from arrays of one
element, which later ones refuse; it rounds to bfloat16 towards zero, not to the nearest; and it has no
products of bfloat16 matrices, so float16 stands in for it.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace

import numpy
import pytest
import torch

from harness.kernels import reference, table, weight_only
from harness.kernels.selection import Launch, takes_vector
from harness.kernels.stored import StoredMatrix, stored
from harness.nn.codebook import CodebookLinear
from harness.nn.codebook_weight import CodebookWeight, Outliers, quantize_scales
from harness.nn.packing import pack_weight
from harness.nn.quantized import QuantizedLinear
from harness.nn.quantizer import quantize_weight

IS_INTERPRETED = (
    os.environ.get("TRITON_INTERPRET") == "1"
    and importlib.util.find_spec("triton") is not None
    and tuple(map(int, numpy.__version__.split(".")[:2])) < (2, 4)
)
DEVICES = [
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            not IS_INTERPRETED, reason="needs triton, numpy below 2.4 and TRITON_INTERPRET=1"
        ),
    ),
]
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HALF = torch.float16 if IS_INTERPRETED else torch.bfloat16

# (out, in), bits, group size; "sym": no zero points, "packed", "float"; rows of the matrix that fill no
# program, groups of one tile and of several, an odd number of groups and columns beside the groups
GRIDS = [
    ((64, 256), 4, 128, "packed"),
    ((72, 384), 4, 128, "float"),
    ((33, 256), 4, 128, "sym"),
    ((40, 192), 4, 64, "packed"),
    ((40, 192), 4, 64, "float"),
    ((24, 96), 4, 32, "packed"),
    ((24, 160), 4, 32, "float"),
    ((65, 384), 4, -1, "packed"),
    ((40, 176), 4, -1, "sym"),
    ((40, 300), 4, 128, "packed-padded"),
    ((40, 512), 4, 256, "packed"),
    ((40, 256), 4, -1, "packed-per-tensor"),
    ((40, 256), 3, 128, "packed"),
    ((33, 384), 3, 128, "float"),
    ((40, 192), 3, 64, "packed"),
    ((24, 160), 3, 32, "packed"),
    ((24, 96), 3, 32, "float"),
    ((40, 256), 3, -1, "sym"),
    ((70, 384), 3, -1, "packed"),
    ((40, 256), 2, 128, "packed"),
    ((40, 192), 2, 64, "packed"),
    ((33, 128), 2, 64, "float"),
    ((24, 96), 2, 32, "packed"),
    ((40, 256), 2, -1, "packed"),
    ((40, 256), 8, -1, "sym"),
    ((33, 300), 8, -1, "sym"),
    ((40, 192), 8, 64, "packed"),
    ((40, 256), 8, 128, "float"),
    ((24, 96), 8, 32, "packed"),
]
# (out, in), bits, group size, 8-bit scales, outliers
TABLES = [
    ((40, 256), 4, 64, False, 0),
    ((40, 192), 4, 64, True, 0),
    ((33, 300), 4, 64, True, 0),
    ((40, 256), 4, 128, False, 9),
    ((24, 96), 4, 32, False, 0),
    ((40, 256), 4, -1, False, 0),
    ((40, 256), 3, -1, False, 31),
    ((65, 384), 3, -1, False, 1),
    ((33, 192), 3, 64, True, 5),
    ((40, 128), 2, -1, False, 3),
    ((40, 192), 2, 64, False, 0),
    ((40, 192), 8, 64, False, 0),
    ((40, 100), 8, -1, False, 0),
]

# Steps that hold a group, parts of one and several; columns split between programs; sums scaled or weights.
GEMVS = [Launch("gemv", 16, warps=2, programs=1), Launch("gemv", 32, words=64, programs=16)]
WIDES = [Launch("wide", 8, words=256, warps=2), Launch("wide", 16, words=16, warps=1)]
# More and fewer tiles than warps, a step and several on their way.
VECTORS = [
    Launch("vector", 16, stages=4),
    Launch("vector", 32, warps=1, stages=1),
    Launch("vector", 16, warps=8, stages=2),
]
FEW = [
    (Launch("few", 16, 16, stages=2), 8),
    (Launch("few", 32, 16, warps=1, stages=1), 2),
    (Launch("few", 16, 16, warps=8, stages=4), 16),
    (Launch("few", 16, 16, stages=2), 11),
    (Launch("few", 16, 32, stages=1), 27),
]
FUSED = [
    Launch("fused", 64, 16, programs=1),
    Launch("fused", 64, 32, words=32, programs=8),
    Launch("fused", 64, 64, programs=2, sums=False),
]
SMALL = [Launch("small", 64, 32, programs=4)]


def on_grid(shape: tuple[int, int], bits: int, group_size: int, zeros: str, device: str) -> StoredMatrix:
    generator = torch.Generator().manual_seed(shape[0] + shape[1] + bits)
    weight = torch.randn(shape, generator=generator)
    options = {"pad": True} if zeros.endswith("padded") else {}
    if zeros.endswith("per-tensor"):
        options["per_tensor"] = True
    sym = zeros == "sym"
    packed = pack_weight(quantize_weight(weight, bits=bits, sym=sym, group_size=group_size, **options))
    if zeros == "float":
        shape = packed.scales.shape
        free = torch.rand(shape, generator=generator) * (2**bits - 1)
        packed = replace(packed, zeros=free.to(torch.float16))
    tensors = {
        name: getattr(packed, name).to(device)
        for name in ("codes", "scales", "zeros")
        if getattr(packed, name) is not None
    }
    return stored(replace(packed, **tensors))


def dense_of(matrix: StoredMatrix) -> torch.Tensor:
    """The matrix in float32, read weight by weight: a layout decoded without the library's unpacking."""
    raw = matrix.codes.cpu().numpy()
    tiles, out, _ = raw.shape
    widths = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}[matrix.bits]
    codes = torch.zeros(out, tiles * matrix.tile, dtype=torch.int64)
    start, shift = 0, 0
    for width in widths:
        size = matrix.tile * width // 8
        words = torch.from_numpy(raw[:, :, start : start + size].copy().view("<u4").astype("int64"))
        for column in range(matrix.tile):
            field = words[:, :, column % words.shape[2]] >> (column // words.shape[2] * width)
            codes[:, column :: matrix.tile] |= ((field & (2**width - 1)) << shift).T
        start, shift = start + size, shift + width
    group_of = torch.arange(codes.shape[1]) // matrix.group_columns
    if matrix.table is not None:
        values = matrix.table.cpu()[codes]
    else:
        values = codes.float() - _zero_points(matrix)[group_of].T
    if matrix.scales is not None:
        values = values * _scales(matrix)[group_of].T
    values = values[:, : matrix.in_features].contiguous()
    if matrix.outlier_index is not None and matrix.outlier_values is not None:
        for place, value in zip(
            matrix.outlier_index.tolist(), matrix.outlier_values.float().tolist(), strict=True
        ):
            values[place // matrix.in_features, place % matrix.in_features] = value
    return values.to(matrix.codes.device)


def _zero_points(matrix: StoredMatrix) -> torch.Tensor:
    """Zero points [groups, out], or [groups, 1]."""
    if matrix.zeros is None:
        return torch.full((10_000, 1), 2.0 ** (matrix.bits - 1))
    if matrix.zeros.is_floating_point():
        return matrix.zeros.cpu().float()
    raw = matrix.zeros.cpu().long()
    rows = 1 if matrix.scales is not None and matrix.scales.shape[1] == 1 else matrix.out_features
    n, bits = torch.arange(rows), matrix.bits
    if bits != 3:
        return ((raw[:, n // (8 // bits)] >> (n % (8 // bits) * bits)) & (2**bits - 1)).float()
    low = (raw[:, n // 4] >> (n % 4 * 2)) & 3
    high = (raw[:, raw.shape[1] // 3 * 2 + n // 8] >> (n % 8)) & 1
    return (low + 4 * high).float()


def _scales(matrix: StoredMatrix) -> torch.Tensor:
    assert matrix.scales is not None
    scales = matrix.scales.cpu().float()
    if matrix.steps is not None and matrix.mean is not None:
        places = torch.arange(scales.numel()).view(scales.shape) // 256
        scales = matrix.mean.cpu() + matrix.steps.cpu()[places] * scales
    return scales


def table_layer(shape: tuple[int, int], bits: int, group_size: int, double: bool, outliers: int):
    out, columns = shape
    generator = torch.Generator().manual_seed(sum(shape) + bits)
    groups = 0 if group_size == -1 else -(-columns // group_size)
    codes = torch.randint(
        2**bits, (out, groups * group_size if groups else columns), generator=generator, dtype=torch.uint8
    )
    scales = torch.rand(groups, out, generator=generator) + 0.5 if groups else None
    kept = None
    if outliers:
        index = torch.randperm(out * columns, generator=generator)[:outliers].sort().values
        index[0] = index[0] % columns  # one in the first row
        kept = Outliers(index.int(), torch.randn(outliers, generator=generator) * 9)
    values = torch.randn(2**bits, generator=generator).sort().values
    weight = CodebookWeight(
        codes, values, bits, columns, quantize_scales(scales) if double else scales, group_size, kept
    )
    return CodebookLinear.from_weight(weight)


def in_table(*form: object, device: str) -> StoredMatrix:
    return table_layer(*form).to(device).stored


def tolerance(dtype: torch.dtype) -> float:
    rounded = 1.2e-2 if IS_INTERPRETED else 6e-3  # where it is rounded towards zero, twice as much
    return {torch.bfloat16: rounded, torch.float16: 1e-3, torch.float32: 2e-6}[dtype]


def assert_written(written: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bits; in the interpreter bfloat16 may be one step nearer to zero."""
    assert written.dtype == expected.dtype
    if IS_INTERPRETED and written.dtype == torch.bfloat16:
        steps = expected.view(torch.int16).int() - written.view(torch.int16).int()
        assert set(steps.unique().tolist()) <= {0, 1}
        assert torch.equal(written == 0, expected == 0)
    else:
        assert torch.equal(written, expected)


def check_product(
    matrix: StoredMatrix, launch: Launch, rows: int, dtype: torch.dtype, has_bias: bool
) -> None:
    from harness.kernels import triton_weight_only

    device = matrix.codes.device
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, matrix.in_features, generator=generator).to(device, dtype)
    bias = torch.randn(matrix.out_features, generator=generator).to(device, dtype) if has_bias else None
    expected = x.double() @ dense_of(matrix).double().T + (0 if bias is None else bias.double())
    y = triton_weight_only.multiply(x, matrix, bias, launch)
    assert y.dtype == dtype
    assert bool(torch.isfinite(y).all())
    error = float((y.double() - expected).norm() / expected.norm())
    assert error <= tolerance(dtype), (launch, rows, error)
    assert torch.equal(triton_weight_only.multiply(x, matrix, bias, launch), y), "the same bits every time"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", GRIDS, ids=str)
def test_one_row_of_a_grid(form, device):
    matrix = on_grid(*form, device=device)
    for dtype, launch in zip([*DTYPES, *DTYPES], [*GEMVS, GEMVS[0], *WIDES, WIDES[0]], strict=True):
        check_product(matrix, launch, 1, dtype, has_bias=dtype == torch.float16)


WIDER = [((48, 4096), 4, 128, "packed"), ((33, 11008), 4, 128, "packed"), ((96, 3072), 2, 128, "sym")]


@pytest.mark.gpu  # Gluon has no interpreter
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", [*GRIDS, *WIDER], ids=str)
def test_one_row_on_tensor_cores(form):
    matrix = on_grid(*form, device="cuda")
    if not takes_vector(matrix.form):
        pytest.skip("another kernel's")
    dtypes = (torch.bfloat16, torch.float16, torch.bfloat16, torch.float16)
    for launch, dtype in zip([*VECTORS, VECTORS[0]], dtypes, strict=True):
        check_product(matrix, launch, 1, dtype, has_bias=launch is not VECTORS[0])


@pytest.mark.gpu  # Gluon has no interpreter
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", [*GRIDS, *WIDER], ids=str)
def test_few_rows_on_tensor_cores(form):
    matrix = on_grid(*form, device="cuda")
    if not takes_vector(matrix.form):
        pytest.skip("another kernel's")
    for number, (launch, rows) in enumerate(FEW):
        dtype = (torch.bfloat16, torch.float16)[number % 2]
        check_product(matrix, launch, rows, dtype, has_bias=number > 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_few_rows_of_any_stride():
    from harness.kernels import triton_weight_only

    matrix = on_grid((48, 512), 4, 128, "packed", "cuda")
    base = torch.randn(5, 515, device="cuda", dtype=torch.bfloat16)
    for x in (base[:, 3:], base[:, :512], base[:, :512].contiguous()):
        y = triton_weight_only.multiply(x, matrix, None, FEW[0][0])
        assert torch.equal(y, triton_weight_only.multiply(x.clone(), matrix, None, FEW[0][0]))
        expected = x.double() @ dense_of(matrix).double().T
        assert float((y.double() - expected).norm() / expected.norm()) <= tolerance(x.dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensor_cores_lose_nothing_where_activations_share_a_sign():
    """Fields on top of 128 would cancel in the sum; less their zero points, nothing does."""
    from harness.kernels import triton_weight_only

    matrix = on_grid((64, 4096), 4, 128, "packed", "cuda")
    x = torch.full((1, 4096), 1.0 + 2**-7, device="cuda").bfloat16()
    expected = x.double() @ dense_of(matrix).double().T
    y = triton_weight_only.multiply(x.half(), matrix, None, VECTORS[0])
    assert float((y.double() - expected).norm() / expected.norm()) <= 1e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", GRIDS, ids=str)
def test_some_rows_of_a_grid(form, device):
    matrix = on_grid(*form, device=device)
    for rows, launch, dtype in zip((2, 33, 17), FUSED, (HALF, torch.float16, HALF), strict=True):
        check_product(matrix, launch, rows, dtype, has_bias=rows != 2)
    if matrix.bits != 3 and not form[3].startswith("float"):
        check_product(matrix, SMALL[0], 19, torch.float32, has_bias=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", TABLES, ids=str)
def test_one_row_of_a_table(form, device):
    matrix = in_table(*form, device=device)
    for dtype, launch in zip(DTYPES, [*GEMVS, GEMVS[0]], strict=True):
        check_product(matrix, launch, 1, dtype, has_bias=dtype == torch.float16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", [form for form in TABLES if not form[4]], ids=str)
def test_some_rows_of_a_table(form, device):
    matrix = in_table(*form, device=device)
    for rows, launch, dtype in zip((2, 33, 17), FUSED, (HALF, torch.float16, HALF), strict=True):
        check_product(matrix, launch, rows, dtype, has_bias=rows != 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", GRIDS, ids=str)
def test_a_grid_is_written_out_bit_for_bit(form, dtype, device):
    from harness.kernels import triton_weight_only

    matrix = on_grid(*form, device=device)
    written = triton_weight_only.dequantize(matrix, dtype)
    assert_written(written, dense_of(matrix).to(dtype))
    assert_written(written, reference.dequantize(_packed(matrix), dtype))  # as plain torch unpacks it


def _packed(matrix: StoredMatrix):
    from harness.nn.packing import PackedWeight

    assert matrix.scales is not None
    return PackedWeight(
        matrix.codes, matrix.scales, matrix.zeros, matrix.bits,
        -1 if matrix.scales.shape[0] == 1 else matrix.group_columns,
        matrix.tile, matrix.in_features, matrix.out_features,
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", TABLES, ids=str)
def test_a_table_is_written_out_bit_for_bit(form, dtype, device):
    layer = table_layer(*form).to(device)
    written = table.dequantize(layer.stored, dtype)
    assert_written(written, layer.codebook_weight.dequantize(dtype))
    if layer.scale_steps is None:  # 8-bit scales are added up in another order here
        assert_written(written, dense_of(layer.stored).to(dtype))


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CUDA machine, whatever the device."""
    monkeypatch.setattr(weight_only, "has_triton", lambda device: True)


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 3, 16, 31, 64, 100, 129])
def test_layers_run_what_the_choice_names(rows, device):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(48, 256, generator=generator)
    bias = torch.randn(48, generator=generator)
    quantized = quantize_weight(weight, bits=4, sym=False, group_size=128)
    order = torch.randperm(256, generator=generator).int()
    layers: list[QuantizedLinear | CodebookLinear] = [
        QuantizedLinear.from_weight(replace(quantized, order=order), bias),
        table_layer((40, 192), 4, 64, False, 0),
        table_layer((40, 192), 3, -1, False, 9),
    ]
    for layer in layers:
        layer = layer.to(device)
        assert layer.kernel_for(rows, torch.float32).startswith("triton")
        x = torch.randn(rows, layer.in_features, generator=generator).to(device)
        expected = x.double() @ layer.dense_weight().double().T
        if layer.bias is not None:
            expected += layer.bias.double()
        for dtype in (torch.float32, HALF):
            y = layer.to(dtype)(x.to(dtype)[:, :])
            error = float((y.double() - expected).norm() / expected.norm())
            assert error <= (2e-6 if dtype == torch.float32 else 8e-3), layer


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("device", DEVICES)
def test_rows_apart_and_columns_apart(device):
    """Activations that are a slice of a wider tensor, or its transpose."""
    from harness.kernels import triton_weight_only

    matrix = on_grid((40, 256), 4, 128, "packed", device)
    wide = torch.randn(5, 300, device=device)
    for x in (wide[:, 7:263], torch.randn(256, 5, device=device).T):
        for launch in (GEMVS[0], FUSED[0]):
            y = triton_weight_only.multiply(x.to(HALF)[:3], matrix, None, launch)
            whole = triton_weight_only.multiply(x.to(HALF)[:3].contiguous(), matrix, None, launch)
            assert torch.equal(y, whole)


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_reach_the_input_of_a_table(device):
    layer = table_layer((40, 192), 4, 64, False, 0).to(device)
    x = torch.randn(2, 192, device=device, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], layer.dense_weight().sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("outliers", [0, 9])
def test_the_operator_of_a_table_without_kernels(outliers):
    """What a traced layer calls on CUDA: the plain form where no kernel fits."""
    layer = table_layer((40, 192), 4, 64, True, outliers)
    matrix, x, bias = layer.stored, torch.randn(3, 192), torch.randn(40)
    arguments = (
        x, matrix.codes, matrix.table, matrix.scales, matrix.steps, matrix.mean,
        matrix.outlier_index, matrix.outlier_values, bias, 4, matrix.tile, 64, 192,
    )  # fmt: skip
    y = torch.ops.harness.table_linear(*arguments)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, layer.dense_weight(), bias))
    torch.library.opcheck(
        torch.ops.harness.table_linear, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 8, 100])
@pytest.mark.parametrize("outliers", [0, 9])
def test_a_traced_table_is_one_operator_and_a_graph_replays_it(rows, outliers):
    layer = table_layer((512, 1024), 4, 64, False, outliers).cuda()
    x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), expected)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, layer(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_kernels_keep_is_there_before_the_first_call():
    """Allocated on the first call, it could lie in the memory of a graph that is gone later."""
    from harness.kernels import triton_weight_only

    weight = quantize_weight(torch.randn(64, 256), bits=4, sym=False, group_size=128)
    for layer in (QuantizedLinear.from_weight(weight), table_layer((40, 192), 4, 64, False, 0)):
        triton_weight_only.numbers.cache_clear()
        layer = layer.cuda()
        assert triton_weight_only.numbers.cache_info().currsize == 1
        triton_weight_only.numbers(layer.codes.device)
        assert triton_weight_only.numbers.cache_info().misses == 1
