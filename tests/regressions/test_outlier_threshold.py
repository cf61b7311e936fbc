"""LLM.int8() timed and scored with its outlier threshold silently at zero: the real method, on the real path.

At zero every column is an outlier: nothing is ever multiplied in int8, quality looks perfect and speed
terrible, and both are numbers of another method.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from harness.chain import parse_chain
from harness.kernels import int8
from harness.measure.counting import count_records, reset_counters
from harness.nn.outlier_int8 import OutlierInt8Linear
from harness.nn.outliers import inject_outliers
from harness.plugins import load_plugins
from harness.testing import make_context, tiny_model

METHODS = dict(load_plugins().methods)


def made(written: str) -> nn.Module:
    """A model with four planted outlier channels, transformed by a method as it is written."""
    (step,) = parse_chain(written, METHODS).steps
    model = inject_outliers(tiny_model("llama"), k=64.0, channels=4)
    model = step.method.transform(model, step.options, make_context(model))
    assert isinstance(model, nn.Module)
    return model


def run(model: nn.Module, monkeypatch) -> tuple[float, float, float]:
    """The share of outlier columns, the share of int8 codes that are not zero, and the logits' norm."""
    nonzero, total = 0, 0
    multiply = int8.linear

    def watched(x, *args, **kwargs):
        nonlocal nonzero, total
        nonzero, total = nonzero + int(x.count_nonzero()), total + x.numel()
        return multiply(x, *args, **kwargs)

    monkeypatch.setattr(int8, "linear", watched)
    reset_counters(model)
    tokens = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model(input_ids=tokens).logits
    return count_records(model)[0].value, nonzero / total, float(logits.norm())


@pytest.mark.parametrize("outlier_weight", ["dequant", "fp16-cached"])
def test_by_default_few_columns_are_outliers_and_the_rest_is_int8(monkeypatch, outlier_weight):
    model = made(f"llm-int8:outlier_weight={outlier_weight}")
    layers = [module for module in model.modules() if isinstance(module, OutlierInt8Linear)]
    assert len(layers) == 14
    assert {layer.threshold for layer in layers} == {6.0}
    share, in_int8, _ = run(model, monkeypatch)
    assert 0 < share < 0.1
    assert in_int8 > 0.9


def test_at_zero_it_is_seen(monkeypatch):
    default, zero = run(made("llm-int8"), monkeypatch), run(made("llm-int8:threshold=0"), monkeypatch)
    assert zero[:2] == (1.0, 0.0), "every column an outlier, nothing left for int8"
    assert zero[2] != default[2]


def test_the_layer_applies_the_threshold_that_it_was_given():
    """Each threshold takes out exactly the columns that reach it: none too few, none too many."""
    x = torch.eye(8)[:, :8] * torch.arange(1.0, 9.0)  # column j reaches j + 1
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    for threshold in (0.5, 3.0, 6.0, 7.5, 9.0):
        layer = OutlierInt8Linear.from_float(weight, threshold=threshold)
        for fixed in (False, True):
            parts = layer.split(x, fixed=fixed)
            taken = (parts.regular == 0).all(0)
            assert taken.tolist() == [j + 1 >= threshold for j in range(8)], (threshold, fixed)
            assert int(parts.found) == int(taken.sum())
    assert torch.allclose(layer(x), functional.linear(x, layer.dequantize()), rtol=1e-2)
