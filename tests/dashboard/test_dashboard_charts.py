from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("plotly")

from harness_dashboard import charts, detail_charts, pareto_charts, queries
from harness_dashboard.pareto_charts import Axis
from harness_dashboard.queries import Filters

from harness import display
from harness.method import FAMILIES
from harness.records import KernelUse
from harness.why import Explanation
from tests.dashboard.filling import HOSTILE, MODEL, SMALL

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


def beats(a, b, better):
    gains = [(a[axis] - b[axis]) * (1 if way == "higher" else -1) for axis, way in better.items()]
    return min(gains) >= 0 and max(gains) > 0


@pytest.mark.parametrize(
    "ways", [*itertools.product(("lower", "higher"), repeat=2), ("lower", "higher", "lower")]
)
def test_the_front_is_what_nothing_beats(ways):
    rng = np.random.default_rng(0)
    better = dict(zip("xyz", ways, strict=False))
    frame = pd.DataFrame(rng.integers(0, 6, size=(80, len(ways))).astype(float), columns=list(better))
    frame.index = rng.permutation(80)
    rows = frame.to_dict("index")
    expected = {
        index for index in rows if not any(beats(other, rows[index], better) for other in rows.values())
    }
    front = pareto_charts.pareto_front(frame, better)
    assert set(front[front].index) == expected
    assert front.index.equals(frame.index)


def test_the_front_of_nothing():
    for axes in ("xy", "xyz"):
        empty = pd.DataFrame({axis: [] for axis in axes})
        assert pareto_charts.pareto_front(empty, dict.fromkeys(axes, "lower")).empty


# --- figures ----------------------------------------------------------------------------------


@pytest.fixture
def read(filled):
    """Points, or readings, of columns with what describes their variants."""
    by_name = {column.name: column for column in queries.columns(filled, None)}

    def points(*names):
        found = queries.points(filled, [by_name[name] for name in names], Filters(), None)
        return found.merge(queries.described(filled, found["variant"].tolist()), on="variant")

    def readings(name, model=MODEL):
        ids = queries.matching(filled, Filters(models=(model,)), None)[::-1]
        found = queries.values(filled, [by_name[name]], None, ids)
        column = by_name[name]
        about = {"metric": column.metric, "unit": column.unit, "kind": column.kind}
        return found.merge(queries.described(filled, ids), on="variant").assign(**about)

    points.of, points.columns = readings, by_name
    return points


TIME, SCORE = Axis(DECODE, "s", "lower"), Axis(ACCURACY, "fraction", "higher")
BYTES = Axis(f"weight_bytes · {SMALL}", "B", "lower")


@pytest.fixture
def figure(read):
    return pareto_charts.pareto(read(DECODE, ACCURACY), TIME, SCORE)


def test_axes_name_unit_and_direction(figure):
    assert figure.layout.xaxis.title.text == f"{DECODE} [ms] (lower is better)"
    assert figure.layout.yaxis.title.text == f"{ACCURACY} [%] (higher is better)"


def test_both_axes_can_be_logarithmic(read):
    drawn = pareto_charts.pareto(
        read(DECODE, ACCURACY), replace(TIME, is_log=True), replace(SCORE, is_log=True)
    )
    assert (drawn.layout.xaxis.type, drawn.layout.yaxis.type) == ("log", "log")


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


def test_what_has_no_place_on_an_axis_is_named(read):
    points = read(DECODE, ACCURACY)
    points.loc[0, "y"], points.loc[1, "x"] = 0.0, math.inf
    drawn = pareto_charts.pareto(points, TIME, replace(SCORE, is_log=True))
    assert drawn.layout.meta["off_axis"] == points["name"].tolist()[:2]
    hovers = [text for trace in drawn.data for text in trace.hovertext or ()]
    assert len(hovers) == len(points) - 2
    drawn = pareto_charts.pareto(points, TIME, SCORE)
    assert drawn.layout.meta["off_axis"] == points["name"].tolist()[1:2], "a linear axis has a zero"


