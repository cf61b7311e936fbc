"""Which shapes are timed, and what the meters of a cell add up to."""

from __future__ import annotations

import pytest
import torch

from harness.errors import ConfigError, NotApplicable, PluginError
from harness.measure.meter import Measured, Meter
from harness.measure.scenario import default_scenarios, measure_scenario, scenario_problem
from harness.models.info import info_from_config
from harness.records import Record, Scenario


def measured_of(model, scenario: Scenario) -> Measured:
    return Measured(
        model=model,
        info=info_from_config(model.config, "tiny"),
        scenario=scenario,
        device=torch.device("cpu"),
        dtype=torch.float32,
        seed=0,
        shared={},
    )


def test_every_batch_size_meets_every_prompt_length_once(tiny_llama):
    info = info_from_config(tiny_llama.config, "tiny")
    shapes = default_scenarios(info, [1, 8, 1], [16, 32], 4)
    assert [shape.label for shape in shapes] == ["b1-p16-g4", "b1-p32-g4", "b8-p16-g4", "b8-p32-g4"]


def test_an_encoder_decodes_nothing(tiny_bert):
    info = info_from_config(tiny_bert.config, "tiny")
    assert default_scenarios(info, [2], [16], 64) == (Scenario(2, 16, 0),)
    assert "nothing to decode" in scenario_problem(info, Scenario(1, 16, 1))


@pytest.mark.parametrize(
    ("batches", "prompts", "new", "message"),
    [
        ([0], [1], 1, "batch size must be at least 1, not 0"),
        ([1], [-3], 1, "prompt length must be at least 1, not -3"),
        ([1], [1], -1, "new tokens must be at least 0, not -1"),
        ([], [1], 1, "at least one batch size"),
        ([1], [], 1, "at least one prompt length"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(tiny_llama, batches, prompts, new, message):
    info = info_from_config(tiny_llama.config, "tiny")
    with pytest.raises(ConfigError, match=message):
        default_scenarios(info, batches, prompts, new)


def test_a_shape_longer_than_the_model_is_a_reason_and_not_a_crash(tiny_llama):
    info = info_from_config(tiny_llama.config, "tiny")
    assert scenario_problem(info, Scenario(1, 96, 32)) is None
    problem = scenario_problem(info, Scenario(1, 100, 32))
    assert problem == "b1-p100-g32 needs 132 positions; tiny has 128"
    with pytest.raises(ConfigError, match="needs 132 positions"):
        measure_scenario(measured_of(tiny_llama, Scenario(1, 100, 32)), [])


def test_meters_run_where_their_kind_fits_and_add_nothing_where_they_do_not_apply(tiny_llama):
    def refuse(_measured):
        raise NotApplicable("not here")

    meters = [
        Meter("one", lambda m: [Record("one", float(m.scenario.batch_size), "1")]),
        Meter("encoders", lambda m: [Record("two", 2.0, "1")], kinds=("encoder",)),
        Meter("refusing", refuse),
        Meter("several", lambda m: (Record(name, 3.0, "1") for name in ("three", "four"))),
    ]
    records = measure_scenario(measured_of(tiny_llama, Scenario(5, 8, 0)), meters)
    assert [(record.metric, record.value) for record in records] == [
        ("one", 5.0),
        ("three", 3.0),
        ("four", 3.0),
    ]


def test_two_meters_of_one_metric_are_named(tiny_llama):
    meters = [
        Meter("mine", lambda m: [Record("speed", 1.0, "1")]),
        Meter("theirs", lambda m: [Record("speed", 2.0, "1")]),
    ]
    with pytest.raises(PluginError, match="meters 'mine' and 'theirs' both measure 'speed'"):
        measure_scenario(measured_of(tiny_llama, Scenario(1, 8, 0)), meters)


def test_a_meter_that_breaks_fails_the_cell(tiny_llama):
    def broken(_measured):
        raise ZeroDivisionError("oh")

    with pytest.raises(ZeroDivisionError):
        measure_scenario(measured_of(tiny_llama, Scenario(1, 8, 0)), [Meter("broken", broken)])
