from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("plotly")

from harness_dashboard import charts, queries

from harness import display
from harness.method import FAMILIES
from tests.dashboard.filling import HOSTILE, SMALL

ACCURACY, DECODE = "acc · hellaswag", f"decode_latency · {SMALL}"

# Machado, Oliveira and Fernandes 2009: full protanopia, deuteranopia and tritanopia, linear RGB.
BLINDNESS = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.01182, 0.04294, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.3039],
    ],
}


def seen(colour, kind):
    """A colour as it is seen with a colour blindness, in CIELAB."""
    rgb = np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(BLINDNESS[kind]) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_every_family_has_a_colour_and_a_shape_of_its_own():
    assert set(charts.FAMILY_STYLES) == set(FAMILIES)
    for styles in zip(*charts.FAMILY_STYLES.values(), strict=True):
        assert len(set(styles)) == len(FAMILIES)


@pytest.mark.parametrize("kind", BLINDNESS)
def test_the_families_most_often_seen_together_differ_for_the_colour_blind(kind):
    common = ("baseline", "quantization", "pruning", "attention", "distillation")
    for one, other in itertools.combinations(common, 2):
        colours = [seen(charts.FAMILY_STYLES[name][0], kind) for name in (one, other)]
        assert np.linalg.norm(colours[0] - colours[1]) > 12, f"{one} and {other}"


# --- the front --------------------------------------------------------------------------------


@pytest.mark.parametrize("x_better", ["lower", "higher"])
@pytest.mark.parametrize("y_better", ["lower", "higher"])
def test_the_front_is_what_nothing_beats(x_better, y_better):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.integers(0, 8, size=(60, 2)).astype(float), columns=["x", "y"])
    frame.index = rng.permutation(60)

    def beats(a, b):
        gains = [
            (a[axis] - b[axis]) * (1 if better == "higher" else -1)
            for axis, better in (("x", x_better), ("y", y_better))
        ]
        return min(gains) >= 0 and max(gains) > 0

    rows = frame.to_dict("index")
    expected = {index for index in rows if not any(beats(other, rows[index]) for other in rows.values())}
    front = charts.pareto_front(frame, x_better, y_better)
    assert set(front[front].index) == expected
    assert front.index.equals(frame.index)


def test_the_front_of_nothing():
    assert charts.pareto_front(pd.DataFrame({"x": [], "y": []}), "lower", "lower").empty


# --- figures ----------------------------------------------------------------------------------


@pytest.fixture
def frame(filled):
    return queries.named(queries.load(filled))


@pytest.fixture
def figure(frame):
    return charts.pareto(
        queries.points(frame, DECODE, ACCURACY),
        x_name=DECODE, x_unit="s", x_better="lower",
        y_name=ACCURACY, y_unit="fraction", y_better="higher",
    )  # fmt: skip


def test_axes_name_unit_and_direction(figure):
    assert figure.layout.xaxis.title.text == f"{DECODE} [ms] (lower is better)"
    assert figure.layout.yaxis.title.text == f"{ACCURACY} [%] (higher is better)"


def test_one_trace_a_family_in_its_colour_with_intervals(figure):
    traces = {trace.name: trace for trace in figure.data}
    assert set(traces) == {"Pareto front", "baseline", "quantization", "pruning", "attention"}
    baseline = traces["baseline"]
    assert baseline.marker.color == charts.FAMILY_STYLES["baseline"][0]
    assert baseline.x[0] == pytest.approx(2.1)
    assert baseline.error_x.array[0] == pytest.approx(0.063)
    assert baseline.error_x.arrayminus[0] == pytest.approx(0.042)
    assert baseline.error_y.array[0] == pytest.approx(6.0)


def test_hovering_shows_options_interval_and_device(figure):
    traces = {trace.name: trace for trace in figure.data}
    text = next(text for text in traces["quantization"].hovertext if text.startswith("gptq:bits=4"))
    assert "bits=4 group_size=128" in text
    assert "x: 1.218 [1.194, 1.255] ms" in text
    assert "NVIDIA H100" in text


def test_simulated_points_are_hollow_and_say_so(figure):
    pruning = next(trace for trace in figure.data if trace.name == "pruning")
    assert list(pruning.marker.symbol) == ["square", "square-open"]
    assert "(simulated)" in pruning.text[1]
    assert "(simulated)" in pruning.hovertext[1]