@pytest.mark.parametrize("is_log", [False, True])
def test_a_third_axis_is_the_area_of_the_points(read, is_log):
    points = read(DECODE, ACCURACY, f"weight_bytes · {SMALL}")
    drawn = pareto_charts.pareto(points, TIME, SCORE, replace(BYTES, is_log=is_log))
    traces = {trace.name: trace for trace in drawn.data}
    assert "Pareto front" not in traces, "a line would show the front of two"
    rings = traces["Pareto front of all three"]
    better = {"x": "lower", "y": "higher", "z": "lower"}
    assert len(rings.x) == pareto_charts.pareto_front(points, better).sum()
    sizes = dict(zip(traces["quantization"].hovertext, traces["quantization"].marker.size, strict=True))
    small = next(size for text, size in sizes.items() if text.startswith("gptq:bits=3"))
    assert small == pytest.approx(6.0), "the fewest bytes"
    assert list(traces["baseline"].marker.size) == pytest.approx([30.0])
    assert "z: 11.92 MiB" in traces["baseline"].hovertext[0]


@pytest.mark.parametrize("is_log", [False, True])
def test_an_infinite_area_leaves_the_others_apart(read, is_log):
    one = read(DECODE, ACCURACY, f"weight_bytes · {SMALL}").head(1)
    points = pd.concat([one] * 4, ignore_index=True).assign(z=[1.0, 2.0, 4.0, math.inf])
    drawn = pareto_charts.pareto(points, TIME, SCORE, replace(BYTES, is_log=is_log))
    [sizes] = [trace.marker.size for trace in drawn.data if trace.name == points["family"][0]]
    assert [sizes[0], *sizes[2:]] == pytest.approx([6.0, 30.0, 30.0])
    assert 6.0 < sizes[1] < 30.0


def test_of_many_points_the_front_is_always_drawn(read):
    one = read(DECODE, ACCURACY).head(1)
    rng = np.random.default_rng(0)
    many = pd.concat([one] * 3000, ignore_index=True)
    many["x"], many["y"] = rng.uniform(1, 2, 3000), rng.uniform(0.2, 0.9, 3000)
    drawn = pareto_charts.pareto(many, TIME, SCORE)
    front, family = drawn.data
    assert len(family.x) == 1200
    assert drawn.layout.meta["left_out"] == 1800
    on_front = pareto_charts.pareto_front(many, {"x": "lower", "y": "higher"})
    assert len(front.x) == on_front.sum()
    assert family.mode == "markers"
    assert np.count_nonzero(family.error_x.array) <= on_front.sum()


def test_text_from_the_store_is_escaped(read):
    hostile = read.of(DECODE)
    hostile = hostile[hostile["method"] == HOSTILE]
    figure = charts.comparison(hostile, [hostile["name"].iloc[0]])
    assert "<img" not in figure.to_json()
    assert "&lt;img" in figure.to_json()
    drawn = pareto_charts.pareto(
        read(DECODE, f"weight_bytes · {SMALL}"),
        replace(TIME, name=f"{DECODE} <b>"),
        replace(BYTES, name="<i>"),
    )
    assert "<img" not in drawn.to_json()
    assert "<i>" not in drawn.layout.yaxis.title.text


def test_a_comparison_keeps_the_order_and_the_place_of_who_has_no_value(read):
    rows = read.of(DECODE)
    names = [*rows["name"][:2], "somebody without a value"]
    figure = charts.comparison(rows[rows["name"].isin(names)], names)
    assert list(figure.layout.yaxis.ticktext) == names
    assert [trace.y[0] for trace in figure.data] == [0, 1]
    assert figure.layout.xaxis.title.text == "[ms] (lower is better)"
    assert figure.layout.title.text == DECODE


def test_a_long_name_leaves_room_and_is_whole_when_hovering(read):
    name = "smoothquant:alpha=0.75+gptq:bits=3:group_size=64"
    rows = read.of(DECODE).head(1).assign(name=name)
    figure = charts.comparison(rows, [name])
    assert figure.layout.yaxis.ticktext[0] == "smoothquant:alpha=0.75+gptq:bits=…"
    assert name in figure.data[0].hovertext[0]


def test_a_value_without_interval_has_no_bar(read):
    rows = read.of(f"weight_bytes · {SMALL}").head(1)
    [trace] = charts.comparison(rows, rows["name"].tolist()).data
    assert list(trace.error_x.array) == [0.0]
    assert "[" not in trace.hovertext[0].split("<br>")[1].replace("[MiB]", "")


