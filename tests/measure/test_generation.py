"""The timed prefill and step compute the model, and never ask the host."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from harness.errors import ConfigError
from harness.measure.generation import Generation, decode_logits_match, forward_only, random_prompt
from harness.measure.graphs import prepare_call, prepare_generation
from harness.measure.known_masks import masks_known_on_host
from harness.measure.static_cache import FixedCache, WindowLayer, cache_problem
from tests.measure.models import tiny_grouped, tiny_mistral, vivid

CPU = torch.device("cpu")


def prompt_of(length: int, batch: int = 2) -> torch.Tensor:
    return random_prompt(256, batch, length, seed=5, device=CPU)


@pytest.fixture(params=["tiny_llama", "tiny_opt", "tiny_gpt2"])
def decoder(request):
    return vivid(request.getfixturevalue(request.param))


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 7), (2, 40)])
def test_steps_equal_plain_forward_passes(decoder, batch, length):
    assert decode_logits_match(decoder, prompt_of(length, batch), 9, tolerance=1e-4) < 1e-4


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_steps_with_shared_key_value_heads(kv_heads):
    decode_logits_match(tiny_grouped(kv_heads), prompt_of(6), 5, tolerance=1e-4)


@pytest.mark.parametrize("length", [1, 3, 8, 9, 21])
def test_steps_with_a_window_turn_through_the_ring(length):
    # A window of 8: prompts below, at and beyond it, and steps that go round the ring twice.
    decode_logits_match(tiny_mistral(window=8), prompt_of(length), 18, tolerance=1e-4)


def test_a_window_holds_no_more_than_its_tokens():
    model = tiny_mistral(window=8)
    generation = Generation(model, prompt_of(21), 4)
    generation.prefill()
    layers = generation._fixed.layers
    assert all(isinstance(layer, WindowLayer) for layer in layers)
    assert {layer.keys.shape[2] for layer in layers} == {8}
    wide = FixedCache(model.config, max_len=8, device=CPU)  # nothing ever leaves the window
    assert not any(isinstance(layer, WindowLayer) for layer in wide.layers)


def test_the_window_matters_in_these_tests():
    # The wide and the narrow window must differ, or the tests above could not fail.
    prompt = prompt_of(21)
    narrow, wide = forward_only(tiny_mistral(8), prompt), forward_only(tiny_mistral(64), prompt)
    assert float((narrow - wide).abs().max()) > 0.1


def test_greedy_tokens_equal_those_of_generate(decoder):
    prompt = prompt_of(11)
    generation = Generation(decoder, prompt, 8)
    generation.prefill()
    tokens = [generation.token.clone()]
    for _ in range(8):
        generation.step()
        tokens.append(generation.token.clone())
    expected = decoder.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=9,
        min_new_tokens=9,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert torch.equal(torch.cat(tokens, dim=1), expected[:, 11:])


def test_rewinding_repeats_the_steps(decoder):
    generation = Generation(decoder, prompt_of(6), 4)
    generation.prefill()
    first = generation.token.clone()
    once = [generation.step().clone() for _ in range(4)]
    generation.rewind()
    with torch.inference_mode():
        generation.token.copy_(first)
    again = [generation.step().clone() for _ in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_resetting_starts_a_prompt_anew(decoder):
    generation = Generation(decoder, prompt_of(6), 4)
    first = generation.prefill().clone()
    generation.step()
    generation.reset()
    assert torch.equal(generation.prefill(), first)


def test_a_wrong_step_is_found(tiny_llama):
    class Off(nn.Module):
        """Computes the right prefill and a slightly wrong step."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model, self.config = model, model.config

        def forward(self, input_ids, attention_mask=None, position_ids=None, **options):
            output = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **options,
            )
            if input_ids.shape[1] == 1:
                output.logits = output.logits * 1.01
            return output

    with pytest.raises(ConfigError, match=r"differ from a plain forward pass by \d\.\d\de-0"):
        decode_logits_match(Off(vivid(tiny_llama)), prompt_of(6), 3)


