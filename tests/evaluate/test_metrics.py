"""Names, units and directions."""

from __future__ import annotations

import pytest

from harness.evaluate.metrics import metric_of, record_name


@pytest.mark.parametrize(
    ("record", "unit", "better"),
    [
        ("acc", "fraction", "higher"),
        ("acc_norm", "fraction", "higher"),
        ("acc_agreement_simple", "fraction", "higher"),
        ("acc/mmlu_anatomy", "fraction", "higher"),
        ("exact_match,strict-match", "fraction", "higher"),
        ("acc_flips", "fraction", "lower"),
        ("bits_per_byte", "bits/byte", "lower"),
        ("token_perplexity", "ppl", "lower"),
        ("mean_kl", "nats/token", "lower"),
        ("nll", "nats/token", "lower"),
        ("top1_agreement", "fraction", "higher"),
        ("something_else", "", "higher"),
    ],
)
def test_unit_and_direction(record, unit, better):
    assert metric_of(record) == (unit, better)


def test_names():
    assert record_name("acc", "none") == "acc"
    assert record_name("exact_match", "strict-match") == "exact_match,strict-match"
    assert record_name("acc", "none", "mmlu_anatomy") == "acc/mmlu_anatomy"
    assert record_name("perplexity", "none") == "target_perplexity"
