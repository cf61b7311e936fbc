"""``harness doctor --aa``: the method of measuring, measured."""

from __future__ import annotations

import pytest

from harness.measure import self_comparison


@pytest.fixture
def two_comparisons(monkeypatch):
    whole = self_comparison.compare_with_itself

    def brief(*arguments, **_):
        return whole(*arguments, comparisons=2)

    monkeypatch.setattr(self_comparison, "compare_with_itself", brief)
    monkeypatch.setattr(self_comparison, "ROUNDS_EACH", 6)


@pytest.mark.usefixtures("two_comparisons")
def test_two_identical_baselines_are_timed(harness, monkeypatch):
    monkeypatch.setattr(self_comparison, "LARGEST_DIFFERENCE", 100.0)  # of a busy machine
    ran = harness("doctor", "--format", "json", "--aa", "--model", "shape:llama-15m")
    found = {row["check"]: row for row in ran.rows if row["check"].startswith("A/A")}
    assert set(found) == {"A/A prefill", "A/A decode", "A/A end_to_end"}
    assert all("2 intervals cover 1" in row["what"] for row in found.values())


@pytest.mark.usefixtures("two_comparisons")
def test_a_difference_is_broken_and_exits_with_one(harness, monkeypatch):
    monkeypatch.setattr(self_comparison, "LARGEST_DIFFERENCE", 0.0)
    ran = harness("doctor", "--format", "json", "--aa", "--model", "shape:llama-15m")
    assert ran.code == 1
    broken = [row for row in ran.rows if row["check"].startswith("A/A") and row["state"] == "broken"]
    assert any("two identical models differ by" in row["what"] for row in broken)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "zoo:llama-6m"], "--model says what --aa times: give --aa too"),
        (["--aa", "--model", "zoo:llama-7m"], "llama-6m"),
        (["--aa", "--model", "shape:bert-base"], "--aa times a decoder"),
    ],
)
def test_bad_input_is_one_line(harness, arguments, message):
    ran = harness("doctor", *arguments)
    assert ran.code == 2
    assert message in ran.err
    assert "Traceback" not in ran.err
