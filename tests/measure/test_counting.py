"""What layers count while they run."""

from __future__ import annotations

import torch
from torch import nn

from harness.measure.counting import count_records, reset_counters
from harness.nn.outlier_int8 import OutlierInt8Linear


def test_a_model_that_counts_nothing_has_no_records():
    model = nn.Sequential(nn.Linear(4, 4))
    reset_counters(model)
    assert count_records(model) == ()


def test_counts_of_all_layers_are_added_up():
    model = nn.Sequential(
        OutlierInt8Linear.from_float(torch.zeros(8, 16)), OutlierInt8Linear.from_float(torch.zeros(8, 8))
    )
    x = torch.zeros(3, 16)
    x[1, 2] = 7.0
    model(x)
    share, beyond = count_records(model)
    assert (share.metric, share.value) == ("outlier_column_share", 1 / 24)
    assert "of 24 columns in all calls, 1 reached" in share.note
    assert (beyond.value, beyond.unit) == (0, "columns")
    reset_counters(model)
    assert [record.value for record in count_records(model)] == [0, 0]
