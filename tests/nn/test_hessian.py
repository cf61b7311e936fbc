"""The second-order view of a layer against its definition."""

from __future__ import annotations

import pytest
import torch

from harness.errors import ConfigError, NumericalFailure
from harness.nn.hessian import InputHessian, inverse_root, output_error


def test_the_running_mean_is_the_mean():
    x = torch.randn(100, 8, dtype=torch.float64)
    hessian = InputHessian(8)
    for part in x.split([1, 40, 59]):
        hessian.add(part.view(1, -1, 8))
    hessian.add(x[:0])
    assert hessian.tokens == 100
    torch.testing.assert_close(hessian.matrix("layer").double(), x.T @ x / 100, rtol=1e-5, atol=1e-6)


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


def test_the_root_is_upper_and_of_the_damped_inverse():
    x = torch.randn(40, 12, dtype=torch.float64)
    hessian = x.T @ x / 40
    root, damp = inverse_root(hessian, 0.05)
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    assert damp == 0.05
    assert torch.equal(root, root.triu())
    torch.testing.assert_close(root.T @ root, torch.linalg.inv(damped))


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
