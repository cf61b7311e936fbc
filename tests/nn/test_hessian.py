"""The second-order view of a layer against its definition."""

from __future__ import annotations

import pytest
import torch

from harness.errors import ConfigError, NumericalFailure
from harness.nn.blocks import iterate_blocks
from harness.nn.hessian import (
    InputHessian,
    inverse_root,
    observe_hessians,
    output_error,
    output_size,
    packed_lower,
    unpacked_lower,
)

on_cuda = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_running_mean_is_the_mean():
    x = torch.randn(100, 8, dtype=torch.float64)
    hessian = InputHessian(8)
    for part in x.split([1, 40, 59]):
        hessian.add(part.view(1, -1, 8))
    hessian.add(x[:0])
    assert hessian.tokens == 100
    torch.testing.assert_close(hessian.matrix("layer").double(), x.T @ x / 100, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_cuda)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_no_activation_is_rounded(device, dtype, precision):
    """Neither those of 16 bits nor those of float32 where the process allows TensorFloat-32."""
    x = torch.randn(2, 2000, 96, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    hessian = InputHessian(96, device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for part in x:
            hessian.add(part)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    x = x.double().flatten(0, 1)
    exact = x.T @ x / len(x)
    assert hessian.mean.dtype == torch.float32
    # TensorFloat-32 would be off by some 1e-4, bfloat16 sums by 1e-3. Tensor cores cut off what they add up.
    most = 2e-6 if device == "cpu" else 2e-5
    assert float((hessian.mean.double() - exact).norm() / exact.norm()) < most


def test_hessians_of_a_block_are_those_of_what_its_layers_read(tiny_llama):
    batches = torch.randint(3, 256, (3, 2, 12), generator=torch.Generator().manual_seed(1))
    names = ["self_attn.q_proj", "mlp.down_proj"]
    seen = {name: [] for name in names}
    for block in iterate_blocks(tiny_llama, list(batches)):
        if block.index == 1:
            block.observe(names, lambda name, x: seen[name].append(x.flatten(0, 1).double()))
            found = observe_hessians(block, names)
    for name, hessian in found.items():
        x = torch.cat(seen[name])
        torch.testing.assert_close(hessian.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)


def test_no_tokens_and_nan_name_the_layer():
    with pytest.raises(ConfigError, match=r"blocks\.3\.fc1: no calibration tokens"):
        InputHessian(4).matrix("blocks.3.fc1")
    hessian = InputHessian(4)
    hessian.add(torch.full((2, 4), float("nan")))
    with pytest.raises(NumericalFailure, match=r"blocks\.3\.fc1: .*NaN"):
        hessian.matrix("blocks.3.fc1")


def test_the_output_error_is_that_of_the_outputs():
    x, difference = torch.randn(200, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    expected = (x @ difference.T).square().sum() / 200
    assert output_error(difference, x.T @ x / 200) == pytest.approx(float(expected))
    assert output_size(difference.float(), (x.T @ x / 200).float()) == pytest.approx(
        float(expected), rel=2e-3
    )


def test_the_root_is_upper_and_of_the_damped_inverse():
    x = torch.randn(40, 12, dtype=torch.float64)
    hessian = x.T @ x / 40
    root, damp = inverse_root(hessian, 0.05)
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    assert damp == 0.05
    assert torch.equal(root, root.triu())
    torch.testing.assert_close(root.T @ root, torch.linalg.inv(damped))


def test_the_root_in_float32_is_that_of_float64():
    x = torch.randn(600, 300, dtype=torch.float64) @ torch.randn(300, 300, dtype=torch.float64)
    hessian = x.T @ x / 600
    exact, _ = inverse_root(hessian, 0.01)
    root, _ = inverse_root(hessian.float(), 0.01)
    assert float((root.double() - exact).norm() / exact.norm()) < 1e-4


@pytest.mark.parametrize("size", [1, 2, 3, 8, 11])
def test_a_triangle_takes_half_and_comes_back(size):
    matrix = torch.randn(size, size)
    packed = packed_lower(matrix)
    assert packed.numel() == (size + 1) * ((size + 1) // 2)  # the middle row of an odd number is there twice
    matrix = matrix.tril() + matrix.tril(-1).T
    assert torch.equal(unpacked_lower(packed), matrix)


def test_fewer_tokens_than_columns_are_enough():
    x = torch.randn(3, 32, dtype=torch.float64)
    root, damp = inverse_root(x.T @ x / 3, 0.01)
    assert damp == 0.01
    assert bool(torch.isfinite(root).all())


def test_damping_rises_until_the_factorisation_holds():
    hessian = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.05]))  # mean 0.7375: 0.1 is enough, 0.01 is not
    _, damp = inverse_root(hessian, 0.01)
    assert damp == pytest.approx(0.1)
    with pytest.raises(NumericalFailure, match="even with damp=1"):
        inverse_root(torch.diag(torch.tensor([1.0, 1.0, -5.0])), 0.01)
    with pytest.raises(NumericalFailure, match="NaN"):
        inverse_root(torch.full((2, 2), float("nan")), 0.01)


@pytest.mark.parametrize("damp", [0, -1])
def test_damping_must_be_positive(damp):
    with pytest.raises(ConfigError, match="above 0"):
        inverse_root(torch.eye(3), damp)
