"""A small tokenizer and small models with its vocabulary, all made here from a seed."""

from __future__ import annotations

import pytest
import torch

from harness.corpus import kjv_books
from harness.models.info import info_from_config

VOCAB = 384
POSITIONS = 128


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE of a few chapters; begins and ends texts with one token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(kjv_books()["Genesis"][:5], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<end>",
        eos_token="<end>",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def make_llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,  # far from uniform, so that wrong positions would show
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


@pytest.fixture
def model():
    return make_llama()


@pytest.fixture
def info(model):
    return info_from_config(model.config, "small-llama")


@pytest.fixture
def cache_dir(tmp_path, monkeypatch):
    """An empty cache folder for this test alone."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("HARNESS_CACHE", str(folder))
    return folder
