"""Tokens and samples mixed up in throughput: both count tokens, of the whole batch."""

from __future__ import annotations

import pytest
import torch

from harness.measure import bundled
from harness.measure.meter import Measured
from harness.measure.scenario import measure_scenario
from harness.models.info import info_from_config
from harness.records import Scenario

BATCH, PROMPT, NEW = 4, 16, 3


def test_latency_times_throughput_is_the_number_of_tokens(tiny_llama):
    wanted = {"prefill_latency", "prefill_throughput", "decode_latency", "decode_throughput"}
    meters = [meter for meter in bundled.register_meters() if meter.name in wanted]
    assert len(meters) == len(wanted)
    measured = Measured(
        model=tiny_llama,
        info=info_from_config(tiny_llama.config, "tiny"),
        scenario=Scenario(BATCH, PROMPT, NEW),
        device=torch.device("cpu"),
        dtype=torch.float32,
        seed=0,
        shared={},
    )
    found = {record.metric: record for record in measure_scenario(measured, meters)}
    for phase, tokens in (("prefill", BATCH * PROMPT), ("decode", BATCH)):
        latency, throughput = found[f"{phase}_latency"], found[f"{phase}_throughput"]
        assert throughput.unit == "tokens/s"
        made = [s * t for s, t in zip(latency.samples, throughput.samples, strict=True)]
        assert made == pytest.approx([tokens] * len(made))
        assert latency.value * throughput.value == pytest.approx(tokens, rel=0.25)