# --- details ----------------------------------------------------------------------------------


def test_every_reading_is_drawn_in_its_familys_colour(filled, read):
    rows = read.of(DECODE).head(2)
    about = queries.described(filled, rows["variant"].tolist())
    column = read.columns[DECODE]
    figure = detail_charts.distributions(queries.readings(filled, rows), column, about)
    assert [len(trace.x) for trace in figure.data] == [20, 20]
    assert figure.data[0].x.min() > 1, "in ms"
    assert figure.data[1].marker.color == charts.FAMILY_STYLES["quantization"][0]
    assert figure.layout.xaxis.title.text == "[ms] (lower is better)"


def explanation(*kernels, **records):
    known = {name: {"value": value, "unit": "B/s"} for name, value in records.items()}
    return Explanation("m", "gptq", 0, SMALL, False, False, known, kernels)


def test_kernels_of_one_family_are_added_up():
    found = {
        1: explanation(
            KernelUse("decode", "gemv", "matmul", 6, 0.6, 0.6),
            KernelUse("decode", "copy", "copy", 2, 0.4, 0.4),
        ),
        2: explanation(
            KernelUse("decode", "a", "matmul", 1, 0.5, 0.5),
            KernelUse("decode", HOSTILE, "matmul", 1, 0.5, 0.5),
        ),
    }
    figure = detail_charts.kernel_shares(found, {1: "one", 2: "two"}, "decode")
    shares = {trace.name: list(trace.x) for trace in figure.data}
    assert shares == {"matmul": pytest.approx([60, 100]), "copy": pytest.approx([40, 0])}
    assert "<img" not in figure.to_json()
    assert detail_charts.kernel_shares(found, {1: "one", 2: "two"}, "prefill") is None
    assert len({(t.marker.color, t.marker.pattern.shape) for t in figure.data}) == 2


LONG = [f"smoothquant:alpha=0.75+gptq:bits=4:group_size={size}" for size in (32, 64)]


def test_names_that_begin_alike_do_not_become_one_bar(filled, read):
    kernel = KernelUse("decode", "gemv", "matmul", 1, 1.0, 1.0)
    figure = detail_charts.kernel_shares(
        {1: explanation(kernel), 2: explanation(kernel)}, {1: LONG[0], 2: LONG[1]}, "decode"
    )
    assert len(set(figure.data[0].y)) == 2
    rows = read.of(DECODE).head(2)
    about = queries.described(filled, rows["variant"].tolist()).assign(name=LONG)
    readings = queries.readings(filled, rows)
    boxes = detail_charts.distributions(readings, read.columns[DECODE], about).data
    found = {variant: explanation(decode_mbu=0.5) for variant in about["variant"]}
    bars = detail_charts.ceilings(found, about).data
    axis = charts.comparison(rows.assign(name=LONG), LONG).layout.yaxis.ticktext
    for names in ([box.name for box in boxes], [bar.name for bar in bars], axis):
        assert [name[-2:] for name in names] == ["32", "64"]


def test_names_are_told_apart_in_little_room():
    assert charts.told_apart(["gptq", "rtn"]) == ["gptq", "rtn"]
    alike = ["a" * 40 + "1" + "b" * 40, "a" * 40 + "2" + "b" * 40]
    assert charts.told_apart(alike) == alike, "neither end tells them apart"
    assert [len(name) for name in charts.told_apart(LONG)] == [34, 34]


def test_what_was_achieved_stands_beside_what_is_possible(filled, read):
    about = queries.described(filled, [1, 2])
    found = {
        1: explanation(decode_mbu=0.5, decode_bytes_per_s=1.5e12),
        2: explanation(decode_mbu=0.25, decode_bytes_per_s=0.75e12, prefill_mfu=0.4),
    }
    figure = detail_charts.ceilings(found, about)
    assert [list(trace.x) for trace in figure.data] == [[50.0], [40.0, 25.0]]
    assert "3,000,000,000,000 B/s" in figure.data[0].hovertext[0]
    assert figure.layout.shapes[0].x0 == 100
    assert detail_charts.ceilings({1: explanation()}, about) is None


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
