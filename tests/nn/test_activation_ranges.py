"""Calibrated ranges: against the tensors themselves."""

from __future__ import annotations

import pytest
import torch

from harness.errors import ConfigError
from harness.nn.activation_grid import tensor_grid
from harness.nn.activation_ranges import least_squares_range, observe_ranges
from harness.nn.activation_sites import activation_sites, observe_sites
from harness.testing.models import tiny_model

BATCHES = list(torch.randint(5, 256, (6, 16), generator=torch.Generator().manual_seed(0)).split(2))


def tensors(model, sites):
    """What each site saw, batch after batch."""
    seen = {site: [] for site in sites}
    observe_sites(model, sites, BATCHES, lambda site, x: seen[site].append(x.clone()))
    return seen


@pytest.mark.parametrize("family", ["llama", "encoder"])
def test_minmax_covers_everything_and_counts_it(family):
    model = tiny_model(family)
    sites = activation_sites(model)
    found = observe_ranges(model, sites, BATCHES, method="minmax")
    for site, seen in tensors(model, sites).items():
        values = torch.cat([x.flatten() for x in seen])
        assert (found[site].low, found[site].high) == (values.min(), values.max())
        assert found[site].elements == values.numel()


def test_a_running_range_moves_by_a_tenth_each_batch():
    model = tiny_model("llama")
    sites = [site for site in activation_sites(model) if site.kind in ("ffn_sum", "probs")]
    found = observe_ranges(model, sites, BATCHES, method="running", momentum=0.9)
    for site, (first, second, third) in tensors(model, sites).items():
        for name, reduce in (("low", torch.amin), ("high", torch.amax)):
            expected = 0.81 * reduce(first) + 0.09 * reduce(second) + 0.1 * reduce(third)
            torch.testing.assert_close(getattr(found[site], name), expected)


def test_ranges_of_dimensions_are_those_of_columns():
    model = tiny_model("llama")
    sites = [site for site in activation_sites(model) if site.kind == "ffn_sum"]
    found = observe_ranges(model, sites, BATCHES, method="minmax", per_dimension=sites)
    for site, seen in tensors(model, sites).items():
        columns = torch.cat([x.flatten(0, -2) for x in seen])
        assert torch.equal(found[site].low, columns.amin(0))
        assert torch.equal(found[site].high, columns.amax(0))
        assert found[site].whole.high == columns.max()


def test_the_least_squares_range_is_the_best_by_brute_force():
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    x[:5] *= 20
    low, high = float(x.min()), float(x.max())
    counts = torch.histc(x, bins=4096, min=low, max=high)

    def error(ratio: float, bits: int) -> float:
        grid = tensor_grid(torch.tensor(low * ratio), torch.tensor(high * ratio), bits)
        return float((grid.round(x) - x).square().sum())

    for bits in (4, 8):
        found = least_squares_range(counts, low, high, bits)
        best = min((ratio / 100 for ratio in range(1, 101)), key=lambda ratio: error(ratio, bits))
        assert found[1] / high == pytest.approx(best, abs=0.03)
        assert error(found[1] / high, bits) <= 1.02 * error(best, bits) < error(1.0, bits)
    assert least_squares_range(torch.ones(4), 0.0, 0.0, 8) == (0.0, 0.0)


def test_mse_shrinks_what_minmax_finds():
    model = tiny_model("encoder")
    sites = [site for site in activation_sites(model) if site.kind in ("ffn_hidden", "attn_sum")]
    wide = observe_ranges(model, sites, BATCHES, method="minmax")
    found = observe_ranges(model, sites, BATCHES, method="mse", bits=4)
    assert all(found[site].width <= wide[site].width for site in sites)
    assert any(found[site].width < wide[site].width for site in sites)


def test_what_cannot_be_calibrated_is_refused():
    model = tiny_model("llama")
    sites = activation_sites(model)
    with pytest.raises(ConfigError, match="need calibration tokens"):
        observe_ranges(model, sites, [])
    with pytest.raises(ConfigError, match="range=mse"):
        observe_ranges(model, sites, BATCHES, method="mse", per_dimension=sites[:1])
