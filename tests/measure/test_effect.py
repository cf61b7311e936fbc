"""What the harness finds out by itself about a transform."""

from __future__ import annotations

import gc
import weakref
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn

from harness.errors import NumericalFailure
from harness.measure.effect import measure_effect, snapshot
from harness.measure.linears import nm_pattern
from harness.measure.memory import weight_bytes
from harness.nn.anatomy import blocks_of
from harness.nn.quantized_embedding import quantize_embedding
from harness.nn.quantizer import quantize_weight
from harness.nn.surgery import linear_from, replace_linears, replace_module

PROBE = torch.arange(32).reshape(2, 16) * 5 % 256


def effect_of(model: nn.Module, change) -> object:
    """The effect of ``change(model)``, which may return another model."""
    before = snapshot(model, probe=PROBE)
    changed = change(model)
    return measure_effect(before, model if changed is None else changed, probe=PROBE)


def values(effect) -> dict[str, float]:
    return {record.metric: record.value for record in effect.records}


def by_module(effect) -> dict:
    return {entry.module: entry for entry in effect.effects}


# --- changed or not -------------------------------------------------------------------------------


def nothing(_model) -> None:
    pass


def rewritten(model) -> None:
    replace_linears(model, lambda _name, linear: linear_from(linear.weight.detach().clone(), linear.bias))


def ran_calibration(model) -> None:
    with torch.no_grad():
        model(input_ids=PROBE, output_hidden_states=True)  # transformers leaves hooks behind


def switched_training(model) -> None:
    model.train()
    model.requires_grad_(False)


@pytest.mark.parametrize("change", [nothing, rewritten, ran_calibration, switched_training])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_opt", "tiny_gpt2", "tiny_bert"])
def test_equal_values_are_no_change(request, name, change):
    effect = effect_of(request.getfixturevalue(name), change)
    assert not effect.changed
    assert not any(entry.changed for entry in effect.effects)
    found = values(effect)
    assert found["compression_ratio"] == 1.0
    assert found["theoretical_compression_ratio"] == pytest.approx(1.0, abs=1e-3)
    assert found["parameters_changed_share"] == 0.0
    assert found["probe_output_change"] == 0.0


@torch.no_grad()
def one_bit(model) -> None:
    model.model.layers[1].mlp.down_proj.weight.view(torch.int32)[3, 5] ^= 1


@torch.no_grad()
def two_weights_swapped(model) -> None:
    weight = model.model.layers[0].self_attn.k_proj.weight
    weight[0, :2] = weight[0, :2].flip(0)


def norm_replaced(model) -> None:
    replace_module(model, "model.norm", nn.RMSNorm(64))


def attention_implementation(model) -> None:
    model.config._attn_implementation = "eager"


def attention_setting(model) -> None:
    model.model.layers[0].self_attn.window = 16


def attention_function(model) -> None:
    model.model.layers[0].mlp.activation = torch.relu


def window_in_the_configuration(model) -> None:
    model.config.sliding_window = 8


def hooked(model) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda _m, _args, output: output * 0.5)


def patched(model) -> None:
    mlp = model.model.layers[0].mlp
    mlp.forward = partial(type(mlp).forward, mlp)


def layer_dropped(model) -> None:
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1


def halved(model) -> nn.Module:
    return model.to(torch.bfloat16)


@pytest.mark.parametrize(
    "change",
    [
        one_bit,
        two_weights_swapped,
        norm_replaced,
        attention_implementation,
        attention_setting,
        attention_function,
        window_in_the_configuration,
        hooked,
        patched,
        layer_dropped,
        halved,
    ],
)
def test_every_real_change_is_found(tiny_llama, change):
    assert effect_of(tiny_llama, change).changed


def test_exactly_the_changed_modules_are_named(tiny_llama):
    effect = effect_of(tiny_llama, one_bit)
    changed = [entry.module for entry in effect.effects if entry.changed]
    assert changed == ["model.layers.1.mlp.down_proj"]
    linears = [f"{name}.{own}" for name, block in blocks_of(tiny_llama) for own, m in
               block.named_modules() if isinstance(m, nn.Linear)]  # fmt: skip
    assert [entry.module for entry in effect.effects] == linears
    total = sum(parameter.numel() for parameter in tiny_llama.parameters())
    assert values(effect)["parameters"] == total
    assert values(effect)["parameters_changed_share"] == pytest.approx(64 * 128 / total)


