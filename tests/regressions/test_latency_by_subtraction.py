"""Decode latency as the difference of two totals: noise makes it negative. Here it is never computed so."""

from __future__ import annotations

import numpy as np
import pytest

from harness.errors import NumericalFailure
from harness.measure.statistics import record_from_samples


def test_the_difference_of_noisy_totals_goes_negative_and_is_refused():
    rng = np.random.default_rng(0)
    step, noise = 0.0005, 0.002  # of a small model on a busy machine
    totals = [0.020 + tokens * step + noise * rng.standard_normal(200) for tokens in (64, 65)]
    by_subtraction = totals[1] - totals[0]
    assert (by_subtraction < 0).mean() > 0.3
    with pytest.raises(NumericalFailure, match="decode_latency: a measured time must be positive"):
        record_from_samples("decode_latency", "s", by_subtraction)


def test_steps_are_timed_one_by_one(tiny_llama):
    import torch

    from harness.measure.timing import TimingBudget, time_generation

    prompt = torch.randint(0, 256, (1, 8), generator=torch.Generator().manual_seed(0))
    times = time_generation(tiny_llama, prompt, 8, TimingBudget(least=3, most=3, seconds=1.0))
    assert min(times.decode.samples_s) > 0
    # Each run gives readings of its own; a total minus a total gives one.
    assert len(times.decode.samples_s) >= 3
    assert sum(times.decode.samples_s) < sum(times.end_to_end.samples_s)
