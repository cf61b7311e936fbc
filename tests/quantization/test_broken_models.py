"""Models with NaN, with nothing to calibrate on, or with layers that are zero: a reason or a right result."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.errors import NumericalFailure
from harness.nn.surgery import block_linears
from harness.plugins import load_plugins
from harness.testing.making import make_context
from harness.testing.models import tiny_model

QUANTIZERS = {name: each for name, each in load_plugins().methods.items() if each.family == "quantization"}
FITTING = {"peg": {"groups": 4}, "q-bert": {"n_subsets": 1, "power_iters": 2}, "zeroquant-lkd": {"iters": 4}}
FREE_OF_DATA = {"fp8", "gobo", "hqq", "llm-int8", "nf4", "rtn", "zeroquant"}


def _options(name):
    method = QUANTIZERS[name]
    options = method.options(**FITTING.get(name, {}))
    small = getattr(options, "group_size", -1) > 0
    return method.options(**FITTING.get(name, {}), **({"group_size": 32} if small else {}))


def _transformed(name, model):
    method, options = QUANTIZERS[name], _options(name)
    context = make_context(model)
    assert method.applies is None or method.applies(context.info, options) is None
    return method.transform(model, options, context)


def _model(name):
    return tiny_model("bert" if name == "q-bert" else "llama").eval()


def _first_linear(model):
    return next(linear for _, linear in block_linears(model))


@torch.no_grad()
def _output(model):
    tokens = torch.arange(32)[None]
    output = model(input_ids=tokens)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_weight_that_is_nan_is_never_quantized(name):
    model = _model(name)
    with torch.no_grad():
        _first_linear(model).weight[0, 0] = float("nan")
    with pytest.raises(NumericalFailure, match="NaN"):
        _transformed(name, model)


@pytest.mark.parametrize("name", sorted(QUANTIZERS.keys() - FREE_OF_DATA))
def test_calibration_that_is_nan_is_refused(name):
    model = _model(name)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 3] = float("nan")
    with pytest.raises(NumericalFailure, match=r"NaN|nan"):
        _transformed(name, model)


# The second derivative of a norm does not exist where its input is zero.
@pytest.mark.parametrize("name", sorted(QUANTIZERS.keys() - {"q-bert"}))
def test_a_layer_that_sees_only_zeros_is_quantized_all_the_same(name):
    """Its Hessian is zero, and so is the range of its inputs."""
    model = _model(name)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.zero_()
    assert bool(_output(_transformed(name, model)).isfinite().all())


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_layer_of_zeros_stays_one(name):
    model = _model(name)
    with torch.no_grad():
        _first_linear(model).weight.zero_()
    before = _output(model)
    after = _output(_transformed(name, model))
    assert bool(after.isfinite().all())
    assert float((after - before).norm() / before.norm()) < 0.9
