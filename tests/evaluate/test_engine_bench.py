"""The comparison with lm-eval's `HFLM`: one line a run, and answers that agree."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from harness.evaluate import bench


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_answer_the_same_requests(capsys, dtype):
    options = ["--items", "4", "--repeats", "1", "--batch-sizes", "4", "--dtype", dtype]
    bench.main(["--tasks", "grammar", "--model", "zoo:opt-4m", *options])
    printed = capsys.readouterr().out
    assert re.search(r"HFLM, batch 4: .*engine: .*x\n", printed)
    assert float(re.search(r"items per second: ([0-9.]+) times", printed)[1]) > 0
    nats, steps, type_name = re.search(
        r"largest difference of a log-likelihood: (\S+) nats, (\S+) steps of the (\w+) that", printed
    ).groups()
    assert type_name == dtype
    # Sums of some forty tokens, each rounded once or twice.
    assert float(nats) < (1e-3 if dtype == "float32" else 2.0)
    assert float(steps) < 40
    assert "greedy flags that differ: 0 of" in printed


def test_steps_are_the_distance_to_the_next_number():
    values = np.array([1.0, -3.7, -1000.0, 0.1])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        there = torch.tensor(values).abs().to(dtype)
        further = torch.nextafter(there, torch.full_like(there, torch.inf))
        expected = (further.double() - there.double()).numpy()
        assert np.array_equal(bench._step(there.double().numpy(), dtype), expected)
