"""Compiled blocks compute what the model computes, share what was compiled, and leave no trace."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from harness_plugins.quantization.rtn import METHOD as RTN
from torch import nn

from harness.kernels import decode_attention, dense
from harness.kernels.rewriting import rewrite_linears
from harness.kernels.rewriting_attention import rewrite_decode_attention
from harness.measure import compiling, graphs
from harness.measure.agreement import LARGEST, Agreement, distance, perturbed
from harness.measure.compiling import _options, broken_graphs, compile_problem, compiled
from harness.measure.generation import Generation, forward_only, random_prompt
from harness.nn.anatomy import blocks_of
from harness.testing import make_context
from tests.measure.models import tiny_grouped, tiny_mistral, vivid

CPU = torch.device("cpu")


class Counting:
    """A backend that rewrites as the real one does, runs the graph as it is, and counts."""

    def __init__(self) -> None:
        self.graphs = 0
        self.rewritten = 0
        self.attended = 0

    def __call__(self, module, _inputs):
        self.graphs += 1
        self.rewritten += rewrite_linears(module)
        self.attended += rewrite_decode_attention(module)
        return module.forward


@pytest.fixture(autouse=True)
def with_triton(monkeypatch):
    for module in (dense, decode_attention):
        monkeypatch.setattr(module, "has_triton", lambda device: True)
        monkeypatch.setattr(module, "_runs", lambda *_: False)
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["tiny_llama", "tiny_opt", "tiny_gpt2", "grouped", "mistral", "w4a16", "w8a8"])
def decoder(request):
    if request.param == "grouped":
        return tiny_grouped(2)
    if request.param == "mistral":
        return tiny_mistral(8)
    if request.param in ("w4a16", "w8a8"):
        model = request.getfixturevalue("tiny_llama")
        written = {"bits": 4, "group_size": 32} if request.param == "w4a16" else {"bits": 8, "a_bits": 8}
        return RTN.transform(model, RTN.options.model_validate(written), make_context(model)).eval()
    return vivid(request.getfixturevalue(request.param))


def logits_of(generation: Generation) -> torch.Tensor:
    generation.reset()
    return torch.cat([generation.prefill().clone(), *(generation.step().clone() for _ in range(4))])


def test_compiled_blocks_compute_the_same_and_are_traced_once(decoder):
    generation = Generation(decoder, random_prompt(256, 1, 12, 5, CPU), 6)
    plain = logits_of(generation)
    torch._dynamo.utils.counters.clear()
    backend = Counting()
    with compiled(decoder, backend):
        torch.testing.assert_close(logits_of(generation), plain, rtol=1e-4, atol=1e-4)
    # One graph of a block and one of the head for the prefill, and the same for the step, whatever
    # the number of blocks.
    assert len(blocks_of(decoder)) > 1
    assert backend.graphs == 4
    assert backend.attended == 1  # in the graph of the step
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch.equal(logits_of(generation), plain)


def test_the_step_of_a_dense_model_runs_the_kernel_for_few_rows(tiny_llama):
    generation = Generation(tiny_llama, random_prompt(256, 1, 12, 5, CPU), 6)
    backend = Counting()
    with compiled(tiny_llama, backend):
        logits_of(generation)
    # The step: seven products of a block and the head. The prefill: the head, for the last position.
    assert backend.rewritten == 9


def test_a_block_that_the_compiler_cannot_follow_says_so(tiny_llama, monkeypatch):
    generation = Generation(tiny_llama, random_prompt(256, 1, 12, 5, CPU), 6)
    plain, whole = logits_of(generation), Counting()
    with compiled(tiny_llama, whole):
        logits_of(generation)
        assert broken_graphs() is None
    mlp = type(tiny_llama.model.layers[0].mlp)
    forward = mlp.forward

    def in_two(self, x):
        torch._dynamo.graph_break("a wall")
        return forward(self, x)

    monkeypatch.setattr(mlp, "forward", in_two)
    backend = Counting()
    with compiled(tiny_llama, backend):
        torch.testing.assert_close(logits_of(generation), plain, rtol=1e-4, atol=1e-4)
        found = broken_graphs()
    assert backend.graphs > whole.graphs
    assert re.fullmatch(r"compiled in pieces: dynamo broke off (once|\d+ times), first at: .*[^\s.]", found)
    with compiled(tiny_llama, Counting()):
        assert broken_graphs() is None, "of the model before"


def test_calls_that_are_compiled_in_pieces_are_used_and_say_so(tiny_llama, monkeypatch):
    call = graphs.Call(lambda: torch.zeros(1), "graph")
    monkeypatch.setattr(compiling, "broken_graphs", lambda: "compiled in pieces: why")
    [found], problem = graphs._compiled_calls(tiny_llama, lambda: (call,), lambda _: None)
    assert (found.mode, found.note, problem) == ("compiled", "compiled in pieces: why", None)


def test_nothing_stays_behind(tiny_llama):
    before = {name: type(module) for name, module in tiny_llama.named_modules()}

    def interrupted():
        with compiled(tiny_llama, Counting()):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {name: type(module) for name, module in tiny_llama.named_modules()} == before
    assert all(module._compiled_call_impl is None for module in tiny_llama.modules())


def test_unknown_architectures_and_compiled_models_say_so():
    assert "not compiled: " in compile_problem(nn.Linear(2, 2))
    wrapped = nn.Linear(2, 2)
    wrapped._orig_mod = nn.Linear(2, 2)  # what torch.compile leaves
    assert compile_problem(wrapped) == "the method compiled the model itself"


def test_a_compiler_that_fails_is_a_reason_and_not_an_error(tiny_llama):
    def broken():
        raise torch._dynamo.exc.BackendCompilerFailed(lambda: None, ValueError("no such thing"), None)

    calls, problem = graphs._compiled_calls(tiny_llama, broken, lambda _: None)
    assert calls is None
    assert problem == "compilation failed: no such thing"


def test_compiled_calls_that_compute_something_else_are_not_used(tiny_llama):
    call = graphs.Call(lambda: torch.zeros(1), "graph")
    assert graphs._compiled_calls(tiny_llama, lambda: (call,), lambda _: "differ") == (None, "differ")
    calls, problem = graphs._compiled_calls(tiny_llama, lambda: (call,), lambda _: None)
    assert [call.mode for call in calls] == ["compiled"]
    assert problem is None


def test_a_capture_that_fails_is_the_reason(tiny_llama):
    call = graphs.Call(lambda: torch.zeros(1), "eager", "cannot be captured: .item()")
    calls, problem = graphs._compiled_calls(tiny_llama, lambda: (call,), lambda _: None)
    assert (calls, problem) == (None, "cannot be captured: .item()")


# --- agreement ----------------------------------------------------------------------------------------


def test_distances_are_relative_and_nan_is_infinitely_far():
    ones = torch.ones(4)
    assert distance([ones, ones], [ones, ones * 1.1]) == pytest.approx(0.1, rel=1e-4)
    assert distance([ones], [ones * float("nan")]) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_agrees_and_another_function_does_not(tiny_llama, dtype):
    model = vivid(tiny_llama).to(dtype)
    tokens = random_prompt(256, 2, 12, 5, CPU)

    def outputs() -> list[torch.Tensor]:
        return [forward_only(model, tokens)]

    check = Agreement(model, outputs)
    assert check.problem(outputs()) is None
    # Rounded elsewhere: the same weights in double precision, results rounded once.
    exact = forward_only(copy.deepcopy(model).double(), tokens).to(dtype)
    assert check.problem([exact]) is None
    blocks_of(model)[0][1].mlp.down_proj.weight.data *= 1.5
    assert check.problem(outputs()).startswith("compiled outputs differ from eager ones by ")


def test_a_model_that_amplifies_rounding_is_allowed_more(tiny_llama):
    tokens = random_prompt(256, 2, 12, 5, CPU)

    def allowed(model) -> float:
        return Agreement(model, lambda: [forward_only(model, tokens)]).allowed

    steep = copy.deepcopy(vivid(tiny_llama))
    for _, block in blocks_of(steep):
        block.register_forward_hook(lambda _module, _args, out: out + 0.5 * torch.sign(torch.sin(300 * out)))
    assert allowed(vivid(tiny_llama).bfloat16()) < allowed(steep.bfloat16()) <= LARGEST


def test_the_hooks_of_the_check_are_gone_afterwards(tiny_llama):
    with perturbed(tiny_llama):
        assert any(module._forward_pre_hooks for module in tiny_llama.modules())
    assert not any(module._forward_pre_hooks for module in tiny_llama.modules())


def test_blocks_that_each_need_their_own_code_are_a_reason(tiny_llama, monkeypatch):
    monkeypatch.setattr("harness.measure.compiling._rewritten_inductor", Counting())
    layers = [copy.deepcopy(blocks_of(tiny_llama)[0][1]) for _ in range(10)]
    tiny_llama.model.layers = nn.ModuleList(layers)
    tiny_llama.config.num_hidden_layers = len(layers)
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
        layer.mlp.number = number
        plain = layer.mlp.forward
        layer.mlp.forward = lambda x, mlp=layer.mlp, plain=plain: plain(x) * (1 + mlp.number)
    generation = Generation(tiny_llama, random_prompt(256, 1, 4, 5, CPU), 2)

    def prepare():
        generation.prefill()
        return ()

    calls, problem = graphs._compiled_calls(tiny_llama, prepare, lambda _: None)
    assert calls is None
    assert problem == "not compiled: more blocks than the compiler's limit need code of their own"


def test_small_kernels_share_launches_on_cuda_only():
    on_cuda = type("Value", (), {"is_cuda": True})()
    assert _options([2, torch.ones(1)]) == {"combo_kernels": False}
    assert _options([torch.ones(1), on_cuda]) == {"combo_kernels": True}
