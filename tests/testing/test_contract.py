"""The contract catches what it says it catches: one broken method for each clause."""

from __future__ import annotations

import copy
import os
import random
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from harness import Method, NotApplicable, Options, Paper
from harness.errors import UnknownName
from harness.nn.surgery import block_linears, replace_linears
from harness.testing import (
    TINY_FAMILIES,
    TinyTokenizer,
    check_method,
    make_context,
    tiny_model,
    unchanged_globals,
)


class NoOptions(Options):
    pass


class Factor(Options):
    factor: float = 0.9


def _scale(model, options, context):
    with torch.no_grad():
        for _, linear in block_linears(model):
            linear.weight.mul_(getattr(options, "factor", 0.9))
    return model


def _method(transform=_scale, **changes):
    return Method(**{"name": "scale", "options": Factor, "transform": transform, **changes})


def test_a_good_method_passes_on_every_family():
    report = check_method(_method())
    assert report.checked == TINY_FAMILIES
    assert report.skipped == {}


def test_a_given_model_is_used_and_another_family_is_not():
    report = check_method(_method(), model=lambda: tiny_model("opt", layers=1))
    assert report.checked == ("the given model",)
    assert check_method(_method(), model="gpt2").checked == ("gpt2",)


def test_reasons_become_skips():
    def only_llama(info, _options):
        return None if info.family == "llama" else "needs rotary positions"

    report = check_method(_method(applies=only_llama))
    assert report.checked == ("llama",)
    assert set(report.skipped.values()) == {"needs rotary positions"}
    report = check_method(_method(needs=("encoder",)))
    assert report.checked == ("bert", "encoder")

    def refuse_gpt2(model, options, context):
        if context.info.family == "gpt2":
            raise NotApplicable("not GPT-2")
        return _scale(model, options, context)

    assert check_method(_method(refuse_gpt2)).skipped == {"gpt2": "not GPT-2"}


# --- one broken method for each clause ------------------------------------------------------------


def _nothing(model, _options, _context):
    return model


def _returns_none(model, _options, _context):
    _scale(model, None, None)


def _leaves_training_mode(model, options, context):
    return _scale(model, options, context).train()


def _not_a_number(model, options, context):
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(float("nan"))
    return model


def _draws_from_torch(model, options, context):
    torch.rand(1)
    return _scale(model, options, context)


def _draws_from_numpy(model, options, context):
    np.random.rand(1)
    return _scale(model, options, context)


def _draws_from_python(model, options, context):
    random.random()
    return _scale(model, options, context)


def _turns_gradients_off(model, options, context):
    torch.set_grad_enabled(False)
    return _scale(model, options, context)


def _changes_the_default_type(model, options, context):
    torch.set_default_dtype(torch.float64)
    return _scale(model, options, context)


def _writes_the_environment(model, options, context):
    os.environ["SCALE_METHOD_WAS_HERE"] = "1"
    return _scale(model, options, context)


def _patches_linear(model, options, context):
    original = nn.Linear.forward
    nn.Linear.forward = lambda self, x: original(self, x)
    return _scale(model, options, context)


def _replaces_attention_of_everyone(model, options, context):
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("sdpa", lambda *a, **k: sdpa_attention_forward(*a, **k))
    return _scale(model, options, context)


def _differs_from_run_to_run(model, options, context):
    _differs_from_run_to_run.runs += 1
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1e-3 * _differs_from_run_to_run.runs)
    return model


_differs_from_run_to_run.runs = 0


class _HiddenState(nn.Module):
    """Computes with a tensor that its state does not hold."""

    def __init__(self, linear):
        super().__init__()
        self.weight = linear.weight
        self.hidden = linear.weight.detach() * 0.9
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.hidden + 0 * self.weight, self.bias)


class _WithoutState(_HiddenState):
    def __init__(self, linear):
        super().__init__(linear)
        del self.weight
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return nn.functional.linear(x, self.hidden * (0.9 + 0 * self.factor), self.bias)

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self.hidden = torch.zeros_like(self.hidden)


class _Plain(nn.Module):
    """Holds its weight in bfloat16 where neither a checkpoint nor a size sees it."""

    def __init__(self, linear):
        super().__init__()
        self.hidden = linear.weight.detach().to(torch.bfloat16)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.hidden.to(x.dtype), self.bias)


def test_weights_in_plain_attributes_are_no_state():
    def hide(model, _options, _context):
        return replace_linears(model, lambda _name, linear: _Plain(linear))

    with pytest.raises(AssertionError, match="saved and loaded"):
        check_method(_method(hide, family="quantization"), model="llama")


