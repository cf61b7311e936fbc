"""Everything that a table can show has a sentence that says what it is."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import harness_plugins
import pytest

import harness
from harness.derive import difference_name
from harness.display import COUNTED, LEADING, better, scale
from harness.evaluate import metrics
from harness.glossary import COLUMNS, VALUES, explain, explain_metric, heading_of, word_of
from harness.measure.bundled import register_meters
from harness.method import FAMILIES
from harness.metric_words import METRIC_WORDS
from harness.records import Status

ROOTS = [Path(package.__path__[0]) for package in (harness, harness_plugins)]
RECORDING = {
    "Record",
    "record",
    "_record",
    "_energy_record",
    "_throughput",
    "_achieved",
    "record_from_samples",
}
HOSTILE = "<img src=x onerror=alert(1)> [link](javascript:alert(1))"


def text_of(node):
    """A string with ``*`` for what is only known when it runs; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "*" for part in node.values)
    if isinstance(node, ast.BinOp):
        return f"{text_of(node.left) or '*'}{text_of(node.right) or '*'}"
    return None


@cache
def recorded_names():
    """Every name under which the source records a value."""
    found = set()
    for path in (path for root in ROOTS for path in root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in RECORDING:
                texts = node.args if called == "_achieved" else node.args[:1]
                found |= {text for each in texts if (text := text_of(each))}
    return sorted(name for name in found if re.fullmatch(r"[a-z0-9_*]*[a-z0-9_][a-z0-9_*]*", name))


def test_the_names_are_found():
    names = recorded_names()
    assert {"weight_bytes", "*_peak_bytes", "gptq_relative_error", "decode_mbu", "choice_kl"} <= set(names)
    assert len(names) > 90


def test_whatever_is_recorded_has_a_sentence():
    def example(name):
        # A metric's own name before an ending, nothing (no filter) after it.
        return re.sub(r"\*$", "", re.sub(r"^\*", "acc_difference", name)).replace("*", "x")

    missing = [name for name in recorded_names() if word_of(example(name)) is None]
    assert missing == [], "harness/metric_words.py says nothing on these"


def test_whatever_tasks_and_meters_name_has_a_sentence():
    tasks = [path.read_text() for path in ROOTS[0].rglob("evaluate/tasks/*.yaml")]
    listed = {name for text in tasks for name in re.findall(r"- metric: *(\S+)", text)}
    assert len(listed) > 10
    names = {*listed, *metrics._KNOWN, *LEADING, *COUNTED}
    names |= {derived for name in names if (derived := difference_name(name))}
    names |= {meter.name for meter in register_meters()} - {"speedups"}
    names |= {f"{phase}_speedup" for phase in ("prefill", "decode", "end_to_end")}
    assert [name for name in sorted(names) if word_of(name) is None] == []


def test_filters_and_subtasks_do_not_matter():
    assert word_of("exact_match,strict-match") == word_of("exact_match")
    assert word_of("acc/mmlu_anatomy") == word_of("acc")
    assert word_of("exact_match_difference,strict-match") == word_of("acc_difference")


def test_a_longer_pattern_wins():
    assert word_of("acc_flips") != word_of("acc_norm_x")
    assert word_of("decode_read_bytes") != word_of("load_read_bytes")
    assert word_of("prefill_kv_cache_bytes") == METRIC_WORDS["*_kv_cache_bytes"]
    assert word_of("acc_p") == METRIC_WORDS["*_p"]
    assert word_of("acc_difference") == METRIC_WORDS["*_difference"]
    assert word_of("acc_detectable") == METRIC_WORDS["*_detectable"]


def test_sentences_are_sentences():
    for text in (*METRIC_WORDS.values(), *COLUMNS.values()):
        assert text.endswith("."), text
        assert text[0].isupper() or text.startswith(("exp ", "p-value ")), text
        assert "\n" not in text
        assert "<" not in text


def test_every_word_of_a_fixed_list_is_explained():
    assert set(VALUES["status"]) == set(Status)
    assert tuple(VALUES["family"]) == FAMILIES
    assert set(VALUES["marks"]) == {"simulated", "synthetic", "imported"}


@pytest.mark.parametrize(
    ("unit", "value"),
    [("s", 0.002), ("s", 2.0), ("s", 2e-6), ("B", 3.0), ("B", 5e9), ("B/token", 6144.0), ("fraction", 0.5),
     ("tokens/s", 5.0), ("J/token", 1.0), ("B/s", 1e9)],
)  # fmt: skip
def test_the_direction_survives_the_change_of_units(unit, value):
    """A heading's direction is found by its shown unit; it must be that of the stored one."""
    _, shown = scale(unit, [value])
    for metric in ("weight_bytes", "acc", "decode_mbu", "control_latency"):
        heading = heading_of(f"{metric} · b1-p512-g64 [{shown}]")
        assert heading.direction == better(metric, unit, "scenario"), (metric, unit, shown)


@pytest.mark.parametrize(
    ("column", "arrow"),
    [
        ("acc · hellaswag [%]", "↑"),
        ("token_perplexity · wikitext [ppl]", "↓"),
        ("decode_throughput · b8-p512-g64 [tokens/s]", "↑"),
        ("transform_s [s]", "↓"),
        ("compression_ratio [x]", "↑"),
        ("parameters", ""),
        ("trained_tokens [tokens]", "↓"),
        ("trained_steps [steps]", "↓"),
        ("attention_reach [tokens]", ""),
        ("rewound_to_step [steps]", ""),
        ("model", ""),
        ("value / baseline", ""),
        ("difference [95 %]", ""),
        ("of-a-plugin · b1-p1-g1 [ms]", ""),
        ("[x]", ""),
        ("", ""),
    ],
)
def test_arrows(column, arrow):
    assert heading_of(column).arrow == arrow


def test_a_metric_is_told_with_unit_and_direction():
    told = explain_metric("decode_latency · b1-p512-g64 [ms]")
    assert told.startswith("Time of one step")
    assert told.endswith("In ms. Lower is better.")
    assert explain_metric("parameters") == "Number of parameters."
    assert explain_metric("of-a-plugin") is None


def test_cells_are_explained_where_they_are_words_of_a_list():
    told = explain("status", ["ok", "oom", "ok"])
    assert "- *oom*: it ran out of memory" in told
    assert told.count("*ok*") == 1
    assert "timeout" not in told
    assert "*simulated*" in explain("marks", ["", "simulated, synthetic"])
    assert "*imported*" in explain("marks", ["simulated, imported"])
    assert "*crashed*" in explain("cells", ["3 ok, 1 crashed"])
    assert "*acc*: Share of the items" in explain("metric", ["acc · hellaswag", "of-a-plugin"])


@pytest.mark.parametrize("column", [*COLUMNS, "acc · hellaswag [%]"])
def test_no_text_of_a_store_gets_into_an_explanation(column):
    cells = [HOSTILE, f"acc_{HOSTILE} · x", f"acc/{HOSTILE}", f"ok {HOSTILE}", f"{HOSTILE}_p"]
    told = explain(column, cells)
    assert "javascript" not in told
    assert "<img" not in told
    assert explain(f"{HOSTILE} [{HOSTILE}]") is None
    assert HOSTILE not in str(explain_metric(f"acc · {HOSTILE} [{HOSTILE}]"))
