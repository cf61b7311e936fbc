"""Block iteration against full forward passes of the whole model."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from harness.errors import NotApplicable
from harness.nn.anatomy import anatomy_of, blocks_of, find
from harness.nn.blocks import iterate_blocks
from harness.nn.surgery import replace_module

FAMILIES = ("tiny_llama", "tiny_opt", "tiny_gpt2", "tiny_bert")


@pytest.fixture(params=FAMILIES)
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 256, (2, 12), generator=generator) for _ in range(3)]


@torch.no_grad()
def hidden_states(model: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The embedding output, then the output of each block; the last one behind the final norm."""
    return model(input_ids=tokens, output_hidden_states=True).hidden_states


def final_norm(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    found = find(model, anatomy_of(model).final_norm)
    return hidden if found is None else found[1](hidden)


def test_chained_blocks_equal_the_full_forward_pass(model, batches):
    expected = [hidden_states(model, tokens) for tokens in batches]
    seen = []
    for block in iterate_blocks(model, batches):
        seen.append(block.name)
        outputs = block.run()
        for number, output in enumerate(outputs):
            torch.testing.assert_close(
                block.inputs[number].hidden, expected[number][block.index], atol=1e-6, rtol=0
            )
            if block.index + 1 == len(expected[number]) - 1:
                output = final_norm(model, output)
            torch.testing.assert_close(output, expected[number][block.index + 1], atol=1e-5, rtol=0)
    assert seen == [name for name, _ in blocks_of(model)]


@torch.no_grad()
def test_blocks_may_read_what_the_originals_gave(model, batches):
    inputs = [block.inputs[1].hidden.clone() for block in iterate_blocks(model, batches)]
    outputs = [block.run()[1] for block in iterate_blocks(model, batches)]
    for block in iterate_blocks(model, batches, from_originals=True):
        assert torch.equal(block.inputs[1].hidden, inputs[block.index])
        assert torch.equal(block.outputs[1], outputs[block.index])
        for parameter in block.module.parameters():
            parameter.zero_()


def test_a_changed_block_changes_the_inputs_of_the_next(model, batches):
    untouched = [block.inputs[0].hidden.clone() for block in iterate_blocks(model, batches)]
    second = None
    for block in iterate_blocks(model, batches):
        if block.index == 0:
            down = block.module.get_submodule(anatomy_of(model).ffn_out)
            with torch.no_grad():
                down.weight.mul_(0.5)
        else:
            second = block.inputs[0].hidden
    assert not torch.allclose(second, untouched[1])
    torch.testing.assert_close(second, hidden_states(model, batches[0])[1], atol=1e-5, rtol=0)


def test_a_replaced_block_is_looked_up_again(tiny_llama, batches):
    class Half(nn.Module):
        def forward(self, hidden_states: torch.Tensor, **_: object) -> torch.Tensor:
            return hidden_states * 0.5

    for block in iterate_blocks(tiny_llama, batches):
        if block.index == 0:
            entered = block.inputs[0].hidden
            replace_module(tiny_llama, block.name, Half())
        else:
            torch.testing.assert_close(block.inputs[0].hidden, entered * 0.5)


def test_observe_shows_what_each_layer_reads(model, batches):
    names = anatomy_of(model).linears
    caught: dict[str, torch.Tensor] = {}
    handles = [
        blocks_of(model)[1][1]
        .get_submodule(name)
        .register_forward_pre_hook(lambda _m, args, name=name: caught.update({name: args[0]}))
        for name in names
    ]
    hidden_states(model, batches[0])
    for handle in handles:
        handle.remove()

    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for block in iterate_blocks(model, batches):
        if block.index == 1:
            block.observe(names, lambda name, x: seen[name].append(x))
    assert all(len(inputs) == len(batches) for inputs in seen.values())
    for name in names:
        expected = caught[name].reshape(seen[name][0].shape)
        torch.testing.assert_close(seen[name][0], expected, atol=1e-5, rtol=0)


def test_observe_leaves_no_hook_behind_even_after_an_error(tiny_llama, batches):
    def fail(_name: str, _x: torch.Tensor) -> None:
        raise ValueError("seen enough")

    block = next(iterate_blocks(tiny_llama, batches))
    with pytest.raises(ValueError, match="seen enough"):
        block.observe(["mlp.down_proj"], fail)
    assert not block.module.get_submodule("mlp.down_proj")._forward_pre_hooks


def test_a_pass_stops_after_the_last_observed_layer(tiny_llama, batches):
    block = next(iterate_blocks(tiny_llama, batches))
    calls = dict.fromkeys(anatomy_of(tiny_llama).linears, 0)
    for name in calls:
        block.module.get_submodule(name).register_forward_hook(
            lambda *_, name=name: calls.update({name: calls[name] + 1})
        )
    seen = []
    block.observe(["self_attn.o_proj", "self_attn.v_proj"], lambda name, x: seen.append(name))
    assert seen == ["self_attn.v_proj", "self_attn.o_proj"] * 3
    assert calls["self_attn.k_proj"] == calls["self_attn.v_proj"] == 3
    # The first pass shows that each layer is called once.
    assert calls["self_attn.o_proj"] == calls["mlp.up_proj"] == calls["mlp.down_proj"] == 1


def test_a_layer_that_is_called_twice_is_seen_twice(tiny_llama, batches):
    block = next(iterate_blocks(tiny_llama, batches))
    once = block.module.mlp.forward
    block.module.mlp.forward = lambda x: once(x) + once(2 * x)
    seen = []
    block.observe(["mlp.up_proj"], lambda _name, x: seen.append(x))
    assert len(seen) == 6
    assert torch.equal(seen[3], 2 * seen[2])


def test_what_comes_next_may_be_that_of_the_unchanged_block(model, batches):
    """`advance` in the observing pass: one pass a block, and later changes do not show."""
    last = anatomy_of(model).ffn_out
    expected = [hidden_states(model, tokens) for tokens in batches]
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    for _, module in blocks_of(model):
        module.register_forward_pre_hook(count)
    for block in iterate_blocks(model, batches):
        for item, hidden in zip(block.inputs, expected, strict=True):
            torch.testing.assert_close(item.hidden, hidden[block.index], atol=1e-5, rtol=0)
        block.observe(anatomy_of(model).qkv, lambda *_: None, advance=True)
        assert block.is_advanced
        with torch.no_grad():
            block.module.get_submodule(last).weight.zero_()
    # Finding the inputs of the first block begins a pass over it.
    assert passes == len(batches) * (1 + len(blocks_of(model)))


def test_outputs_take_the_place_of_inputs_one_batch_after_the_other(tiny_llama, batches):
    """Never are the inputs and the outputs of all batches in memory."""
    block = next(iterate_blocks(tiny_llama, batches))
    entered = [weakref.ref(item.hidden) for item in block.inputs]
    alive = []
    block.module.register_forward_pre_hook(
        lambda *_: alive.append(sum(hidden() is not None for hidden in entered))
    )
    block.advance()
    assert alive == [3, 2, 1]


def test_the_training_flag_and_gradients_are_left_as_they_were(tiny_llama, batches):
    tiny_llama.train()
    for block in iterate_blocks(tiny_llama, batches[:1]):
        assert not block.module.training
        assert torch.is_grad_enabled()
        assert not block.inputs[0].hidden.requires_grad
    assert tiny_llama.training


def test_models_whose_blocks_mask_differently_are_refused(tiny_llama, batches):
    tiny_llama.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(NotApplicable, match="different attention"):
        next(iterate_blocks(tiny_llama, batches))


def test_layers_that_differ_in_their_caches_only_are_not_refused(tiny_llama, batches):
    tiny_llama.config.layer_types = ["full_attention", "a_cache_of_its_own"]
    assert len([block.index for block in iterate_blocks(tiny_llama, batches)]) == 2