def test_options_without_a_default_are_refused():
    class Required(Options):
        path: str

    with pytest.raises(AssertionError, match=r"named without options, and \['path'\] have no default"):
        check_method(_method(options=Required), model="llama", options={"path": "x"})


def _forgets_its_state(model, _options, _context):
    return replace_linears(model, lambda _name, linear: _WithoutState(linear))


class _Counting(_HiddenState):
    """Changes a little with every call, as a router's noise or a running average left on would."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 + 1e-3 * self.calls)


def _remembers_its_calls(model, _options, _context):
    return replace_linears(model, lambda _name, linear: _Counting(linear))


def _drifts_away(model, _options, _context):
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(-30)
    return model


def _calibrates_in_silence(model, _options, context):
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1e-6 * context.calibration().numel())
    return model


def _trains_in_silence(model, _options, context):
    context.train(model, steps=1)
    return model


BROKEN = {
    "uses calibration and does not say so": _calibrates_in_silence,
    "uses training and does not say so": _trains_in_silence,
    "changed nothing": _nothing,
    "must return the model": _returns_none,
    "training mode": _leaves_training_mode,
    "torch's random state": _draws_from_torch,
    "NumPy's random state": _draws_from_numpy,
    "Python's random state": _draws_from_python,
    "the gradient mode": _turns_gradients_off,
    "the default dtype": _changes_the_default_type,
    "the environment": _writes_the_environment,
    "nn.Linear": _patches_linear,
    "attention function 'sdpa'": _replaces_attention_of_everyone,
    "a second run": _differs_from_run_to_run,
    "saved and loaded": _forgets_its_state,
    "twice gives two outputs": _remembers_its_calls,
    "drifts": _drifts_away,
    "not finite": _not_a_number,
}


@pytest.fixture
def _restore():
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attention, forward = ALL_ATTENTION_FUNCTIONS["sdpa"], nn.Linear.forward
    yield
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    os.environ.pop("SCALE_METHOD_WAS_HERE", None)
    nn.Linear.forward = forward
    AttentionInterface.register("sdpa", attention)


@pytest.mark.usefixtures("_restore")
@pytest.mark.parametrize("clause", BROKEN)
def test_broken_methods_are_caught(clause):
    with pytest.raises(AssertionError, match=clause):
        check_method(_method(BROKEN[clause]), model="llama", max_drift=1.0)


def test_architectural_and_trained_methods_may_drift():
    assert check_method(_method(_drifts_away, architectural=True), model="llama").checked
    assert check_method(_method(_drifts_away, needs=("training",)), model="llama").checked


def test_drift_is_measured_at_the_mildest_options():
    class Sparse(Options):
        sparsity: float = 0.999

    def prune(model, options, _context):
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1 - 40 * options.sparsity)
        return model

    method = _method(prune, options=Sparse)
    with pytest.raises(AssertionError, match="drifts"):
        check_method(method, model="opt", max_drift=0.01)
    assert check_method(method, model="opt", max_drift=5.0).checked


def test_a_quantization_must_store_fewer_bytes():
    assert_bytes = _method(family="quantization")
    with pytest.raises(AssertionError, match="bytes"):
        check_method(assert_bytes, model="llama")

    class Half(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.register_buffer("weight", linear.weight.detach().to(torch.bfloat16))
            self.bias = linear.bias

        def forward(self, x):
            return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)

    def halve(model, _options, _context):
        return replace_linears(model, lambda _name, linear: Half(linear))

    assert check_method(_method(halve, family="quantization"), model="llama").checked


def test_the_baseline_must_change_nothing():
    assert check_method(_method(_nothing, family="baseline")).checked == TINY_FAMILIES
    with pytest.raises(AssertionError, match="baseline changed"):
        check_method(_method(family="baseline"), model="llama")


def test_a_method_that_fits_nothing_is_caught():
    with pytest.raises(AssertionError, match="fits none"):
        check_method(_method(applies=lambda _info, _options: "never"))
    with pytest.raises(AssertionError, match="None or a reason"):
        check_method(_method(applies=lambda _info, _options: False))


def test_a_method_for_untrained_models_alone_is_checked_on_those():
    seen = []

    def transform(model, options, context):
        seen.append((context.info.scratch, context.load_teacher is None))
        return _scale(model, options, context)

    def applies(info, _options):
        return None if info.scratch else "only untrained"

    report = check_method(_method(transform, applies=applies, trains_scratch=True))
    assert report.checked == TINY_FAMILIES
    assert set(seen) == {(True, True)}
    with pytest.raises(AssertionError, match="fits none"):
        check_method(_method(transform, applies=applies))
    seen.clear()
    check_method(_method(transform, trains_scratch=True))  # where it fits both, on trained ones
    assert set(seen) == {(False, False)}


def test_options_must_be_optional_and_survive_json():
    class Forgetful(Options):
        factor: float = 0.9

        def canonical(self):
            return {"factor": self.factor + 1}

    with pytest.raises(AssertionError, match="JSON"):
        check_method(_method(options=Forgetful))

    class Lenient(Options):
        @classmethod
        def parse(cls, values, *, method=""):
            return cls()

    with pytest.raises(AssertionError, match="unknown option"):
        check_method(_method(options=Lenient))


CARD = """Scales weights.

