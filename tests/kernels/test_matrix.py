"""The product of a 4-bit matrix and many rows, against plain torch.

It is written in Gluon, which has no interpreter.
"""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from harness.kernels.selection import Launch, takes_matrix
from tests.kernels.test_weight_only import GRIDS, check_product, dense_of, on_grid, tolerance

FORMS = [
    *GRIDS,
    ((256, 512), 4, 128, "packed"),
    ((300, 1024), 4, 256, "packed"),
    ((520, 640), 4, 128, "sym"),
    ((4096, 4096), 4, 128, "packed"),
    ((4096, 11008), 4, 128, "packed"),
]
LAUNCHES = [
    (Launch("matrix", 128, 256, warps=8, stages=6), 333),
    (Launch("matrix", 128, 128, warps=8, stages=4), 200),
    (Launch("matrix", 128, 64, warps=8, stages=8), 100),
    (Launch("matrix", 256, 64, warps=8, stages=6), 64),
    (Launch("matrix", 256, 32, warps=8, stages=8), 17),
    (Launch("matrix", 128, 32, warps=8, stages=12), 32),
    (Launch("matrix", 64, 256, warps=4, stages=2), 512),
]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("place", range(len(FORMS)), ids=[str(form) for form in FORMS])
def test_many_rows_on_tensor_cores(place):
    matrix = on_grid(*FORMS[place], device="cuda")
    if not takes_matrix(matrix.form):
        pytest.skip("another kernel's")
    for number in (place, place + 2):  # each is compiled for each form
        launch, rows = LAUNCHES[number % len(LAUNCHES)]
        dtype = (torch.bfloat16, torch.float16)[number % 2]
        check_product(matrix, launch, rows, dtype, has_bias=number % 3 > 0)


@pytest.mark.gpu
@needs_cuda
def test_rows_of_any_stride():
    from harness.kernels import triton_weight_only

    matrix = on_grid((300, 512), 4, 128, "packed", "cuda")
    base = torch.randn(70, 520, device="cuda", dtype=torch.bfloat16)
    once = base[:1, :512].expand(70, 512)
    for x in (base[:, 8:], base[:, 3:515], base[:, :512], base[::2, :512], base[:, :512].contiguous(), once):
        y = triton_weight_only.multiply(x, matrix, None, LAUNCHES[0][0])
        assert torch.equal(y, triton_weight_only.multiply(x.clone(), matrix, None, LAUNCHES[0][0]))
        expected = x.double() @ dense_of(matrix).double().T
        assert float((y.double() - expected).norm() / expected.norm()) <= tolerance(x.dtype)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("launch", [launch for launch, _ in LAUNCHES], ids=str)
def test_every_weight_is_that_of_the_written_matrix(launch):
    """Rows of the unit matrix: each output is one weight, rounded once."""
    from harness.kernels import triton_weight_only

    matrix = on_grid((520, 512), 4, 128, "packed", "cuda")
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.eye(512, device="cuda", dtype=dtype)
        y = triton_weight_only.multiply(x, matrix, None, launch)
        assert torch.equal(y.T, triton_weight_only.dequantize(matrix, dtype))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("rows", [512, 1024])  # blocks that are shared out, and whole ones
@pytest.mark.parametrize("launch", [launch for launch, _ in LAUNCHES], ids=str)
def test_the_assembler_leaves_products_in_flight(launch, rows):
    """It waits for each, with no more than a remark, where it cannot tell the registers of sums apart."""
    from harness.kernels import triton_weight_only

    matrix = on_grid((4096, 4096), 4, 128, "packed", "cuda")
    x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
    call = triton_weight_only.prepare(x, matrix, None, launch, triton_weight_only.processors(x.device))[0]
    left = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", call.compile().asm["sass"])
    assert left == ["3"] * 8 + ["0"]


