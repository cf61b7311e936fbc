"""The bundled checkpoints: small enough, loadable, and really trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import harness.zoo
from harness.corpus import kjv_held_out_chapters
from harness.zoo.card import render_card
from harness.zoo.evaluation import bits_per_byte

CHECKPOINTS = Path(harness.zoo.__file__).parent / "checkpoints"
NAMES = ("llama-6m", "opt-4m")
AWKWARD = "  Café, 日本語 🙂\t\u2009 don 't .\r\n\n<|endoftext|> x\u0000y  "


def _load(name):
    directory = CHECKPOINTS / name
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(directory)


def test_together_they_stay_under_twenty_million_bytes():
    assert sum(file.stat().st_size for file in CHECKPOINTS.rglob("*") if file.is_file()) < 20_000_000


@pytest.mark.parametrize(
    ("name", "model_class", "parameters"),
    [("llama-6m", "LlamaForCausalLM", 5_573_888), ("opt-4m", "OPTForCausalLM", 3_945_472)],
)
def test_they_load_as_what_they_are_called(name, model_class, parameters):
    model, tokenizer = _load(name)
    assert type(model).__name__ == model_class
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model.config.vocab_size == len(tokenizer) == 4096
    assert model.config.num_attention_heads == 8
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.bos_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_stored_as_finite_float16(name):
    with safe_open(CHECKPOINTS / name / "model.safetensors", framework="pt") as weights:
        for key in weights.keys():  # noqa: SIM118 - not a mapping
            tensor = weights.get_tensor(key)
            assert tensor.dtype == torch.float16
            assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("name", NAMES)
def test_linear_inputs_fit_groups_of_128(name):
    model, _ = _load(name)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert all(linear.in_features % 128 == 0 for linear in linears)


@pytest.mark.parametrize("name", NAMES)
def test_tokenizer_loses_nothing_and_adds_nothing(name):
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / name)
    chapters = " ".join(chapter.text for chapter in kjv_held_out_chapters()[:3])
    for text in (AWKWARD, "plain", chapters[:2000]):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert tokenizer("")["input_ids"] == []
    assert tokenizer.eos_token_id not in tokenizer("The quick brown fox.")["input_ids"]


def test_both_have_the_same_tokenizer():
    first, second = ((CHECKPOINTS / name / "tokenizer.json").read_bytes() for name in NAMES)
    assert first == second


@pytest.mark.parametrize(("name", "bound"), [("llama-6m", 1.50), ("opt-4m", 1.40)])
def test_they_have_learnt_the_style_of_the_held_out_books(name, bound):
    model, tokenizer = _load(name)
    texts = [chapter.text for chapter in kjv_held_out_chapters() if chapter.book in ("Ruth", "James")]
    assert bits_per_byte(model, tokenizer, texts).value < bound


@pytest.mark.parametrize("name", NAMES)
def test_the_card_says_what_was_recorded(name):
    directory = CHECKPOINTS / name
    record = json.loads((directory / "recipe.json").read_text("utf-8"))
    assert (directory / "README.md").read_text("utf-8") == render_card(record)
    assert record["steps"] == json.loads((directory / "schedule.json").read_text("utf-8"))["steps"]
    assert record["name"] == name


@pytest.mark.parametrize("name", NAMES)
def test_no_file_names_a_place_on_the_machine_it_came_from(name):
    for file in (CHECKPOINTS / name).iterdir():
        if file.suffix in {".json", ".md"} and file.name != "tokenizer.json":
            text = file.read_text("utf-8")
            assert not any(place in text for place in ("/tmp", "/work", "/root", "/home", "/opt"))
