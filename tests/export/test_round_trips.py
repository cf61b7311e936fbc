"""Checkpoints that transformers loads again: what they compute, and that they need nothing of the harness."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig

from harness.corpus import kjv_held_out_chapters
from harness.errors import ExportRejected, NotApplicable
from harness.export import exporting, stock
from harness.export.checking import probe_tokens
from harness.export.exporting import write_variant
from harness.export.folder import StoredTensors
from harness.export.forms import IntegerForm, form_of
from harness.nn.quantized import QuantizedLinear
from harness.nn.quantizer import quantize_weight
from harness.nn.semi_structured import SemiStructuredLinear
from harness.nn.surgery import replace_linears
from harness.plugins import load_plugins
from harness.testing import make_context, tiny_model
from tests.export.models import fp8_model, int8_model, integer_model
from tests.zoo_models import zoo_model

TOKENS = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(5))


def write(model, folder, layout="auto", **options):
    options.setdefault("dtype", torch.float32)
    return write_variant(model, None, folder, max_positions=128, layout=layout, **options)


@torch.no_grad()
def outputs(model, tokens=TOKENS):
    found = model.eval()(input_ids=tokens)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("family", "bits", "sym"),
    [("llama", 4, False), ("llama", 3, True), ("llama", 8, False), ("opt", 4, True), ("encoder", 4, False)],
)
def test_packed_integers(family, bits, sym, tmp_path):
    model = integer_model(family, bits=bits, sym=sym)
    written = write(model, tmp_path / "out")
    assert written.format == "compressed-tensors pack-quantized"
    assert [check.loader for check in written.checks] == ["transformers"]
    kind = AutoModel if family == "encoder" else AutoModelForCausalLM
    loaded = kind.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(outputs(loaded), outputs(model), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("a_gran", ["per-token", "per-tensor-static"])
def test_integer_products(family, a_gran, tmp_path):
    written = write(int8_model(family, a_gran=a_gran), tmp_path / "out")
    assert written.format == "compressed-tensors int-quantized"
    rounded, plain = written.checks
    assert 0 < rounded.found.relative_rms < 0.1  # its grid is the library's
    assert plain.found.relative_rms < 1e-6
    assert load_file(tmp_path / "out" / "model.safetensors").keys() >= {
        key for key in ("model.layers.0.self_attn.q_proj.weight_scale",) if family == "llama"
    }


def test_fewer_bits_with_rounded_inputs_stay_packed(tmp_path):
    written = write(int8_model("llama", bits=4), tmp_path / "out")
    assert written.schemes == {"W4A8": 14}
    assert written.weight_file_bytes < write(int8_model("llama"), tmp_path / "eight").weight_file_bytes * 0.8


@pytest.mark.parametrize("options", [{}, {"per_tensor": True, "a_gran": "per-tensor-dynamic"}])
def test_float8(options, tmp_path):
    written = write(fp8_model("llama", **options), tmp_path / "out")
    assert written.format == "compressed-tensors float-quantized"
    assert all(check.found.relative_rms < 0.02 for check in written.checks)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gptq(family, tmp_path):
    model = integer_model(family, bits=4, act_order=True)
    written = write(model, tmp_path / "out")
    assert written.format == "gptq (gptq_v2)"
    assert config_of(tmp_path / "out")["quantization_config"]["desc_act"]
    # GPTQModel is not a package that this project can be tested with: the files are decoded instead.
    assert set(written.unread) <= {"gptqmodel", "optimum"}
    assert written.checks[0].loader == ("decoded files" if written.unread else "transformers")
    assert written.checks[0].found.relative_rms < 1e-5


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bert", "encoder"])
def test_a_model_that_is_only_changed_in_its_numbers_is_saved_as_it_is(family, tmp_path):
    model = tiny_model(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(parameter.abs() > 0.01)
    written = write(model, tmp_path / "out")
    assert written.format == "plain"
    assert "quantization_config" not in config_of(tmp_path / "out")
    loaded = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(outputs(loaded), outputs(model))


def test_pruned_2_of_4_is_a_plain_matrix_with_its_zeros(tmp_path):
    def make(_, linear):
        groups = linear.weight.detach().clone().view(-1, 4)
        groups[:, 2:] = 0
        return SemiStructuredLinear.from_dense(groups.view_as(linear.weight), linear.bias)

    model = replace_linears(tiny_model("llama"), make)
    assert write(model, tmp_path / "out").format == "plain"
    stored = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert (stored.view(-1, 4)[:, 2:] == 0).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mqa", {}),
        ("structured-prune", {"head_ratio": 0.5}),
        ("distilbert", {}),
        ("smoothquant", {"quantize": False}),
    ],
)
def test_changed_shapes_are_in_the_configuration(name, options, tmp_path):
    method = load_plugins().method(name)
    model = tiny_model("llama")
    before = sum(parameter.numel() for parameter in model.parameters())
    model = method.transform(model, method.options.parse(options, method=name), make_context(model))
    assert write(model, tmp_path / "out").format == "plain"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(outputs(loaded), outputs(model), atol=1e-5)
    assert name == "smoothquant" or sum(p.numel() for p in loaded.parameters()) < before


def test_a_quantized_head_is_parted_from_its_embedding(tmp_path):
    model = tiny_model("llama")
    model.lm_head = QuantizedLinear.from_weight(quantize_weight(model.lm_head.weight, bits=8, sym=True))
    write(model, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert not config["tie_word_embeddings"]
    assert config["quantization_config"]["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert "model.layers.0.mlp.up_proj" in config["quantization_config"]["ignore"]


# --- the real model, and another process --------------------------------------------------------------

ALONE = """
import json, sys
for name in ("harness", "harness_plugins"):
    sys.modules[name] = None  # importing it is an error
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
with torch.no_grad():
    logits = model.eval()(tokens).logits