def test_a_pure_attention_swap_is_a_change_without_changed_weights(tiny_llama):
    class Swapped(nn.Module):
        """The same projections under another class."""

        def __init__(self, attention: nn.Module) -> None:
            super().__init__()
            for name, child in attention.named_children():
                setattr(self, name, child)
            self.inner = [attention]

        def forward(self, *args, **kwargs):
            return self.inner[0](*args, **kwargs)

    def swap(model) -> None:
        attention = model.model.layers[0].self_attn
        replace_module(model, "model.layers.0.self_attn", Swapped(attention))

    effect = effect_of(tiny_llama, swap)
    assert effect.changed
    entries = by_module(effect)
    assert entries["model.layers.0.self_attn"].kind == "Swapped"
    assert not entries["model.layers.0.self_attn.q_proj"].changed
    assert values(effect)["compression_ratio"] == 1.0
    assert values(effect)["probe_output_change"] == 0.0


def test_a_dropped_layer_counts_as_changed_parameters(tiny_llama):
    block = sum(parameter.numel() for parameter in tiny_llama.model.layers[1].parameters())
    total = sum(parameter.numel() for parameter in tiny_llama.parameters())
    effect = effect_of(tiny_llama, layer_dropped)
    assert values(effect)["parameters_changed_share"] == pytest.approx(block / total)
    assert values(effect)["parameters"] == total - block


def test_the_snapshot_keeps_no_weights_alive(tiny_llama):
    before = snapshot(tiny_llama, probe=PROBE)
    weight = weakref.ref(tiny_llama.model.layers[0].mlp.up_proj.weight)
    replace_module(tiny_llama, "model.layers.0.mlp.up_proj", nn.Linear(64, 128, bias=False))
    gc.collect()
    assert weight() is None
    assert measure_effect(before, tiny_llama).changed


# --- quantized layers ---------------------------------------------------------------------------------