def test_a_wrapper_that_hands_everything_on_is_run_like_the_model(tiny_opt):
    class Wrapper(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model, self.config = model, model.config

        def forward(self, *args, **kwargs):
            return self.model(*args, **kwargs)

    model = vivid(tiny_opt)
    decode_logits_match(Wrapper(model), prompt_of(6), 4, tolerance=1e-4)
    compiled = torch.compile(model, backend="eager")  # only its signature is asked for here
    generation = Generation(compiled, prompt_of(6), 1)
    assert generation._takes_positions
    assert generation._prefill_options == {"logits_to_keep": 1}
    assert generation.capture_problem is None


def test_an_empty_prompt_is_refused(tiny_llama):
    with pytest.raises(ConfigError, match=r"must be \[batch, tokens\], not \[2, 0\]"):
        Generation(tiny_llama, torch.zeros(2, 0, dtype=torch.int64), 1)


def test_prompts_are_the_same_for_the_same_seed():
    first = random_prompt(100, 2, 9, 1, CPU)
    assert torch.equal(first, random_prompt(100, 2, 9, 1, CPU))
    assert not torch.equal(first, random_prompt(100, 2, 9, 2, CPU))


# --- models that no fixed cache fits --------------------------------------------------------------


def test_layers_without_a_fixed_cache_are_named(tiny_llama):
    assert cache_problem(tiny_llama) is None
    tiny_llama.config.layer_types = ["linear_attention", "full_attention"]
    assert cache_problem(tiny_llama) == "layers of type linear_attention have no cache of fixed size"
    assert "no configuration" in cache_problem(nn.Linear(2, 2))


def test_such_models_are_run_with_a_growing_cache(decoder, monkeypatch):
    monkeypatch.setattr("harness.measure.static_cache.cache_problem", lambda _model: "it grows")
    generation = Generation(decoder, prompt_of(6), 3)
    assert generation.capture_problem == "it grows"
    decode_logits_match(decoder, prompt_of(6), 5, tolerance=1e-4)
    generation.prefill()
    first = generation.token.clone()
    once = generation.step().clone()
    generation.rewind()
    assert torch.equal(generation.token, first)
    assert torch.equal(generation.step(), once)


# --- what a capture forbids -----------------------------------------------------------------------


class NoQuestions(TorchDispatchMode):
    """Fails where a call reads a value back to the host or makes a tensor from host data.

    Both are what a CUDA graph capture forbids: `.item()`, `bool(tensor)`, `torch.tensor(number)`.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name in ("aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero"):
            raise AssertionError(f"{name} asks the host")
        return func(*args, **(kwargs or {}))


def test_the_watch_sees_questions():
    with NoQuestions(), pytest.raises(AssertionError, match="asks the host"):
        bool(torch.zeros(2).sum() == 0)
    with NoQuestions(), pytest.raises(AssertionError, match="asks the host"):
        torch.tensor(1.0)


@pytest.mark.parametrize("window", [8, 64])
def test_windowed_prefill_and_steps_never_ask_the_host(window):
    check_never_asks(tiny_mistral(window))


def test_prefill_and_steps_never_ask_the_host(decoder):
    check_never_asks(decoder)


def check_never_asks(model: nn.Module) -> None:
    generation = Generation(model, prompt_of(12), 3)
    generation.prefill()  # allocates the cache, which a capture finds done
    generation.reset()
    with masks_known_on_host(), NoQuestions():
        generation.prefill()
        for _ in range(3):
            generation.step()


def test_an_encoder_never_asks_the_host(tiny_bert):
    with masks_known_on_host(), NoQuestions():
        forward_only(tiny_bert, prompt_of(12))


def test_masks_known_on_host_change_no_result_and_are_put_back(decoder):
    from transformers import masking_utils

    names = ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa")
    originals = [getattr(masking_utils, name) for name in names]
    generation = Generation(decoder, prompt_of(12), 2)
    plain = [generation.prefill().clone(), generation.step().clone()]
    generation.reset()
    with masks_known_on_host():
        assert all(getattr(masking_utils, n) not in originals for n in names)
        known = [generation.prefill().clone(), generation.step().clone()]
    assert [getattr(masking_utils, name) for name in names] == originals
    assert all(torch.equal(a, b) for a, b in zip(plain, known, strict=True))


def test_masks_are_put_back_after_an_error():
    from transformers import masking_utils

    original = masking_utils._ignore_causal_mask_sdpa
    with pytest.raises(ZeroDivisionError), masks_known_on_host():
        raise ZeroDivisionError
    assert masking_utils._ignore_causal_mask_sdpa is original


def test_the_causal_mask_is_really_left_out_at_prefill(tiny_opt):
    # OPT always passes a padding mask; attention must still take its causal path without a mask.
    masks = []
    attention = tiny_opt.model.decoder.layers[0].self_attn
    attention.register_forward_pre_hook(
        lambda _m, _args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    generation = Generation(tiny_opt, prompt_of(12), 2)
    with masks_known_on_host():
        generation.prefill()
        generation.step()
    assert masks[0] is None
    assert masks[1].shape[-1] == generation.max_len


# --- preparing calls --------------------------------------------------------------------------------


def test_on_the_cpu_calls_are_warmed_up_and_run_as_they_are(tiny_llama):
    generation = Generation(tiny_llama, prompt_of(6), 3)
    prefill, step = prepare_generation(generation)
    assert (prefill.mode, prefill.note, step.mode, step.note) == ("cpu", None, "cpu", None)
    counted = SimpleNamespace(calls=0)

    def count() -> torch.Tensor:
        counted.calls += 1
        return torch.zeros(1)

    call = prepare_call(count, CPU)
    assert counted.calls == 1
    call.run()
    assert counted.calls == 2
