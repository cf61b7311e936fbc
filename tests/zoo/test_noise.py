"""Weight noise: its size, its effect on the weights, and what it is for."""

from __future__ import annotations

import pytest
import torch

from harness.errors import ConfigError
from harness.zoo.noise import WeightNoise, noisy_weights, rounding_noise


def _weights():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(8, 16, generator=generator)) for _ in range(3)]


def test_noise_has_the_error_of_rounding_to_the_grid():
    groups = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    noise = rounding_noise(groups, 15, torch.rand(200, 64, generator=torch.Generator().manual_seed(2)))
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = (high - low) / 15
    rounded = low + step * ((groups - low) / step).round()
    assert float(noise.std()) == pytest.approx(float((rounded - groups).std()), rel=0.05)
    assert (noise.abs() <= step / 2).all()


def test_weights_are_noisy_inside_and_put_back_exactly():
    weights = _weights()
    before = [weight.detach().clone() for weight in weights]
    noise = WeightNoise(weights, levels=15, group_size=8, seed=0)
    with noise.applied():
        first = [weight.detach().clone() for weight in weights]
        assert all(not torch.equal(a, b) for a, b in zip(first, before, strict=True))
    with noise.applied():
        assert not torch.equal(weights[0], first[0])
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))


def test_weights_are_put_back_after_an_error():
    weights = _weights()
    before = weights[0].detach().clone()
    with pytest.raises(RuntimeError), WeightNoise(weights, 15, 8, 0).applied():
        raise RuntimeError
    assert torch.equal(weights[0], before)


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="does not divide"):
        WeightNoise(_weights(), 15, 5, 0)


def test_only_the_matrices_inside_the_blocks_are_moved(tiny_opt):
    names = {id(parameter): name for name, parameter in tiny_opt.named_parameters()}
    moved = {names[id(weight)] for weight in noisy_weights(tiny_opt)}
    assert moved == {
        n
        for n in names.values()
        if ".layers." in n and n.endswith(("proj.weight", "fc1.weight", "fc2.weight"))
    }
