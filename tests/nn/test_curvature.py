"""Power iteration against spectra that are known, and against explicit Hessians."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from harness.errors import NumericalFailure
from harness.nn.curvature import hessian_product, top_eigenvalue, twice_differentiable


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def symmetric(spectrum):
    q, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator()).double())
    return q @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ q.t()


@pytest.mark.parametrize("spectrum", [[12.0, 10.0, 4.0, 1.0, 0.0], [-6.0, 5.0, 1.0, 0.5, 0.1]])
def test_a_quadratic_of_known_spectrum(spectrum):
    a = symmetric(spectrum)
    x = torch.ones(5, dtype=torch.float64, requires_grad=True)
    gradient, product = hessian_product(0.5 * x @ a @ x, [x])
    torch.testing.assert_close(gradient[0], a @ x.detach())
    found = top_eigenvalue(product, [x], generator(), iterations=500, tolerance=1e-7)
    assert found.converged
    assert abs(found.value - spectrum[0]) <= 1e-3 * abs(spectrum[0])


def test_it_says_where_it_did_not_converge():
    a = symmetric([1.0, 0.999, 0.5])
    found = top_eigenvalue(
        lambda v: (a @ v[0],), [torch.empty(3).double()], generator(), iterations=3, tolerance=1e-9
    )
    assert (found.converged, found.iterations) == (False, 3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_small_network_has_the_eigenvalue_of_its_explicit_hessian(seed):
    """Two layers, 86 parameters, cross-entropy; the Hessian of all of them by autograd, by eigvalsh."""
    g = generator(seed)
    x, y = torch.randn(40, 6, generator=g).double(), torch.randint(4, (40,), generator=g)
    shapes = [(8, 6), (8,), (4, 8)]
    sizes = [48, 8, 32]
    flat = 0.7 * torch.randn(sum(sizes), generator=g).double()

    def loss(parameters):
        w1, b1, w2 = parameters
        return functional.cross_entropy(torch.tanh(x @ w1.t() + b1) @ w2.t(), y)

    def split(values):
        return [part.view(shape) for part, shape in zip(values.split(sizes), shapes, strict=True)]

    hessian = torch.autograd.functional.hessian(lambda values: loss(split(values)), flat)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    largest = float(eigenvalues[eigenvalues.abs().argmax()])
    parameters = [part.clone().requires_grad_() for part in split(flat)]
    _, product = hessian_product(loss(parameters), parameters)
    v = torch.randn(sum(sizes), generator=g).double()
    image = torch.cat([part.flatten() for part in product(tuple(split(v)))])
    torch.testing.assert_close(image, hessian @ v)
    found = top_eigenvalue(product, parameters, g, iterations=1000, tolerance=1e-8)
    assert found.value == pytest.approx(largest, rel=0.01)


def test_attention_has_second_derivatives_inside():
    q = torch.randn(1, 2, 5, 4, generator=generator()).requires_grad_()
    with twice_differentiable():
        out = functional.scaled_dot_product_attention(q, q.detach(), q.detach(), is_causal=True)
        _, product = hessian_product(out.square().sum(), [q])
        (image,) = product((torch.ones_like(q),))
    assert torch.isfinite(image).all()
    assert image.abs().sum() > 0


def test_flat_and_broken_losses():
    x = torch.ones(3, requires_grad=True)
    _, product = hessian_product(x.sum(), [x])
    assert top_eigenvalue(product, [x], generator(), iterations=5, tolerance=1e-2).value == 0
    with pytest.raises(NumericalFailure, match="NaN"):
        top_eigenvalue(
            lambda v: (v[0] * float("nan"),), [x.detach()], generator(), iterations=5, tolerance=1e-2
        )
