"""Where static activation scales clip."""

from __future__ import annotations

import pytest
import torch

from harness.errors import ConfigError, NumericalFailure
from harness.nn.blocks import Block, BlockInput, iterate_blocks
from harness.nn.ranges import best_clip, observe_clips, observe_peaks
from harness.testing.models import tiny_model


def histogram(x: torch.Tensor, bins: int = 16384) -> tuple[torch.Tensor, torch.Tensor]:
    peak = x.abs().amax()
    return torch.histc(x.abs(), bins=bins, min=0, max=float(peak)), peak


def int8_error(x: torch.Tensor, clip: float) -> float:
    step = clip / 127
    return float(((x / step).round().clamp(-127, 127) * step - x).square().sum())


def test_percentiles_are_those_of_the_values():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    counts, peak = histogram(x)
    for percentile in (50.0, 99.0, 99.9):
        expected = float(torch.quantile(x.abs(), percentile / 100))
        assert float(best_clip(counts, peak, "percentile", percentile)) == pytest.approx(expected, rel=5e-3)
    assert float(best_clip(counts, peak, "percentile", 100.0)) == pytest.approx(float(peak))
    assert best_clip(counts, peak, "absmax") == peak


def test_the_least_squared_error_is_found_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50_000, generator=generator)
    x[:5] *= 20
    counts, peak = histogram(x)
    clip = float(best_clip(counts, peak, "mse"))
    ratios = [ratio / 100 for ratio in range(1, 101)]
    best = min(ratios, key=lambda ratio: int8_error(x, float(peak) * ratio))
    assert clip / float(peak) == pytest.approx(best, abs=0.02)
    assert int8_error(x, clip) < 0.95 * int8_error(x, float(peak))


def block_of_tiny_llama(tokens: torch.Tensor) -> Block:
    return next(iterate_blocks(tiny_model("llama"), list(tokens.split(2))))


def test_peaks_are_per_channel_over_all_batches():
    tokens = torch.randint(256, (4, 16), generator=torch.Generator().manual_seed(3))
    block = block_of_tiny_llama(tokens)
    seen = []
    block.observe(["self_attn.o_proj"], lambda _name, x: seen.append(x.reshape(-1, 128)))
    peaks = observe_peaks(block, ["self_attn.q_proj", "self_attn.o_proj"])
    assert torch.equal(peaks["self_attn.o_proj"], torch.cat(seen).abs().amax(0))
    assert peaks["self_attn.q_proj"].shape == (128,)
    clips = observe_clips(block, ["self_attn.o_proj"], "absmax")
    torch.testing.assert_close(clips["self_attn.o_proj"], torch.cat(seen).abs().amax().view(1) / 127)
    clipped = observe_clips(block, ["self_attn.o_proj"], "percentile", 90.0)["self_attn.o_proj"]
    assert float(clipped) == pytest.approx(float(torch.quantile(torch.cat(seen).abs(), 0.9)) / 127, rel=0.01)


def test_nothing_and_nan_are_errors():
    block = block_of_tiny_llama(torch.zeros(2, 4, dtype=torch.int64))
    block.inputs[0].hidden = torch.full_like(block.inputs[0].hidden, float("nan"))
    with pytest.raises(NumericalFailure, match=r"q_proj: .*NaN"):
        observe_peaks(block, ["self_attn.q_proj"])
    empty: list[BlockInput] = []
    with pytest.raises(ConfigError, match="no calibration tokens"):
        observe_peaks(Block(0, "block", block.module, empty), ["self_attn.q_proj"])