total = float(logits.double().sum())
print(json.dumps({"top": logits.argmax(-1).tolist(), "dtype": str(logits.dtype), "sum": total}))
"""


@pytest.mark.slow
def test_the_bundled_model_loads_in_a_process_without_the_harness(tmp_path):
    from transformers import AutoTokenizer

    from harness.models.loading import ZOO_DIR

    tokenizer = AutoTokenizer.from_pretrained(ZOO_DIR / "llama-6m")
    model = zoo_model("llama-6m")
    before = sum(p.numel() * p.element_size() for p in model.parameters())

    def make(_, linear):
        return QuantizedLinear.from_weight(quantize_weight(linear.weight, bits=4, group_size=64, sym=False))

    model = replace_linears(model, make)
    written = write_variant(model, tokenizer, tmp_path / "out", dtype=torch.float32, max_positions=1024)
    assert written.checks[0].found.top1 == 1.0
    held = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    assert written.weight_file_bytes == pytest.approx(held, rel=0.02)
    assert written.weight_file_bytes < before / 2.5
    text = kjv_held_out_chapters()[0].text[:300]
    ran = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "out", text], capture_output=True, text=True, cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout)
    ours = outputs(model, tokenizer(text, return_tensors="pt")["input_ids"])
    assert found["top"] == ours.argmax(-1).tolist()
    assert found["dtype"] == "torch.float32"
    assert found["sum"] == pytest.approx(float(ours.double().sum()), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_scales_of_gptq_that_are_a_part_of_a_larger_tensor_are_written(family, tmp_path):
    model = tiny_model(family)
    method = load_plugins().method("gptq")  # groups of 128: one a row in layers of 128 columns
    model = method.transform(model, method.options.parse({}, method="gptq"), make_context(model))
    assert write(model, tmp_path / "out").checks[0].passed


def test_settings_of_generation_that_contradict_each_other_travel(tmp_path):
    model = tiny_model("llama")
    # What Llama 2 came with: transformers loads it, and does not write it.
    model.generation_config = GenerationConfig(temperature=0.6, top_p=0.9, eos_token_id=7)
    write(model, tmp_path / "out")
    loaded = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (loaded.temperature, loaded.top_p, loaded.eos_token_id) == (0.6, 0.9, 7)


def test_half_precision_is_held_to_its_own_tolerance(tmp_path):
    model = integer_model("llama", bits=4).to(torch.bfloat16)
    (check,) = write(model, tmp_path / "out", dtype=torch.bfloat16).checks
    assert 0 < check.found.relative_rms < check.tolerance == 0.05
    assert config_of(tmp_path / "out")["dtype"] == "bfloat16"


def test_the_text_is_fixed():
    assert torch.equal(probe_tokens(None, 256, 128), probe_tokens(None, 256, 128))
    assert probe_tokens(None, 256, 40).shape == (1, 40)


# --- simulated, refused, rejected ---------------------------------------------------------------------


def test_dense_weights_are_marked_simulated(tmp_path):
    written = write(integer_model("llama", bits=4), tmp_path / "four", "dense")
    assert written.layout == "dense"
    assert any("size and speed" in each for each in written.simulated)
    assert written.checks[0].found.relative_rms < 1e-5
    rounded = write(int8_model("llama"), tmp_path / "eight", "dense")
    assert any("not rounded" in each for each in rounded.simulated)
    assert rounded.checks[0].tolerance is None
    assert rounded.checks[0].found.relative_rms > 1e-3  # it does compute otherwise, and says so
    assert write(tiny_model("llama"), tmp_path / "plain", "dense").format == "plain"


def _made(name, family, options=None):
    method = load_plugins().method(name)
    model = tiny_model(family)
    return method.transform(model, method.options.parse(options or {}, method=name), make_context(model))


@pytest.mark.parametrize(
    ("name", "family", "options", "says", "is_dense_possible"),
    [
        ("hqq", "llama", {"group_size": 32}, "zero points are no whole numbers", True),
        ("gobo", "llama", {}, "tables of values", True),
        ("nf4", "opt", {}, "tables of values", True),
        ("llm-int8", "llama", {}, "columns of outliers", True),
        ("rtn", "gpt2", {"bits": 8, "a_bits": 8}, "input is rounded too", True),
        ("peg", "encoder", {"groups": 8}, "inside the attention", True),
        ("block-local", "llama", {"window": 8}, "another function", False),
        ("mqa", "opt", {}, "GroupedAttention", False),
        ("structured-prune", "opt", {}, "fit no configuration of 'opt'", False),
    ],
)
def test_what_has_no_standard_form_is_refused(name, family, options, says, is_dense_possible, tmp_path):
    model = _made(name, family, options)
    with pytest.raises(NotApplicable, match=says) as refused:
        write(model, tmp_path / "out")
    assert ("--layout dense" in str(refused.value)) is is_dense_possible
    assert list(tmp_path.iterdir()) == []
    if is_dense_possible:
        assert write(model, tmp_path / "out", "dense").simulated
    else:
        with pytest.raises(NotApplicable):
            write(model, tmp_path / "out", "dense")
        assert list(tmp_path.iterdir()) == []


def test_a_hook_or_another_forward_pass_is_refused(tmp_path):
    model = tiny_model("llama")
    handle = model.model.norm.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(NotApplicable, match=r"model\.norm has a hook"):
        write(model, tmp_path / "out")
    handle.remove()
    model.model.norm.forward = lambda x: x
    with pytest.raises(NotApplicable, match=r"forward pass of model\.norm was replaced"):
        write(model, tmp_path / "out")


def test_a_class_that_transformers_does_not_have_is_refused(tmp_path):
    class Own(type(tiny_model("llama"))):
        """Somebody's own."""

    with pytest.raises(NotApplicable, match="Own is no class of transformers"):
        write(Own(tiny_model("llama").config), tmp_path / "out")


