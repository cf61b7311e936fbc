"""Layer-by-layer distillation: what is trained, kept and counted, and the rounding it trains through."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref

import pytest
import torch
from harness_plugins.quantization import zeroquant
from harness_plugins.quantization._zeroquant import BlockPacker
from harness_plugins.quantization.zeroquant_lkd import METHOD, distill, student_of
from torch import nn

from harness.errors import ConfigError, NotApplicable, NumericalFailure
from harness.models.info import info_from_config
from harness.nn.blocks import iterate_blocks, run_block
from harness.nn.quantized import Int8Linear
from harness.nn.quantizer import quantize_activation, quantize_row_groups
from harness.nn.ste import SteLinear, round_clipped, round_rows, round_tokens
from harness.testing.making import make_context
from harness.testing.models import tiny_model

FAMILIES = ["llama", "opt", "gpt2", "bert"]
QUICK = {"iters": 12, "lr": 1e-3, "w_bits_ffn": 2}


def options(**values):
    return METHOD.options.parse(values, method="zeroquant-lkd")


def transformed(model: nn.Module, *, info=None, **values) -> tuple[nn.Module, dict[str, float], object]:
    context = make_context(model, info, calibration_samples=16, calibration_len=24)
    model = METHOD.transform(model, options(**values), context)
    return model, {record.metric: record.value for record in context.records}, context


def same_state(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def rounded(family: str, **values) -> nn.Module:
    model = tiny_model(family)
    parsed = zeroquant.METHOD.options.parse({"w_bits_ffn": 4, **values})
    return zeroquant.METHOD.transform(model, parsed, make_context(model))


# --- the rounding ------------------------------------------------------------------------------------


def test_gradients_pass_inside_the_range_and_stop_outside():
    values = torch.tensor([-9.0, -3.2, -0.4, 0.0, 0.6, 3.0, 3.6, 1e10], requires_grad=True)
    rounded_values = round_clipped(values, torch.tensor(1.0), 3)
    assert rounded_values.tolist() == [-3, -3, 0, 0, 1, 3, 3, 3]
    upstream = torch.arange(1.0, 9.0)
    rounded_values.backward(upstream)
    assert values.grad.tolist() == [0, 2, 3, 4, 5, 6, 0, 0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("row_groups", [1, 4, 16])
def test_weights_are_rounded_as_they_are_stored(bits, row_groups):
    weight = torch.randn(16, 40, requires_grad=True)
    found = round_rows(weight, bits=bits, row_groups=row_groups)
    expected = quantize_row_groups(weight, bits=bits, row_groups=row_groups).dequantize()
    assert torch.equal(found.detach(), expected)
    found.sum().backward()
    assert torch.equal(weight.grad, torch.ones(16, 40))  # min-max scales clip nothing


def test_tokens_are_rounded_as_they_are_multiplied():
    x = torch.randn(2, 5, 40, requires_grad=True)
    found = round_tokens(x)
    codes, scale = quantize_activation(x.detach())
    torch.testing.assert_close(found.detach(), codes * scale, rtol=1e-6, atol=1e-6)
    found.backward(torch.full_like(x, 2.0))
    assert torch.equal(x.grad, torch.full_like(x, 2.0))


def test_the_student_layer_computes_what_the_packed_layer_computes():
    linear = nn.Linear(40, 16)
    student = SteLinear(linear, bits=4, row_groups=4)
    weight = quantize_row_groups(linear.weight, bits=4, row_groups=4)
    packed = Int8Linear.from_weight(weight, linear.bias, row_groups=4)
    x = torch.randn(3, 40)
    torch.testing.assert_close(student(x), packed(x), rtol=1e-5, atol=1e-5)
    linear.weight.data[0, 0] = torch.nan
    with pytest.raises(NumericalFailure):
        student(x)


# --- one block after the other -------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_no_steps_are_zeroquant_bit_for_bit(family):
    model, records, context = transformed(tiny_model(family), iters=0)
    assert same_state(model, rounded(family))
    assert records.keys() == {"fused_norms"}
    assert (context.trained_steps, context.trained_tokens, context.calibration_tokens) == (0, 0, 0)


def test_random_weights_are_only_rounded():
    model = tiny_model("llama")
    info = dataclasses.replace(info_from_config(model.config, "shape:tiny"), synthetic=True)
    model, _, context = transformed(model, info=info)
    assert same_state(model, rounded("llama"))
    assert context.trained_steps == 0


def block_errors(packed: nn.Module, original: nn.Module, tokens: torch.Tensor) -> list[float]:
    """Mean squared error of each packed block on what the original blocks before it give."""
    blocks = [block.module for block in iterate_blocks(packed, [tokens])]
    return [
        float((run_block(module, block.inputs[0]) - block.outputs[0]).square().mean())
        for module, block in zip(blocks, iterate_blocks(original, [tokens], from_originals=True), strict=True)
    ]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_stored_block_is_nearer_to_the_original_than_its_rounding(family):
    original = tiny_model(family)
    model, records, context = transformed(tiny_model(family), **QUICK)
    tokens = context.calibration()
    plain = block_errors(rounded(family, w_bits_ffn=2), original, tokens)
    found = block_errors(model, original, tokens)
    ratios = [after / before for after, before in zip(found, plain, strict=True)]
    assert all(ratio < 1 for ratio in ratios)
    assert records["lkd_error_ratio"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-3)
    assert records["lkd_restored_blocks"] == 0
    assert not any(parameter.requires_grad and parameter.grad is not None for parameter in model.parameters())


def test_what_is_trained_is_counted():
    _, _, context = transformed(tiny_model("llama"), **QUICK)
    assert context.trained_steps == 2 * 12
    assert context.trained_tokens == 2 * 12 * 8 * 24  # two blocks, batches of 8 windows
    assert context.calibration_tokens == 16 * 24


def test_a_block_reads_the_original_or_the_stored_blocks(monkeypatch):
    seen: dict[str, list[torch.Tensor]] = {}

    def watching(student, inputs, targets, **kwargs):
        seen[source].append(inputs[0].hidden.clone())
        return distill(student, inputs, targets, **kwargs)

    monkeypatch.setattr("harness_plugins.quantization.zeroquant_lkd.distill", watching)
    models = {}
    for source in ("fp", "quantized"):
        seen[source] = []
        models[source], _, context = transformed(tiny_model("opt"), input_source=source, **QUICK)
    batch = context.calibration_batches(8)[:1]
    true = [block.inputs[0].hidden.clone() for block in iterate_blocks(tiny_model("opt"), batch)]
    stored = [block.inputs[0].hidden.clone() for block in iterate_blocks(models["quantized"], batch)]
    assert torch.equal(seen["fp"][1], true[1])
    assert torch.equal(seen["quantized"][1], stored[1])
    assert not torch.equal(stored[1], true[1])


def test_random_tokens_need_no_text():
    assert METHOD.needs_of(options()) == {"calibration"}
    assert METHOD.needs_of(options(data="random")) == METHOD.needs_of(options(iters=0)) == frozenset()
    model, records, context = transformed(tiny_model("llama"), data="random", **QUICK)
    assert context.calibration_tokens == 0
    assert records["lkd_error_ratio"] < 1
    assert not same_state(model, rounded("llama", w_bits_ffn=2))


def test_random_tokens_need_a_vocabulary():
    info = dataclasses.replace(info_from_config(tiny_model("llama").config, "tiny"), vocab_size=0)
    assert "vocabulary" in METHOD.applies(info, options(data="random"))
    assert METHOD.applies(info, options()) is None


def test_a_block_that_diverges_is_rounded_as_it_was():
    model = tiny_model("llama")
    context = make_context(model, calibration_samples=16, calibration_len=24)
    model = METHOD.transform(model, options(**QUICK).model_copy(update={"lr": 1e20}), context)
    records = {record.metric: record.value for record in context.records}
    assert records["lkd_restored_blocks"] == 2
    assert records["lkd_error_ratio"] == 1
    (note,) = [record.note for record in context.records if record.metric == "lkd_restored_blocks"]
    assert "model.layers.0, model.layers.1" in note
    assert same_state(model, rounded("llama", w_bits_ffn=2))


def test_weights_that_are_not_finite_name_their_layer():
    model = tiny_model("opt")
    model.model.decoder.layers[1].fc2.weight.data[3, 3] = torch.nan
    with pytest.raises(NumericalFailure, match=r"layers\.1\.fc2: .*NaN"):
        transformed(model, **QUICK)


def test_steps_that_do_not_help_are_not_kept():
    model, records, _ = transformed(tiny_model("llama"), **{**QUICK, "lr": 1.0})
    assert records["lkd_error_ratio"] == 1
    assert records["lkd_restored_blocks"] == 0
    assert same_state(model, rounded("llama", w_bits_ffn=2))


def test_the_optimizer_of_one_block_is_alive_at_a_time(monkeypatch):
    alive: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
    most_tensors = []

    class Watched(torch.optim.Adam):
        def __init__(self, *args, **kwargs):
            gc.collect()
            assert not alive, "the optimizer of the block before is still there"
            super().__init__(*args, **kwargs)
            alive.add(self)

        def step(self, *args, **kwargs):
            super().step(*args, **kwargs)
            most_tensors.append(
                sum(value.numel() for state in self.state.values() for value in state.values() if value.ndim)
            )

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    transformed(tiny_model("llama", layers=3), **{**QUICK, "iters": 2})
    block = tiny_model("llama").model.layers[0]
    assert len(most_tensors) == 3 * 2
    assert max(most_tensors) == 2 * sum(parameter.numel() for parameter in block.parameters())


def test_a_model_in_16_bits_is_trained_in_32(logits):
    model, records, _ = transformed(tiny_model("opt").to(torch.bfloat16), **QUICK)
    assert records["lkd_error_ratio"] < 1
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert set(kinds.values()) == {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16


def test_the_student_computes_what_will_be_packed():
    model = tiny_model("llama")
    parsed = options(w_bits_ffn=4)
    packer = BlockPacker.of(model, parsed)
    tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(1))
    for block in iterate_blocks(model, [tokens], from_originals=True):
        student = student_of(block.module, block.name, packer)
        packer.pack(block.module, block.name)
        with torch.no_grad():
            torch.testing.assert_close(
                run_block(student, block.inputs[0]), block.run()[0], rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"iters": -1}, "iters"),
        ({"lr": 0}, "lr"),
        ({"lr": 2}, "lr"),
        ({"input_source": "int8"}, "input_source"),
        ({"data": "labels"}, "data"),
        ({"w_groups": 0}, "must be positive"),
    ],
)
def test_options_that_make_no_sense(values, message):
    with pytest.raises(ConfigError, match=message):
        options(**values)


def test_a_quantized_model_is_refused():
    model = rounded("llama")
    with pytest.raises(NotApplicable, match="quantized already"):
        transformed(copy.deepcopy(model), **QUICK)