class Packed(nn.Module):
    """Four bits a weight, one float16 scale for 16 inputs; keeps to the protocol of the harness."""

    simulated = False
    kernel_name = "test_kernel"

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = linear.in_features, linear.out_features, 4
        shape = (self.out_features, self.in_features // 2)
        self.register_buffer("codes", torch.ones(shape, dtype=torch.uint8))
        scales = torch.full((self.out_features, self.in_features // 16), 1e-3, dtype=torch.float16)
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.codes.float().repeat_interleave(2, 1)
        weight = weight * self.scales.float().repeat_interleave(16, 1)
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)


def test_stored_bits_count_scales_and_not_the_bias(tiny_opt):
    effect = effect_of(tiny_opt, lambda model: replace_linears(model, lambda _n, lin: Packed(lin)))
    assert effect.changed
    assert not effect.simulated
    entry = by_module(effect)["model.decoder.layers.0.fc1"]
    assert entry.kind == "Packed"
    assert entry.dtype == "uint8"
    assert entry.kernel == "test_kernel"
    assert entry.stored_bits_per_weight == 4 + 16 / 16  # codes, and a float16 scale for 16 weights
    assert entry.bytes_before == (64 * 128 + 128) * 4
    assert entry.bytes_after == 64 * 128 // 2 + 64 * 128 // 16 * 2 + 128 * 4
    assert entry.parameters == 64 * 128 + 128
    assert entry.sparsity is None
    assert values(effect)["stored_bits_per_weight"] == 5.0


def test_realised_and_theoretical_ratio_are_told_apart(tiny_opt):
    bytes_before = weight_bytes(tiny_opt)
    in_linears = 2 * (4 * 64 * 64 + 2 * 64 * 128)
    effect = effect_of(tiny_opt, lambda model: replace_linears(model, lambda _n, lin: Packed(lin)))
    found = values(effect)
    rest = bytes_before - in_linears * 4
    assert found["weight_bytes_before"] == bytes_before
    assert found["weight_bytes"] == weight_bytes(tiny_opt) == rest + in_linears * 5 / 8
    assert found["compression_ratio"] == pytest.approx(bytes_before / (rest + in_linears * 5 / 8))
    assert found["theoretical_compression_ratio"] == pytest.approx(bytes_before / (rest + in_linears * 4 / 8))


def test_packed_weights_count_as_the_parameters_they_stand_for(tiny_opt):
    total = sum(parameter.numel() for parameter in tiny_opt.parameters())
    effect = effect_of(tiny_opt, lambda model: replace_linears(model, lambda _n, lin: Packed(lin)))
    assert values(effect)["parameters"] == total


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_rows_of_a_packed_embedding_are_its_own(tiny_llama, bits, is_tied):
    if not is_tied:
        tiny_llama.lm_head.weight = nn.Parameter(tiny_llama.lm_head.weight.detach().clone())
    total = sum(parameter.numel() for parameter in tiny_llama.parameters())

    def pack(model) -> None:
        assert quantize_embedding(model, lambda w: quantize_weight(w, bits=bits, sym=False)) == is_tied

    effect = effect_of(tiny_llama, pack)
    (found,) = [entry for entry in effect.effects if entry.changed]
    rows = tiny_llama.get_input_embeddings().rows
    held = sum(tensor.numel() * tensor.element_size() for tensor in rows.buffers())
    weights = rows.out_features * rows.in_features
    assert (found.module, found.parameters, found.bytes_after) == ("model.embed_tokens", weights, held)
    assert found.bytes_before == weights * 4
    assert bits < found.stored_bits_per_weight == 8 * held / weights < bits + 1
    assert values(effect)["parameters"] == total


def test_a_simulated_layer_marks_the_variant(tiny_llama):
    class Simulated(Packed):
        simulated = True

    def change(model) -> None:
        replace_linears(model, lambda _n, linear: Simulated(linear), targets="q_proj")

    effect = effect_of(tiny_llama, change)
    assert effect.simulated
    assert [entry.module for entry in effect.effects if entry.simulated] == [
        f"model.layers.{index}.self_attn.q_proj" for index in range(2)
    ]


def test_a_layer_made_of_layers_is_one_entry(tiny_llama):
    class LowRank(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.down = nn.Linear(self.in_features, 4, bias=False)
            self.up = nn.Linear(4, self.out_features, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(self.down(x))

    def change(model) -> None:
        replace_linears(model, lambda _n, linear: LowRank(linear), targets="up_proj")

    entries = by_module(effect_of(tiny_llama, change))
    entry = entries["model.layers.0.mlp.up_proj"]
    assert "model.layers.0.mlp.up_proj.down" not in entries
    assert entry.changed
    assert entry.bytes_after == 4 * 4 * (64 + 128)
    assert entry.stored_bits_per_weight == 32 * 4 * (64 + 128) / (64 * 128)


# --- sparsity -----------------------------------------------------------------------------------------


@torch.no_grad()
def prune(model, names, keep) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(names):
            module.weight.mul_(keep(module.weight))


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    groups = weight.abs().reshape(-1, 4)
    mask = torch.zeros_like(groups).scatter_(1, groups.topk(2, dim=1).indices, 1.0)
    return mask.reshape(weight.shape)


def test_sparsity_and_pattern_are_measured_layer_by_layer(tiny_llama):
    effect = effect_of(tiny_llama, lambda model: prune(model, ("up_proj", "o_proj"), two_of_four))
    for name, entry in by_module(effect).items():
        pruned = name.endswith(("up_proj", "o_proj"))
        assert entry.sparsity == (0.5 if pruned else 0.0)
        assert entry.nm_pattern == ("2:4" if pruned else None)
        assert entry.changed == pruned
    assert values(effect)["sparsity"] == 0.5
    # Zeros in a dense tensor free nothing: the ratio on paper is not the real one.
    assert values(effect)["compression_ratio"] == 1.0
    assert values(effect)["theoretical_compression_ratio"] > 1.05


def test_a_mask_that_reached_only_the_last_layer_shows(tiny_llama):
    # A known mistake: one mask for a group of layers, applied to the last of them only.
    effect = effect_of(tiny_llama, lambda model: prune(model, ("v_proj",), two_of_four))
    entries = by_module(effect)
    assert entries["model.layers.0.self_attn.v_proj"].sparsity == 0.5
    assert entries["model.layers.0.self_attn.q_proj"].sparsity == 0.0
    assert not entries["model.layers.0.self_attn.q_proj"].changed
    total = values(effect)["parameters"]
    assert values(effect)["parameters_changed_share"] == pytest.approx(2 * 64 * 64 / total)


def test_unstructured_sparsity_has_no_pattern(tiny_llama):
    generator = torch.Generator().manual_seed(0)

    def half(weight: torch.Tensor) -> torch.Tensor:
        return (torch.rand(weight.shape, generator=generator) < 0.5).float()

    entry = by_module(effect_of(tiny_llama, lambda model: prune(model, ("up_proj",), half)))[
        "model.layers.0.mlp.up_proj"
    ]
    weight = tiny_llama.model.layers[0].mlp.up_proj.weight
    assert entry.sparsity == pytest.approx(float((weight == 0).float().mean()), abs=1e-9)
    assert entry.nm_pattern is None


@pytest.mark.parametrize(
    ("rows", "pattern"),
    [
        ([[1, 1, 0, 0, 0, 1, 1, 0]], "2:4"),
        ([[1, 0, 0, 0, 0, 0, 0, 1]], "1:4"),
        ([[1, 1, 1, 0, 1, 0, 0, 0]], "4:8"),
        ([[1, 1, 0, 0, 0, 0, 0, 0]], "2:8"),
        ([[0, 0, 0, 0, 0, 1, 0, 0]], "1:8"),
        ([[0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]], "1:16"),
        ([[1, 1, 1, 0, 1, 1, 0, 0]], None),
        ([[1, 1, 0, 0], [1, 1, 1, 0]], None),
        ([[0, 0, 0, 0]], None),  # nothing is left: no pattern worth a name
        ([[1, 0, 0, 0, 0]], None),  # the groups do not fit
        ([[1, 0], [0, 0], [0, 1], [0, 0]], None),  # groups go along the inputs only
    ],
)
def test_the_strictest_pattern_that_holds_everywhere(rows, pattern):
    assert nm_pattern(torch.tensor(rows, dtype=torch.float32)) == pattern


def test_a_packed_layer_can_show_the_weight_it_stands_for(tiny_llama):
    class Compressed(Packed):
        def dense_weight(self) -> torch.Tensor:
            weight = torch.zeros(self.out_features, self.in_features)
            weight[:, ::4] = 1.0
            return weight

    def change(model) -> None:
        replace_linears(model, lambda _n, linear: Compressed(linear), targets="up_proj")

    entry = by_module(effect_of(tiny_llama, change))["model.layers.0.mlp.up_proj"]
    assert (entry.sparsity, entry.nm_pattern) == (0.75, "1:4")


# --- outputs ------------------------------------------------------------------------------------------


def test_the_output_change_is_the_relative_frobenius_difference(tiny_llama):
    def scaled(model) -> None:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 1.25)

    effect = effect_of(tiny_llama, scaled)
    assert values(effect)["probe_output_change"] == pytest.approx(0.25, rel=1e-5)


def test_without_a_probe_no_output_is_compared(tiny_llama):
    before = snapshot(tiny_llama)
    one_bit(tiny_llama)
    assert "probe_output_change" not in values(measure_effect(before, tiny_llama, probe=PROBE))
    assert "probe_output_change" not in values(measure_effect(before, tiny_llama))


def test_outputs_that_were_all_zero_have_no_relative_change_and_are_no_failure(tiny_llama):
    with torch.no_grad():
        tiny_llama.lm_head.weight.zero_()
    before = snapshot(tiny_llama, probe=PROBE)
    one_bit(tiny_llama)
    found = measure_effect(before, tiny_llama, probe=PROBE)
    assert found.changed
    assert "probe_output_change" not in values(found)


def test_outputs_that_are_not_numbers_fail(tiny_llama):
    def broken(model) -> None:
        model.model.norm.weight.data.fill_(float("nan"))

    with pytest.raises(NumericalFailure, match="not finite"):
        effect_of(tiny_llama, broken)


def test_measuring_keeps_the_training_flag(tiny_llama):
    tiny_llama.train()
    before = snapshot(tiny_llama, probe=PROBE)
    measure_effect(before, tiny_llama, probe=PROBE)
    assert tiny_llama.training


# --- other models -------------------------------------------------------------------------------------


def test_an_unknown_architecture_is_measured_by_its_linear_layers():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    before = snapshot(model)
    with torch.no_grad():
        model[2].weight.zero_()
    effect = measure_effect(before, model)
    assert [(entry.module, entry.changed) for entry in effect.effects] == [("0", False), ("2", True)]
    assert by_module(effect)["2"].sparsity == 1.0
    assert by_module(effect)["2"].nm_pattern is None


def test_a_compiled_model_is_compared_under_its_own_names(tiny_llama):
    before = snapshot(tiny_llama)
    one_bit(tiny_llama)
    compiled = torch.compile(tiny_llama, backend="eager")
    effect = measure_effect(before, compiled)
    assert effect.changed
    assert [entry.module for entry in effect.effects if entry.changed] == ["model.layers.1.mlp.down_proj"]
    assert measure_effect(snapshot(tiny_llama), compiled).changed


def test_a_student_in_place_of_the_model_is_a_change(tiny_llama):
    student = deepcopy(tiny_llama)
    layer_dropped(student)
    effect = effect_of(tiny_llama, lambda _model: student)
    assert effect.changed
    assert values(effect)["compression_ratio"] > 1.0