def test_act_order_has_no_place_in_compressed_tensors(tmp_path):
    with pytest.raises(NotApplicable, match="act_order"):
        write(integer_model("llama", bits=4, act_order=True), tmp_path / "out", "compressed-tensors")


def test_gptq_has_one_setting_for_all_layers(tmp_path):
    model = integer_model("llama", bits=4)
    model.model.layers[0].mlp.up_proj = QuantizedLinear.from_weight(
        quantize_weight(tiny_model("llama").model.layers[0].mlp.up_proj.weight, bits=8, sym=True)
    )
    with pytest.raises(NotApplicable, match="one setting for all"):
        write(model, tmp_path / "out", "gptq")
    written = write(model, tmp_path / "out")
    assert written.schemes == {"W4A16 g32 asym": 13, "W8A16": 1}
    assert written.checks[0].found.relative_rms < 1e-5


def test_files_that_are_not_the_variant_are_rejected_and_removed(tmp_path, monkeypatch):
    whole = StoredTensors.__getitem__

    def spoiled(self, name):
        tensor = whole(self, name)
        return tensor + 1 if name.endswith("layers.1.mlp.down_proj.weight_packed") else tensor

    monkeypatch.setattr(StoredTensors, "__getitem__", spoiled)
    with pytest.raises(ExportRejected, match=r"layers\.1\.mlp\.down_proj, decoded from the files"):
        write(integer_model("llama", bits=4), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [lambda: integer_model("llama", bits=4), lambda: int8_model("llama")])
def test_a_layer_that_was_taken_apart_wrongly_is_rejected(make, tmp_path, monkeypatch):
    """What is written agrees with itself then, and only the layer in memory knows better."""

    def wrong(module):
        form = form_of(module)
        is_chosen = isinstance(form, IntegerForm) and module.in_features == 256
        return replace(form, codes=form.codes.flip(1)) if is_chosen else form

    monkeypatch.setattr(stock, "form_of", wrong)
    with pytest.raises(ExportRejected, match="down_proj, decoded from the files, is not what the variant"):
        write(make(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_loads_as_another_is_rejected_and_removed(tmp_path, monkeypatch):
    def other(folder, kind, dtype, device):
        return tiny_model("llama", seed=1)

    monkeypatch.setattr(exporting, "load_again", other)
    with pytest.raises(ExportRejected, match="outputs differ by"):
        write(integer_model("llama", bits=4), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_the_reading_package_the_files_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.export.checking._can_be_imported", lambda name: False)
    written = write(integer_model("llama", bits=4), tmp_path / "out")
    assert written.unread == ("compressed_tensors",)
    assert written.checks[0].loader == "decoded files"
    assert written.checks[0].found.relative_rms < 1e-5
