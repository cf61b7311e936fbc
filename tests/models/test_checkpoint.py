"""Checkpoints that nobody should trust: refused by name, before they cost anything."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.errors import ConfigError, HarnessError, NumericalFailure
from harness.models.info import info_from_config
from harness.models.loading import describe, load
from harness.models.spec import parse_model


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A sound checkpoint, made once."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from harness.models.loading import ZOO_DIR

    folder = tmp_path_factory.mktemp("sound")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in (ZOO_DIR / "llama-6m").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def folder(tmp_path, sound):
    return shutil.copytree(sound, tmp_path / "model")


def _load(folder, **options):
    described = describe(parse_model(str(folder), **options))
    return load(described, torch.device("cpu"), torch.float32, 0)


def _refused(folder, message, error=ConfigError, **options):
    with pytest.raises(error, match=message) as caught:
        _load(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _configure(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _pickled(folder, content):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


def test_a_sound_one_loads(folder):
    loaded = _load(folder)
    assert loaded.tokenizer is not None
    assert loaded.info.num_layers == 2


# --- configurations ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 10**9}, "embeddings of 1000000000 numbers"),
        ({"hidden_size": -1}, "config.json"),
        ({"hidden_size": 0}, "hidden_size 0"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": 64}, "embeddings of 64|other shapes"),
        ({"num_hidden_layers": 10**6}, "1000000 layers, and the files hold 20"),
        ({"num_hidden_layers": 4}, "lack model.layers.2.*not measured"),
        ({"num_hidden_layers": 1}, "no place for model.layers.1"),
        ({"vocab_size": 4095}, "other shapes"),
        ({"vocab_size": 10**8}, "100000000 embeddings"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"num_key_value_heads": 3}, "cannot share 3"),
        ({"intermediate_size": -3}, "intermediate_size -3"),
        ({"head_dim": -4}, "head_dim -4"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings"),
        ({"model_type": "nonsense"}, "nonsense"),
        ({"model_type": None}, "config.json"),
        ({"hidden_act": "nope"}, "nope"),
        ({"attention_bias": True}, "lack .*bias"),
        ({"tie_word_embeddings": False}, "lack lm_head.weight"),
        ({"transformers_weights": "../x.safetensors"}, "transformers_weights"),
        ({"_attn_implementation": "org/kernel:x"}, "--trust-remote-code"),
    ],
)  # fmt: skip
def test_a_configuration_that_is_not_of_these_weights(folder, changes, message):
    _configure(folder, **changes)
    _refused(folder, message)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_weights_that_are_quantized_already_are_refused(folder, key):
    _configure(folder, **{key: {"quant_method": "compressed-tensors"}})
    _refused(folder, rf"quantized already \({key} in config.json: compressed-tensors\)")
    _configure(folder, **{key: None})
    _load(folder)


def test_a_plugin_may_read_weights_that_are_quantized(folder):
    _configure(folder, quantization_config={"quant_method": "its own"})
    description = describe(parse_model(str(folder)), by_plugin=True)
    with pytest.raises(ConfigError, match="quantized already"):  # where it did not, they are nobody's
        load(description, torch.device("cpu"), torch.float32, 0)


def test_an_encoder_is_not_measured_as_a_decoder_that_sees_what_it_predicts(tmp_path):
    from transformers import RobertaConfig, RobertaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    for is_decoder in (False, True):
        config = RobertaConfig(**sizes, num_attention_heads=2, is_decoder=is_decoder)
        RobertaForCausalLM(config).save_pretrained(tmp_path / str(is_decoder))
    _refused(tmp_path / "False", "'roberta' is an encoder")
    model = _load(tmp_path / "True").model
    tokens = torch.arange(4, 16)[None]
    others = tokens.index_fill(1, torch.tensor(11), 50)
    assert torch.equal(model(tokens).logits[:, :-1], model(others).logits[:, :-1])


def test_heads_may_have_a_size_of_their_own():
    from transformers import GPT2Config, Qwen3Config

    config = Qwen3Config(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    assert info_from_config(config, "").head_dim == 64
    assert info_from_config(GPT2Config(n_embd=128, n_head=4), "").head_dim == 32


def test_all_that_transformers_loads_as_both_are_known():
    from transformers.models.auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() & MODEL_FOR_MASKED_LM_MAPPING_NAMES):
        config = CONFIG_MAPPING[name]()
        if hasattr(config, "is_decoder") and not config.is_encoder_decoder and name != "bert":
            with pytest.raises(ConfigError, match="is an encoder"):
                info_from_config(config, name)


@pytest.mark.parametrize("text", ["[]", "{", "\0", "null", '{"a":' * 5000, "5", "\ufeff{}"])
def test_a_configuration_that_is_no_json_object(folder, text):
    (folder / "config.json").write_text(text)
    _refused(folder, r"config\.json")


# --- weights -------------------------------------------------------------------------------------------

QUERY = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message", "error"),
    [
        (lambda w: w.pop(f"{QUERY}.weight"), f"lack {QUERY}.weight", ConfigError),
        (lambda w: w.update({f"{QUERY}.bias": torch.zeros(32)}), f"no place for {QUERY}.bias", ConfigError),
        (lambda w: w.update({f"{QUERY}.weight": torch.zeros(32, 16)}), "other shapes", ConfigError),
        (
            lambda w: w[f"{QUERY}.weight"][3].fill_(float("nan")),
            f"{QUERY}.weight holds NaN",
            NumericalFailure,
        ),
        (lambda w: w[f"{QUERY}.weight"][0, 0].fill_(float("inf")), "holds NaN or inf", NumericalFailure),
    ],
)
def test_a_model_is_never_measured_with_weights_that_its_files_do_not_hold(folder, change, message, error):
    _weights(folder, change)
    _refused(folder, message, error)


def test_a_head_for_another_purpose_may_be_left_over(folder):
    _weights(folder, lambda weights: weights.update(score=torch.zeros(2, 32)))
    _load(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-100],
        lambda data: data[:4],
        lambda data: b"",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data.replace(b"[4096,32]", b"[4096,33]"),
        lambda data: data + b"more",
    ],
    ids=["cut", "cut in the header", "empty", "header of 16 EiB", "lying header", "bytes left over"],
)
def test_a_safetensors_file_that_is_cut_short_or_lies(folder, damage):
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    _refused(folder, "cut short or no safetensors file")


class _Evil:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def test_pickled_weights_are_refused_unless_asked_for_and_never_run_code(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = load_file(folder / "model.safetensors")
    _pickled(folder, {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    _refused(folder, "pass --allow-pickle")
    assert _load(folder, allow_pickle=True).info.num_layers == 2
    torch.save({"x": _Evil()}, folder / "pytorch_model.bin")
    _refused(folder, "cannot be loaded", allow_pickle=True)
    (folder / "pytorch_model.bin").write_bytes(b"junk" * 100)
    _refused(folder, "cannot be loaded", allow_pickle=True)
    # A pickle that calls itself safetensors.
    torch.save({"x": _Evil()}, folder / "model.safetensors")
    _refused(folder, "no safetensors file", allow_pickle=True)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../../etc/passwd", "points outside of its folder"),
        ("/etc/passwd", "points outside of its folder"),
        ("sub/x.safetensors", "points outside of its folder"),
        ("..\\x.safetensors", "points outside of its folder"),
        ("a\0b.safetensors", "points outside of its folder"),
        ("..", "no .safetensors file|outside"),
        ("x.bin", "no .safetensors file"),
        ("gone.safetensors", "which is missing"),
        (5, "no weight_map"),
    ],
)
def test_an_index_names_files_of_its_folder_only(folder, name, message):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = {"metadata": {}, "weight_map": {f"{QUERY}.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _refused(folder, message)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    _refused(folder, "index.json", allow_pickle=True)


def test_links_are_followed_and_what_they_point_to_is_the_identity(folder, tmp_path):
    before = describe(parse_model(str(folder))).identity
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    assert describe(parse_model(str(folder))).identity == before
    _load(folder)
    (tmp_path / "blob").unlink()
    _refused(folder, "has no model.safetensors")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/etc/hostname")
    told = _refused(folder, "is no JSON|has no config.json")
    assert Path("/etc/hostname").read_text().strip() not in told


def test_an_adapter_is_no_model(folder):
    (folder / "adapter_config.json").write_text("{}")
    _refused(folder, "adapter")


# --- code that comes along -----------------------------------------------------------------------------

REMOTE = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}


def test_code_of_a_checkpoint_is_not_run_unless_trusted(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    _configure(folder, model_type="custom", auto_map=REMOTE)
    (folder / "own.py").write_text("import os\nos.mkdir('pwned')\n")
    _refused(folder, "pass --trust-remote-code")
    assert not (tmp_path / "pwned").exists()
    _configure(folder, auto_map={"AutoConfig": "other/repository--own.Config"})
    _refused(folder, "no revision pins it", trust_remote_code=True)


def test_trusting_code_is_part_of_the_identity(folder):
    plain = describe(parse_model(str(folder))).identity
    (folder / "own.py").write_text("A = 1\n")
    assert describe(parse_model(str(folder))).identity != plain


# --- tokenizers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tokenizer.json", "{{{", "is no JSON"),
        ("tokenizer.json", "{}", "no tokenizer that can be loaded"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": 5}}', "no tokenizer that can be loaded"),
        ("tokenizer_config.json", "[1]", "must hold a JSON object"),
        ("tokenizer_config.json", '{"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["x.Y", null]}}',
         "no tokenizer that can be loaded"),
        ("generation_config.json", "{", "is no JSON"),
    ],
)  # fmt: skip
def test_a_broken_tokenizer_is_said_to_be_one(folder, file, text, message):
    (folder / file).write_text(text)
    _refused(folder, message)


def test_a_directory_without_a_tokenizer_can_be_timed(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert _load(folder).tokenizer is None


def test_a_tokenizer_that_knows_more_words_than_the_model(folder):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    added = {"id": 4096, "content": "<more>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append({**added, **flags})
    file.write_text(json.dumps(content))
    _refused(folder, r"makes 1 tokens, such as '<more>' \(4096\)")


def test_a_package_is_a_package(tmp_path, monkeypatch):
    """`package:sys` has no folder: it must not find a folder called model in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for name in ("sys", "this", "json"):
        with pytest.raises(HarnessError, match=r"not a package with a folder model|no config\.json"):
            describe(parse_model(f"package:{name}"))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "model.safetensors"])