@pytest.mark.gpu
@needs_cuda
def test_many_programs_at_once_give_the_same_bits():
    """Operands in registers must outlive their products, also where programs share a multiprocessor."""
    from harness.kernels import triton_weight_only

    matrix = on_grid((11008, 4096), 4, 128, "packed", "cuda")
    x = torch.randn(512, 4096, device="cuda", dtype=torch.bfloat16)
    expected = x.double() @ dense_of(matrix).double().T
    for launch, _ in LAUNCHES:
        first = triton_weight_only.multiply(x, matrix, None, launch)
        assert float((first.double() - expected).norm() / expected.norm()) <= tolerance(x.dtype)
        for _ in range(20):
            assert torch.equal(triton_weight_only.multiply(x, matrix, None, launch), first), launch


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("outs", [(4096, 4096, 4096), (520, 130, 66), (11008, 11008), (300, 4096)], ids=str)
def test_one_launch_for_several_matrices(outs, has_bias, dtype):
    from harness.kernels import triton_weight_only

    matrices = [on_grid((out, 4096), 4, 128, "packed", "cuda") for out in outs]
    biases = [torch.randn(out, device="cuda").to(dtype) for out in outs] if has_bias else []
    for launch, rows in LAUNCHES[sum(outs) % 2 :: 3]:  # each is compiled for each form
        x = torch.randn(rows, 4096, device="cuda").to(dtype)
        found = triton_weight_only.multiply_several(x, matrices, biases, launch)
        again = triton_weight_only.multiply_several(x, matrices, biases, launch)
        for place, (y, matrix) in enumerate(zip(found, matrices, strict=True)):
            expected = x.double() @ dense_of(matrix).double().T
            if has_bias:
                expected += biases[place].double()
            assert y.shape == expected.shape
            assert float((y.double() - expected).norm() / expected.norm()) <= tolerance(dtype), launch
            assert torch.equal(y, again[place])


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("splits", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("rows", [256, 700])
def test_blocks_are_shared_out_to_any_number_of_programs(splits, rows, monkeypatch):
    from harness.kernels import matrix as launches
    from harness.kernels import triton_weight_only

    matrix = on_grid((1000, 4096), 4, 128, "packed", "cuda")
    x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(1000, device="cuda", dtype=torch.bfloat16)
    expected = x.double() @ dense_of(matrix).double().T + bias.double()
    launch, _ = LAUNCHES[0]
    for whole in (0, 5):
        monkeypatch.setattr(launches, "split_blocks", lambda *_, whole=whole: (whole, splits))
        y = triton_weight_only.multiply(x, matrix, bias, launch)
        assert float((y.double() - expected).norm() / expected.norm()) <= tolerance(x.dtype)
        for _ in range(20):
            assert torch.equal(triton_weight_only.multiply(x, matrix, bias, launch), y)


@pytest.mark.gpu
@needs_cuda
def test_programs_that_wait_are_right_in_graphs_on_several_streams():
    """Flags are of a launch's own memory, and taken away where they were seen: replays begin without any."""
    from harness.kernels import triton_weight_only

    launch, rows = LAUNCHES[0]
    matrix = on_grid((4096, 4096), 4, 128, "packed", "cuda")
    x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
    expected = triton_weight_only.multiply(x, matrix, None, launch)
    graphs, outputs, streams = [], [], [torch.cuda.Stream() for _ in range(3)]
    for _ in streams:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append([triton_weight_only.multiply(x, matrix, None, launch) for _ in range(4)])
        graphs.append(graph)
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for some in outputs for y in some)


def test_no_two_launches_have_the_same_flag(monkeypatch):
    pytest.importorskip("triton")
    from harness.kernels import matrix

    monkeypatch.setattr(matrix, "_launches", itertools.count())
    flags = {matrix.new_flag() for _ in range(10_000)}
    assert len(flags) == 10_000
    assert all(1 << 62 < flag < 1 << 63 for flag in flags)


@pytest.mark.parametrize(
    ("block_n", "block_m", "warps"), sorted({(e.block_n, e.block_m, e.warps) for e, _ in LAUNCHES})
)
def test_sums_that_wait_have_places_of_their_own(block_n, block_m, warps):
    pytest.importorskip("triton")
    from harness.kernels.gluon_matrix import places

    row, column = torch.arange(block_n), torch.arange(block_m)
    at = places.fn(row, column, block_m, warps)
    assert sorted(at.flatten().tolist()) == list(range(block_n * block_m))
    # Two neighbours of a row are written at once, and those of a warp are one stretch.
    assert torch.equal(at[:, 1::2], at[:, ::2] + 1)
    assert at[:8, :8].sort().values.flatten().tolist() == list(range(64))
