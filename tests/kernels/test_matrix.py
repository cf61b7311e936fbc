"""The product of a 4-bit matrix and many rows, against plain torch.

The product itself is written in Gluon, which has no interpreter. What adds its parts up runs there too:
``TRITON_INTERPRET=1 python -m pytest tests/kernels/test_matrix.py``.
"""

from __future__ import annotations

import re

import pytest
import torch

from harness.kernels.selection import Launch, takes_matrix
from tests.kernels.test_weight_only import DEVICES, GRIDS, check_product, dense_of, on_grid, tolerance

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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_parts_of_blocks_are_added_up(device, has_bias):
    from harness.kernels.matrix import add_blocks

    rows, out, block_m, block_n, whole, splits = 200, 150, 128, 64, 2, 3
    blocks_m, blocks_n = 2, 3
    left = blocks_m * blocks_n - whole
    partials = torch.randn(left, splits, block_n, block_m, device=device)
    bias = torch.randn(out, device=device) if has_bias else None
    y = torch.full((rows, out), 7.0, device=device)
    add_blocks(partials, bias, y, blocks_m, whole).run()
    for block in range(blocks_m * blocks_n):
        m, n = block % blocks_m * block_m, block // blocks_m * block_n
        found = y[m : m + block_m, n : n + block_n]
        if block < whole:
            assert (found == 7.0).all(), "another program's"
            continue
        expected = partials[block - whole].sum(0).T[: found.shape[0], : found.shape[1]]
        if bias is not None:
            expected = expected + bias[n : n + block_n]
        torch.testing.assert_close(found, expected)