Paper: Scaling. A. Author, 2020, arXiv:2001.00001.

Knobs: `factor`.
"""


@pytest.mark.parametrize(
    ("card", "changes", "problem"),
    [
        (CARD, {"family": "other"}, "family"),
        (CARD, {"paper": "A. Author (2020)"}, "harness.Paper"),
        (CARD.replace("2020", "long ago"), {}, "year"),
        (CARD.replace("2001.00001", "yes"), {}, "arXiv"),
        (CARD.replace("factor", "none"), {}, "factor"),
        (CARD.replace("weights.", "weights"), {}, "sentence"),
    ],
)
def test_the_card_of_a_bundled_method_is_complete(monkeypatch, card, changes, problem):
    module = types.ModuleType("harness_plugins.scale_for_this_test", card)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    transform = types.FunctionType(_scale.__code__, {**globals(), "__name__": module.__name__})
    transform.__module__ = module.__name__
    paper = Paper("Scaling", "A. Author", 2020, "2001.00001")
    whole = _method(transform, family="pruning", paper=paper)
    if card == CARD:
        assert check_method(whole, model="llama").checked
    module.__doc__ = card
    broken = _method(transform, **{"family": "pruning", "paper": paper, **changes})
    with pytest.raises(AssertionError, match=problem):
        check_method(broken, model="llama")


# --- the tools ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_tiny_models_are_the_same_each_time_and_leave_the_generator_alone(family):
    state = torch.get_rng_state()
    first, again, other = tiny_model(family), tiny_model(family), tiny_model(family, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not first.training
    name, tensor = next(iter(first.state_dict().items()))
    assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(tensor, other.state_dict()[name])
    assert not any(type(module).__name__ == "Conv1D" for module in first.modules())


def test_an_unknown_family_is_named():
    with pytest.raises(UnknownName, match="llama"):
        tiny_model("lama")


def test_the_context_is_real():
    model = tiny_model("llama")
    context = make_context(model, seed=3)
    assert context.calibration().shape == (8, 32)
    assert torch.equal(context.calibration(), context.calibration())
    assert len(list(context.blocks(model))) == 2
    teacher = context.teacher()
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    assert teacher.get_input_embeddings().weight.abs().sum() > 0
    calls = []
    assert not context.is_cached({"what": 1})
    for _ in range(2):
        context.cache({"what": 1}, lambda: calls.append(1) or torch.ones(2))
    assert len(calls) == 1
    assert context.is_cached({"what": 1})
    assert not context.is_cached({"what": 2})


def test_given_tokens_are_what_the_context_draws():
    model = tiny_model("opt")
    ids = torch.arange(200)
    windows = make_context(model, tokens=ids).calibration(4, 10)
    assert (windows.diff(dim=1) == 1).all()
    assert make_context(model, has_teacher=False).load_teacher is None
    with pytest.raises(NotApplicable):
        make_context(model, has_teacher=False).teacher()


def test_the_cache_of_a_context_goes_away_with_it():
    context = make_context(tiny_model("llama"))
    context.cache({"what": 1}, lambda: torch.ones(2))
    directory = context.cache_store.directory
    assert directory.exists()
    del context
    assert not directory.exists()


def test_unchanged_globals_lets_new_attention_names_pass():
    from transformers import AttentionInterface

    name = "harness_testing_new_name"
    with unchanged_globals("a test"):
        AttentionInterface.register(name, lambda *_args, **_kwargs: None)
    del AttentionInterface._global_mapping[name]
    threads = torch.get_num_threads()
    message = "a test changed the process: the number of threads"
    with pytest.raises(AssertionError, match=message), unchanged_globals("a test"):
        torch.set_num_threads(threads + 1)
    torch.set_num_threads(threads)


def test_the_tiny_tokenizer_names_special_tokens():
    assert TinyTokenizer.mask_token_id in TinyTokenizer.all_special_ids
    assert copy.copy(TinyTokenizer()).vocab_size == 256
