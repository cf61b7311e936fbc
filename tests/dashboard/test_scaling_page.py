"""The Scaling page: what is read, what is drawn and what is said."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest

pytest.importorskip("streamlit")

from harness_dashboard import scaling_charts, scaling_data
from harness_dashboard.variant_names import variant_names

from harness.comparing.growth import Axis
from harness.store.store import Store
from tests.core.stores import add_cell, add_sweep
from tests.dashboard.filling import HOSTILE
from tests.dashboard.pages import draw, fill_scaling, scenario_records, texts


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("scaling") / "results.db"
    with Store.open(path) as store:
        fill_scaling(store)
    return path


@pytest.fixture
def store(path):
    with Store.open_readonly(path) as store:
        yield store


@pytest.fixture
def about(store):
    return scaling_data.timed_variants(store, "m", scaling_data.timed_shapes(store, "m", None))


def ids(about, *names):
    return [int(about.set_index("method").at[name, "variant"]) for name in names]


# --- what is read -----------------------------------------------------------------------------


def test_the_model_with_the_most_shapes_comes_first(store):
    assert scaling_data.timed_models(store, None) == ["m", "n"]


def test_baselines_come_first_then_those_with_the_most_sizes(about):
    assert about["method"].tolist()[:2] == ["baseline", "window"]
    assert about[["prompt_lens", "batch_sizes"]].values.tolist() == [[3, 3], [3, 3], [1, 1], [1, 1]]


def test_only_ok_cells_of_the_sweep_are_counted(store):
    assert scaling_data.timed_models(store, 1) == ["m", "n"]
    assert len(scaling_data.timed_shapes(store, "m", 1)) == 20


def test_the_exponents_are_those_of_the_command(store, about):
    from harness.comparing import length_sweeps

    chosen = ids(about, "baseline", "window")
    timed = scaling_data.read_timed(store, chosen, None)
    lines = scaling_data.growth_of(timed, Axis.PROMPT_LEN, (8, 16), ["prefill_latency"])
    found = scaling_data.fits(lines, about, ["prefill_latency"]).set_index("name")
    command = {
        (each.method, each.metric): each.exponent
        for each in length_sweeps(store)
        if each.batch_size == 8 and each.model == "m"
    }
    for method in ("baseline", "window"):
        expected = command[method, "prefill_latency"]
        assert found.at[method, "exponent"] == expected.exponent
        assert (found.at[method, "lower"], found.at[method, "upper"]) == (expected.lower, expected.upper)
        assert found.at[method, "basis"] == "control"


def test_linear_growth_with_the_batch_has_exponent_one(store, about):
    timed = scaling_data.read_timed(store, ids(about, "baseline"), None)
    lines = scaling_data.growth_of(timed, Axis.BATCH_SIZE, (512, 16), ["prefill_peak_bytes"])
    row = scaling_data.fits(lines, about, ["prefill_peak_bytes"]).iloc[0]
    assert row["exponent"] == pytest.approx(1.0)
    assert math.isnan(row["lower"])  # one reading has no interval
    assert (row["first"], row["last"], row["sizes"]) == (1, 64, 3)


def test_one_size_is_drawn_and_has_no_exponent(store, about):
    timed = scaling_data.read_timed(store, ids(about, "short"), None)
    lines = scaling_data.growth_of(timed, Axis.PROMPT_LEN, (1, 16), ["prefill_latency"])
    assert len(scaling_data.points(lines, about, "prefill_latency")) == 1
    row = scaling_data.fits(lines, about, ["prefill_latency"]).iloc[0]
    assert math.isnan(row["exponent"])
    assert row["note"] == "an exponent needs 3 sizes, this has 1"


def test_other_conditions_make_another_line(tmp_path):
    with Store.open(tmp_path / "results.db") as store:
        for length, torch in ((128, "1"), (512, "1"), (2048, "1"), (4096, "2")):
            sweep = add_sweep(store, versions={"torch": torch})
            label = f"b1-p{length}-g16"
            add_cell(store, sweep, "a", *scenario_records(1, length, 1e-5, 0), scenario=label)
        shapes = scaling_data.timed_shapes(store, "m", None)
        about = scaling_data.timed_variants(store, "m", shapes)
        timed = scaling_data.read_timed(store, [1], None)
        lines = scaling_data.growth_of(timed, Axis.PROMPT_LEN, (1, 16), ["prefill_latency"])
        [row] = scaling_data.fits(lines, about, ["prefill_latency"]).to_dict("records")
    assert (row["first"], row["last"]) == (128, 2048)
    assert row["note"] == "without 4096: measured under other conditions"


def test_the_crossing_is_found_between_the_lengths(store, about):
    a, b = ids(about, "baseline", "window")
    timed = scaling_data.read_timed(store, [a, b], None)
    found = [
        each
        for each in scaling_data.crossings_of(timed, a, b, Axis.PROMPT_LEN, "prefill_latency")
        if each.fixed == 1
    ]
    [crossing] = found
    # 1.125e-5 · n = 0.004 + 4.5e-6 · n at n = 593; interpolated between the measured 512 and 2048
    assert 512 < crossing.found.batch < 700
    assert crossing.found.lower < crossing.found.batch < crossing.found.upper
    sentence = scaling_data.crossing_sentence(crossing, "window")
    assert sentence.startswith("Both take the same time at ")
    assert sentence.endswith("tokens of prompt; window is faster above it.")
    table = scaling_data.crossing_table(found, "window")
    assert table["batch size"].tolist() == [1]
    assert table["basis"].tolist() == ["control"]
    assert table["caution"].tolist() == [""]


def test_no_crossing_is_said_too(store, about):
    a, b = ids(about, "baseline", "window")
    timed = scaling_data.read_timed(store, [a, b], None)
    found = scaling_data.crossings_of(timed, a, b, Axis.BATCH_SIZE, "prefill_latency")
    [longest] = [each for each in found if each.fixed == 2048]
    assert scaling_data.crossing_sentence(longest, "window") == (
        "No crossing: window is faster at every measured batch size (1 to 64)."
    )


def test_the_command_adds_sizes_to_those_that_are_there():
    shapes = pd.DataFrame({"variant": [1], "batch_size": [4], "prompt_len": [256], "new_tokens": [32]})
    command = scaling_data.missing_sizes_command("org/m", ["gptq", "a b"], shapes, Axis.PROMPT_LEN)
    assert command == (
        "harness sweep --models org/m --methods 'gptq,a b' --prompt-lens 128,256,512 --batch-sizes 4 "
        "--new-tokens 32"
    )
    command = scaling_data.missing_sizes_command("org/m", ["gptq"], shapes, Axis.BATCH_SIZE)
    assert "--prompt-lens 256 --batch-sizes 1,4,8" in command


def test_names_are_as_short_as_they_can_be():
    frame = pd.DataFrame(
        {"variant": [1, 2, 3], "method": ["a", "a", "b"], "seed": [0, 1, 0], "dtype": ["x", "x", "x"]}
    )
    assert variant_names(frame) == {1: "a · seed 0", 2: "a · seed 1", 3: "b · seed 0"}
    twice = pd.DataFrame({"variant": [1, 2], "method": ["a", "a"]})
    assert variant_names(twice) == {1: "a · #1", 2: "a · #2"}


# --- what is drawn ----------------------------------------------------------------------------


def test_axes_are_logarithmic_with_units_and_direction(store, about):
    timed = scaling_data.read_timed(store, ids(about, "baseline", "window"), None)
    lines = scaling_data.growth_of(timed, Axis.PROMPT_LEN, (1, 16), ["prefill_latency"])
    points = scaling_data.points(lines, about, "prefill_latency")
    fits = scaling_data.fits(lines, about, ["prefill_latency"])
    figure = scaling_charts.growth(points, fits, Axis.PROMPT_LEN, "prefill_latency")
    assert (figure.layout.xaxis.type, figure.layout.yaxis.type) == ("log", "log")
    assert figure.layout.xaxis.title.text == "prompt length [tokens]"
    assert figure.layout.yaxis.title.text == "prefill_latency [ms] (lower is better)"
    assert list(figure.layout.xaxis.tickvals) == [128, 512, 2048]
    measured = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert [trace.name for trace in measured] == ["baseline", "window"]
    assert measured[0].y[0] == pytest.approx(points["value"].iloc[0] * 1000)
    fitted = [trace for trace in figure.data if trace.mode == "lines"]
    slope = math.log(fitted[0].y[1] / fitted[0].y[0]) / math.log(2048 / 128)
    assert slope == pytest.approx(fits["exponent"].iloc[0])


def test_lines_whose_names_begin_alike_have_two_names(store, about):
    names = [f"smoothquant:alpha=0.75+gptq:bits={bits}" for bits in (3, 4)]
    chosen = ids(about, "baseline", "window")
    about = about[about["variant"].isin(chosen)].assign(name=names)
    timed = scaling_data.read_timed(store, chosen, None)
    lines = scaling_data.growth_of(timed, Axis.PROMPT_LEN, (1, 16), ["prefill_latency"])
    points = scaling_data.points(lines, about, "prefill_latency")
    fits = scaling_data.fits(lines, about, ["prefill_latency"])
    figure = scaling_charts.growth(points, fits, Axis.PROMPT_LEN, "prefill_latency")
    legend = [trace.name for trace in figure.data if trace.mode == "lines+markers"]
    assert [name[-6:] for name in legend] == ["bits=3", "bits=4"]


def test_what_was_not_measured_alike_is_not_joined(tmp_path):
    with Store.open(tmp_path / "results.db") as store:
        for torch, lengths, slope in (("2.11", (128, 512, 2048), 1e-5), ("2.12", (256, 1024, 4096), 4e-5)):
            sweep = add_sweep(store, versions={"torch": torch})
            for length in lengths:
                records = scenario_records(1, length, slope, 0.001)
                add_cell(store, sweep, "baseline", *records, scenario=f"b1-p{length}-g16")
        about = scaling_data.timed_variants(store, "m", scaling_data.timed_shapes(store, "m", None))
        timed = scaling_data.read_timed(store, ids(about, "baseline"), None)
    lines = scaling_data.growth_of(timed, Axis.PROMPT_LEN, (1, 16), ["prefill_latency"])
    points = scaling_data.points(lines, about, "prefill_latency")
    fits = scaling_data.fits(lines, about, ["prefill_latency"])
    figure = scaling_charts.growth(points, fits, Axis.PROMPT_LEN, "prefill_latency")
    measured = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert {trace.name: list(trace.x) for trace in measured} == {
        "baseline (128 to 2,048)": [128, 512, 2048], "baseline (256 to 4,096)": [256, 1024, 4096],
    }  # fmt: skip
    fitted = [trace for trace in figure.data if trace.mode == "lines"]
    slopes = [math.log(each.y[1] / each.y[0]) / math.log(each.x[1] / each.x[0]) for each in fitted]
    assert slopes == pytest.approx(fits["exponent"].tolist())


def test_simulated_lines_are_marked_wherever_they_stand(tmp_path, monkeypatch):
    path = tmp_path / "simulated.db"
    with Store.open(path) as store:
        sweep = add_sweep(store)
        for method, slope in (("baseline", 1e-5), ("wanda", 2e-5)):
            for length in (128, 512, 2048):
                about = {"scenario": f"b1-p{length}-g16", "simulated": method == "wanda"}
                add_cell(store, sweep, method, *scenario_records(1, length, slope, 0.0), **about)
    app = draw("scaling", path, monkeypatch)
    drawn = json.loads(app.get("plotly_chart")[0].proto.spec)
    lines = [trace for trace in drawn["data"] if trace["mode"] == "lines+markers"]
    assert [line["name"] for line in lines] == ["baseline", "wanda (simulated)"]
    assert [line["marker"]["symbol"] for line in lines] == ["circle", "square-open"]
    assert all("wanda (simulated)" in text for text in lines[1]["hovertext"])
    assert set(app.dataframe[0].value["variant"]) == {"baseline", "wanda (simulated)"}
    assert any("wanda (simulated)" in each.value for each in app.text), "the crossing in words"


def test_a_unit_from_the_store_is_no_html(store, about):
    timed = scaling_data.read_timed(store, ids(about, "baseline"), None)
    lines = scaling_data.growth_of(timed, Axis.PROMPT_LEN, (1, 16), ["prefill_latency"])
    points = scaling_data.points(lines, about, "prefill_latency").assign(unit=HOSTILE)
    fits = scaling_data.fits(lines, about, ["prefill_latency"])
    figure = scaling_charts.growth(points, fits, Axis.PROMPT_LEN, "prefill_latency")
    assert "<img" not in str(figure.to_dict())


def test_the_crossing_is_drawn_with_its_interval(store, about):
    a, b = ids(about, "baseline", "window")
    timed = scaling_data.read_timed(store, [a, b], None)
    found = scaling_data.crossings_of(timed, a, b, Axis.PROMPT_LEN, "prefill_latency")
    drawn = [each for each in found if each.fixed == 1]
    figure = scaling_charts.ratios(drawn, HOSTILE, "window")
    star = next(trace for trace in figure.data if trace.name == "crossing")
    assert star.x[0] == drawn[0].found.batch
    assert star.error_x.array[0] == pytest.approx(drawn[0].found.upper - drawn[0].found.batch)
    assert "<img" not in figure.layout.yaxis.title.text


# --- the page ---------------------------------------------------------------------------------


def test_the_page(path, monkeypatch):
    app = draw("scaling", path, monkeypatch)
    assert len(app.get("plotly_chart")) == 6
    assert any("Both take the same time at" in each.value for each in app.text)
    commands = [each.value for each in app.code]  # some of the chosen have one size only
    assert any("--prompt-lens 128,512,2048" in each for each in commands)
    for said in texts(app):
        assert "<img" not in said


def test_choices_are_in_the_address(path, monkeypatch):
    app = draw("scaling", path, monkeypatch, line=["1", "2"], time="decode_latency", batch="8-16")
    chosen = {each.label: each.value for each in app.selectbox}
    assert chosen["Time"] == "decode_latency"
    assert chosen["At batch size"] == "8-16"
    assert app.multiselect[0].value == ["1", "2"]
    assert not app.code
    app.selectbox[2].set_value("prefill_kv_cache_bytes").run()
    assert app.query_params["memory"] == "prefill_kv_cache_bytes"


def test_a_model_of_one_variant_says_what_is_missing(path, monkeypatch):
    app = draw("scaling", path, monkeypatch, on="n")
    assert "A crossing needs two variants of this model." in [each.value for each in app.info]
    assert app.code[0].value == (
        "harness sweep --models n --methods baseline --prompt-lens 128,512,2048 --batch-sizes 1 "
        "--new-tokens 16"
    )
