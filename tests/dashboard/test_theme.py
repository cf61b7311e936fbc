"""Colours that can be read and told apart, on either ground, also by those who see fewer of them."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("plotly")

import plotly.graph_objects as go
from harness_dashboard import theme
from harness_dashboard.charts import comparison
from harness_dashboard.theme import DARK, LIGHT, contrast, readable, themed

from harness.display import DARK_FAMILY_COLOURS, FAMILY_COLOURS
from harness.method import FAMILIES

PALETTES = [(FAMILY_COLOURS, LIGHT), (DARK_FAMILY_COLOURS, DARK)]
# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
VISIONS = {
    "full": np.eye(3),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(colour, vision):
    part = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ np.clip(VISIONS[vision] @ linear, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_contrast_is_that_of_the_standard():
    assert contrast("#777777", "#FFFFFF") == pytest.approx(4.48, abs=0.01)
    assert contrast("#FFFFFF", "#777777") == contrast("#777777", "#FFFFFF")
    assert contrast("#123456", "#123456") == 1


@pytest.mark.parametrize(("palette", "ground"), PALETTES)
def test_every_family_has_a_colour_that_stands_out(palette, ground):
    assert tuple(palette) == FAMILIES
    assert len(set(palette.values())) == len(FAMILIES)
    for family, colour in palette.items():
        assert contrast(colour, ground.background) >= theme.GRAPHIC_CONTRAST, family


@pytest.mark.parametrize("vision", list(VISIONS))
@pytest.mark.parametrize(("palette", "_ground"), PALETTES)
def test_families_can_be_told_apart(palette, _ground, vision):
    seen = {family: lab(colour, vision) for family, colour in palette.items()}
    for (first, a), (second, b) in itertools.combinations(seen.items(), 2):
        assert np.linalg.norm(a - b) >= 19, (first, second)


@pytest.mark.parametrize("ground", [LIGHT, DARK])
def test_text_can_be_read(ground):
    for background in (ground.background, ground.secondary_background):
        assert contrast(ground.text, background) >= theme.TEXT_CONTRAST
        assert contrast(ground.link, background) >= theme.TEXT_CONTRAST
    assert contrast(ground.primary, ground.background) >= theme.GRAPHIC_CONTRAST
    assert contrast("#FFFFFF", ground.primary) >= theme.TEXT_CONTRAST  # what is chosen is written on it


@pytest.mark.parametrize("colour", ["#000000", "#31333F", "#1E711A", "#3E3E3E", "#14161A", "#000080"])
def test_what_would_be_lost_on_a_dark_ground_is_lifted(colour):
    assert contrast(readable(colour, DARK.background), DARK.background) >= theme.TEXT_CONTRAST


def figure():
    rows = [
        {
            "name": name, "value": 1.0, "lower": 0.9, "upper": 1.1, "unit": "s", "marks": "",
            "family": family, "metric": "transform_s", "kind": "transform", "column": "transform_s",
        }
        for name, family in (("#1E711A", "baseline"), ("gptq", "quantization"))
    ]  # fmt: skip
    return comparison(pd.DataFrame(rows), ["#1E711A", "gptq"])


def test_a_figure_in_the_dark():
    drawn = figure()
    before = drawn.to_json()
    dark = themed(drawn, dark=True)
    assert drawn.to_json() == before
    assert [trace.marker.color for trace in dark.data] == [
        DARK_FAMILY_COLOURS["baseline"],
        DARK_FAMILY_COLOURS["quantization"],
    ]
    assert dark.layout.font.color == DARK.text
    assert dark.layout.xaxis.tickfont.color == DARK.text
    assert dark.layout.yaxis.ticktext == ("#1E711A", "gptq")  # a name is no colour
    assert dark.data[0].hovertext[0].startswith("#1E711A")


def test_a_figure_in_the_light_keeps_its_colours():
    light = themed(figure(), dark=False)
    assert [trace.marker.color for trace in light.data] == [
        FAMILY_COLOURS["baseline"],
        FAMILY_COLOURS["quantization"],
    ]
    assert light.layout.xaxis.title.font.color == LIGHT.text


def test_lists_of_colours_and_of_traces():
    drawn = go.Figure(go.Bar(x=[1, 2], y=[1, 2], marker={"color": ["#000000", "#010203"]}))
    drawn.add_annotation(text="x", font={"color": "#000001"}, bgcolor="#FFFFFF")
    dark = themed(drawn, dark=True)
    assert dark.data[0].marker.color[0] == DARK_FAMILY_COLOURS["baseline"]
    assert contrast(dark.data[0].marker.color[1], DARK.background) >= 3
    assert contrast(dark.layout.annotations[0].font.color, DARK.background) >= 3
