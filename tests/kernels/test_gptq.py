"""The kernels of GPTQ against plain torch: on a CUDA device, or in Triton's interpreter.

Without a CUDA device: ``TRITON_INTERPRET=1 python -m pytest tests/kernels/test_gptq.py``, where triton is
installed.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from harness.kernels import gptq, reference
from harness.nn.hessian import inverse_root
from harness.nn.quantizer import CLIP_FACTORS, least_error_grid

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
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
        marks=pytest.mark.skipif(not IS_INTERPRETED, reason="needs triton and TRITON_INTERPRET=1"),
    ),
]

# rows, columns, bits, groups, type of the scales; rows and columns that fill no program among them
BLOCKS = [
    (37, 128, 4, 1, torch.float16),
    (16, 64, 3, 4, torch.float16),
    (5, 1, 2, 1, torch.bfloat16),
    (33, 100, 8, 3, torch.float32),
    (9, 200, 2, 1, torch.bfloat16),
]
# rows, groups, columns, bits, type of the scales
GROUPS = [
    (37, 2, 128, 4, torch.float16),
    (9, 3, 64, 3, torch.bfloat16),
    (5, 1, 300, 2, torch.float32),
    (3, 1, 1100, 4, torch.bfloat16),  # more than a program holds at once
    (7, 2, 16, 8, torch.float16),
]


def root_of(columns: int, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(4 * columns, columns, generator=generator)
    x = x @ torch.randn(columns, columns, generator=generator)
    return inverse_root(x.T @ x / len(x), 0.01)[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("form", BLOCKS, ids=str)
def test_the_columns_of_a_block_bit_for_bit(device, sym, form):
    from harness.kernels import triton_gptq

    rows, columns, bits, groups, dtype = form
    generator = torch.Generator().manual_seed(columns)
    # A block is a part of a matrix, so its rows do not follow each other in memory.
    block = torch.randn(rows, columns + 7, generator=generator).to(device)[:, 3 : 3 + columns]
    kept = block.clone()
    root = root_of(columns, generator).to(device)
    of_column = torch.randint(groups, (columns,), generator=generator, dtype=torch.int32).to(device)
    scale = (block.abs().amax(1, keepdim=True) / 2 ** (bits - 1)).expand(rows, groups)
    scale = (scale * torch.linspace(0.5, 1.5, groups, device=device)).to(dtype)
    zero = None
    if not sym:
        zero = torch.randint(2**bits, (rows, groups), generator=generator).to(device, torch.uint8)
    args = (block, root, scale, zero, of_column, bits)
    codes, errors = triton_gptq.quantize_columns(*args)
    expected_codes, expected_errors = reference.quantize_columns(*args)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(errors, expected_errors)
    assert torch.equal(block, kept)
    assert columns == 1 or len(codes.unique()) > 2
    if device == "cuda":
        assert gptq.choose(block, columns) == "triton gptq"
        assert torch.equal(gptq.quantize_columns(*args)[0], codes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("form", GROUPS, ids=str)
def test_the_search_finds_the_same_ranges(device, sym, form):
    """Errors are added up in another order: of two ranges that lose the same up to 1e-5 either may win."""
    from harness.kernels import triton_gptq

    rows, groups, columns, bits, dtype = form
    generator = torch.Generator().manual_seed(columns)
    values = torch.randn(rows, groups * columns + 5, generator=generator) ** 3
    values[1] = 0
    values = values.to(device)[:, 5:].unflatten(1, (groups, columns))
    importance = torch.rand(groups, columns, generator=generator).to(device)
    args = (values, importance, CLIP_FACTORS, bits, sym, dtype)
    found, expected = triton_gptq.search_grid(*args), least_error_grid(*args)
    assert found.scale.dtype == dtype

    def loss(grid) -> torch.Tensor:
        return ((grid.round(values) - values).double() ** 2 * importance).sum(-1)

    torch.testing.assert_close(loss(found), loss(expected), rtol=1e-5, atol=0)
    same = found.scale == expected.scale
    if not sym:
        same &= found.zero == expected.zero
    assert float(same.float().mean()) >= 0.95


@pytest.mark.parametrize("device", DEVICES)
def test_halves_round_to_even(device):
    from harness.kernels import triton_gptq

    block = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 1e30, -1e30]], device=device).repeat(3, 1)
    scale, groups = torch.ones(3, 1, device=device), torch.zeros(7, dtype=torch.int32, device=device)
    codes, _ = triton_gptq.quantize_columns(block, torch.eye(7, device=device), scale, None, groups, 4)
    assert codes.tolist() == [[8, 10, 10, 8, 6, 15, 1]] * 3


def test_the_choice(monkeypatch):
    block = torch.zeros(4, 128)
    assert gptq.choose(block, 128) == "torch"
    monkeypatch.setattr(gptq, "has_triton", lambda device: True)
    assert gptq.choose(block, 128) == "triton gptq"
    assert gptq.choose(block.double(), 128) == "torch"
    assert gptq.choose(block, gptq.MOST_COLUMNS + 1) == "torch"


def test_the_reference_follows_the_definition():
    """One column after the other in float64, written out."""
    generator = torch.Generator().manual_seed(2)
    block, root = torch.randn(6, 20, generator=generator).double(), root_of(20, generator).double()
    scale, zero = torch.full((6, 2), 0.25), torch.full((6, 2), 7, dtype=torch.uint8)
    scale[:, 1] = 0.5
    groups = torch.tensor([0, 1] * 10, dtype=torch.int32)
    codes, errors = reference.quantize_columns(block, root, scale, zero, groups, 4)
    rest = block.clone()
    for j in range(20):
        step = 0.5 if j % 2 else 0.25
        code = (torch.round(rest[:, j] / step) + 7).clamp(0, 15)
        error = (rest[:, j] - (code - 7) * step) / root[j, j]
        assert torch.equal(codes[:, j].double(), code)
        torch.testing.assert_close(errors[:, j], error, rtol=1e-12, atol=1e-12)
        rest[:, j:] -= error[:, None] * root[j, j:]