def test_a_folder_that_was_changed_since_it_was_described_is_refused(folder, file):
    described = describe(parse_model(str(folder)))

    def again():
        return load(described, torch.device("cpu"), torch.float32, 0)

    os.utime(folder / file, (1, 1))  # touched, the same content
    assert again().tokenizer is not None
    if file == "model.safetensors":
        tensors = load_file(folder / file)
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / file, {"format": "pt"})
        os.utime(folder / file, (1, 1))
    else:
        (folder / file).write_text((folder / file).read_text() + "\n")
    with pytest.raises(ConfigError, match="were changed since the sweep began; run the same command again"):
        again()
    assert _load(folder).tokenizer is not None


def test_a_file_that_came_into_a_folder_since_it_was_described_is_a_change(folder):
    described = describe(parse_model(str(folder)))
    (folder / "notes.md").write_text("decides nothing")
    load(described, torch.device("cpu"), torch.float32, 0)
    (folder / "added_tokens.json").write_text("{}")
    with pytest.raises(ConfigError, match="were changed since the sweep began"):
        load(described, torch.device("cpu"), torch.float32, 0)


def test_a_vocabulary_alone_is_a_tokenizer(tmp_path):
    """As the first BERT and GPT-2 came; without one, methods would be calibrated on random tokens."""
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(vocab_size=7, intermediate_size=64, **sizes)).save_pretrained(
        tmp_path / "bert"
    )
    (tmp_path / "bert" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nlight\nday\n")
    GPT2LMHeadModel(GPT2Config(vocab_size=4, n_embd=32, n_layer=2, n_head=2)).save_pretrained(
        tmp_path / "gpt2"
    )
    words = {"<|endoftext|>": 0, "d": 1, "a": 2, "da": 3}
    (tmp_path / "gpt2" / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "gpt2" / "merges.txt").write_text("#version: 0.2\nd a\n")
    for name, text, tokens in (("bert", "day light", [6, 5]), ("gpt2", "dad", [3, 1])):
        tokenizer = _load(tmp_path / name).tokenizer
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == tokens
        for file in (tmp_path / name).glob("vocab.*"):
            file.unlink()
        assert _load(tmp_path / name).tokenizer is None
