"""LLM.int8() run with its outlier threshold at zero: a knob that is set and does nothing.

Two guards hold for every method: a variant that changes nothing is `no_effect` and never a result, and an
option changes what comes out.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from harness import Method, Options
from harness.chain import parse_chain
from harness.measure.effect import measure_effect, snapshot
from harness.nn.surgery import block_linears
from harness.plugins import load_plugins
from harness.testing import make_context

METHODS = dict(load_plugins().methods)

# Two values of the options that decide the most, where both must give different models.
KNOBS = [
    ("rtn:group_size=32", "bits", 4, 3),
    ("rtn", "group_size", 32, -1),
    ("rtn:bits=8:group_size=-1", "a_bits", 8, 16),
    ("gptq:group_size=32", "bits", 4, 3),
    ("gptq", "group_size", 32, -1),
    ("smoothquant", "alpha", 0.5, 0.9),
    ("llm-int8", "threshold", 0.5, 1e9),
    ("fp8", "fmt", "e4m3", "e5m2"),
    ("fp8", "w_gran", "per-channel", "per-tensor"),
    ("fp8", "a_gran", "per-token", "per-tensor-dynamic"),
    ("magnitude-prune", "sparsity", 0.5, 0.6),
    ("magnitude-prune", "scope", "layer", "row"),
    ("nm-prune", "n", 2, 1),
    ("nm-prune:n=4:m=8", "score", "magnitude", "wanda"),
    ("channel-permute:strategy=channel-swap:bounded_regressions=0:max_rows=8", "prune", True, False),
    ("sr-ste:steps=3", "lambda_w", 0, 100),
    ("sr-ste:steps=3:lambda_w=100", "decay", "coupled", "decoupled"),
    ("block-local", "window", 8, 16),
    ("gqa", "groups", 2, 1),
]


def output(method: Method, model: nn.Module, **values) -> torch.Tensor:
    made = copy.deepcopy(model)
    options = method.options.parse(values, method=method.name)
    made = method.transform(made, options, make_context(made)).eval()
    tokens = torch.randint(0, 256, (1, 48), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return made(input_ids=tokens).logits


def is_alive(method: Method, model: nn.Module, option: str, *values, **others) -> bool:
    """Whether an option changes what the transformed model answers."""
    answers = [output(method, model, **{**others, option: value}) for value in values]
    return any(not torch.equal(answers[0], other) for other in answers[1:])


@pytest.mark.parametrize(("written", "option", "one", "other"), KNOBS)
def test_the_knobs_of_bundled_methods_turn_something(tiny_llama, written, option, one, other):
    (step,) = parse_chain(written, METHODS).steps
    assert is_alive(step.method, tiny_llama, option, one, other, **step.options.non_default())


class ThresholdOptions(Options):
    threshold: float = 6.0


def outlier_method(*, ignores_threshold: bool) -> Method:
    """Weights to eight bits but for the columns beyond the threshold, which a broken one sets to zero."""

    @torch.no_grad()
    def transform(model, options, context):
        threshold = 0.0 if ignores_threshold else options.threshold
        for _, linear in block_linears(model):
            weight = linear.weight
            keep = weight.abs().amax(0) * 100 > threshold  # [in]
            scale = weight.abs().amax(1, keepdim=True) / 127
            weight.copy_(torch.where(keep, weight, (weight / scale).round() * scale))
        return model

    return Method(name="outliers", options=ThresholdOptions, transform=transform)


def test_a_threshold_that_is_not_passed_on_is_found(tiny_llama):
    values = (0.01, 6.0, 1e9)
    assert is_alive(outlier_method(ignores_threshold=False), tiny_llama, "threshold", *values)
    assert not is_alive(outlier_method(ignores_threshold=True), tiny_llama, "threshold", *values)


# Of |x| unless said otherwise: at 1e9 nothing is an outlier, at 0.01 nearly everything.
THRESHOLDS = {"gobo": (-1.0, -8.0)}  # logarithms of a density


def test_every_method_with_a_threshold_uses_it(tiny_llama):
    """Also those that are not written yet."""
    methods = [*METHODS.values(), outlier_method(ignores_threshold=False)]
    having = [method for method in methods if "threshold" in method.options.model_fields]
    if not torch.cuda.is_available():
        having = [method for method in having if "cuda" not in method.needs_of(method.options())]
    assert len(having) >= 3
    dead = [
        each.name
        for each in having
        if not is_alive(each, tiny_llama, "threshold", *THRESHOLDS.get(each.name, (0.01, 1e9)))
    ]
    assert dead == []


def test_a_method_that_leaves_everything_as_it_was_has_no_effect(tiny_llama):
    # With the threshold at zero every column is an outlier: nothing is quantized, and it is noticed.
    before = snapshot(tiny_llama)
    method = outlier_method(ignores_threshold=True)
    made = method.transform(copy.deepcopy(tiny_llama), ThresholdOptions(), make_context(tiny_llama))
    assert not measure_effect(before, made).changed
    working = outlier_method(ignores_threshold=False)
    made = working.transform(copy.deepcopy(tiny_llama), ThresholdOptions(), make_context(tiny_llama))
    assert measure_effect(before, made).changed
