"""Tiny random models of every family, built once per test."""

from __future__ import annotations

import os
import sys

# Two threads that wait for each other on a busy machine take a hundred times as long as one. Said before
# torch is imported, which reads it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.processes import *  # noqa: F403 - hooks, which pytest looks for here

# No test reaches a network: those of the hub talk to one on this machine.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


_MAIN = sys.modules["__main__"]


@pytest.fixture(autouse=True)
def _main_module():
    """Streamlit's AppTest leaves its page as ``__main__``, which every spawned process would run then."""
    yield
    sys.modules["__main__"] = _MAIN


def _seeded(make, config):
    torch.manual_seed(0)
    return make(config).eval()


@pytest.fixture
def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return _seeded(
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
        ),
    )


@pytest.fixture
def tiny_opt():
    from transformers import OPTConfig, OPTForCausalLM

    return _seeded(
        OPTForCausalLM,
        OPTConfig(
            vocab_size=256,
            hidden_size=64,
            ffn_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=64,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=2,
        ),
    )


@pytest.fixture
def tiny_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    from harness.nn.surgery import conv1d_to_linear

    model = _seeded(
        GPT2LMHeadModel,
        GPT2Config(
            vocab_size=256,
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_positions=128,
            bos_token_id=0,
            eos_token_id=0,
        ),
    )
    conv1d_to_linear(model)
    return model


@pytest.fixture
def tiny_bert():
    from transformers import BertConfig, BertModel

    return _seeded(
        BertModel,
        BertConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
        ),
    )