def test_the_front_steps_through_what_is_reachable(figure):
    front = figure.data[0]
    assert front.line.shape == "hv", "from the cheaper point on, its quality can be had"
    assert list(front.x) == sorted(front.x)
    assert list(front.y) == sorted(front.y)


def test_text_from_the_store_is_escaped(filled, frame):
    rows = queries.newest(frame)
    hostile = rows[rows["method"] == HOSTILE]
    figure = charts.comparison(hostile[hostile["column"] == DECODE], [hostile["name"].iloc[0]])
    assert "<img" not in figure.to_json()
    assert "&lt;img" in figure.to_json()
    points = queries.points(frame, DECODE, f"weight_bytes · {SMALL}")
    drawn = charts.pareto(
        points, x_name=f"{DECODE} <b>", x_unit="s", x_better="lower",
        y_name="<i>", y_unit="B", y_better="lower",
    )  # fmt: skip
    assert "<img" not in drawn.to_json()
    assert "<i>" not in drawn.layout.yaxis.title.text


def test_a_comparison_keeps_the_order_and_the_place_of_who_has_no_value(frame):
    rows = queries.newest(frame)
    rows = rows[(rows["column"] == DECODE) & (rows["model"] == "zoo:llama-6m")]
    names = [*rows["name"][:2], "somebody without a value"]
    figure = charts.comparison(rows[rows["name"].isin(names)], names)
    assert list(figure.layout.yaxis.ticktext) == names
    assert [trace.y[0] for trace in figure.data] == [0, 1]
    assert figure.layout.xaxis.title.text == "[ms] (lower is better)"
    assert figure.layout.title.text == DECODE


def test_a_long_name_leaves_room_and_is_whole_when_hovering(frame):
    rows = queries.newest(frame)
    name = "smoothquant:alpha=0.75+gptq:bits=3:group_size=64"
    rows = rows[rows["column"] == DECODE].head(1).assign(name=name)
    figure = charts.comparison(rows, [name])
    assert figure.layout.yaxis.ticktext[0] == "smoothquant:alpha=0.75+gptq:bits=…"
    assert name in figure.data[0].hovertext[0]


def test_a_value_without_interval_has_no_bar(frame):
    rows = queries.newest(frame)
    rows = rows[rows["column"] == f"weight_bytes · {SMALL}"].head(1)
    [trace] = charts.comparison(rows, rows["name"].tolist()).data
    assert list(trace.error_x.array) == [0.0]
    assert "[" not in trace.hovertext[0].split("<br>")[1].replace("[MiB]", "")


# --- numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "values", "shown"),
    [
        ("s", [0.5, 0.1], "ms"), ("s", [2e-5], "µs"), ("s", [3.0, 0.001], "s"), ("s", [], "s"),
        ("B", [100], "B"), ("B", [5 * 2**20, 3], "MiB"), ("B", [2.0**60], "TiB"), ("B", [0], "B"),
        ("B/token", [6144], "KiB/token"), ("s/token", [0.002], "ms/token"),
        ("fraction", [0.5], "%"), ("ppl", [12.0], "ppl"), ("s", [math.nan, None], "s"),
        ("s", [math.inf, 0.2], "ms"), ("1", [0.3], ""),
    ],
)  # fmt: skip
def test_units_are_easy_to_read(unit, values, shown):
    factor, name = display.scale(unit, values)
    assert name == shown
    if name == "ms":
        assert factor == 1000


def test_a_mebibyte_is_one():
    factor, unit = display.scale("B", [3 * 2**20])
    assert (3 * 2**20 * factor, unit) == (3.0, "MiB")


@pytest.mark.parametrize(
    ("metric", "unit", "kind", "direction"),
    [
        ("decode_latency", "s", "scenario", "lower"),
        ("decode_throughput", "tokens/s", "scenario", "higher"),
        ("peak_bytes", "B", "scenario", "lower"),
        ("acc", "fraction", "task", "higher"),
        ("token_perplexity", "ppl", "task", "lower"),
        ("acc_flips", "fraction", "task", "lower"),
        ("stored_bits_per_weight", "bit", "transform", "lower"),
        ("outlier_share", "fraction", "transform", None),
    ],
)
def test_directions(metric, unit, kind, direction):
    assert display.better(metric, unit, kind) == direction


def test_axis_titles():
    assert display.axis_title("a", "ms", "lower") == "a [ms] (lower is better)"
    assert display.axis_title("a", "", None) == "a"
