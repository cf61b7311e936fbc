"""Tiny random models of every family, small enough to transform and run many times in a test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from harness.errors import UnknownName
from harness.nn.surgery import conv1d_to_linear

__all__ = ["TINY_FAMILIES", "TinyTokenizer", "tiny_model"]

_VOCAB, _WIDTH, _FFN, _HEADS, _POSITIONS = 256, 128, 256, 4, 128


def _llama(layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_VOCAB,
        hidden_size=_WIDTH,
        intermediate_size=_FFN,
        num_hidden_layers=layers,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS,
        max_position_embeddings=_POSITIONS,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def _opt(layers: int) -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=_VOCAB,
        hidden_size=_WIDTH,
        word_embed_proj_dim=_WIDTH,
        ffn_dim=_FFN,
        num_hidden_layers=layers,
        num_attention_heads=_HEADS,
        max_position_embeddings=_POSITIONS,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    return OPTForCausalLM(config)


def _gpt2(layers: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=_VOCAB,
        n_embd=_WIDTH,
        n_inner=_FFN,
        n_layer=layers,
        n_head=_HEADS,
        n_positions=_POSITIONS,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def _bert(layers: int) -> Any:
    from transformers import BertForMaskedLM

    return BertForMaskedLM(_bert_config(layers))


def _encoder(layers: int) -> Any:
    from transformers import BertModel

    return BertModel(_bert_config(layers))


def _bert_config(layers: int) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=_VOCAB,
        hidden_size=_WIDTH,
        intermediate_size=_FFN,
        num_hidden_layers=layers,
        num_attention_heads=_HEADS,
        max_position_embeddings=_POSITIONS,
    )


_MAKERS: Mapping[str, Callable[[int], Any]] = {
    "llama": _llama,
    "opt": _opt,
    "gpt2": _gpt2,
    "bert": _bert,
    "encoder": _encoder,
}

TINY_FAMILIES = tuple(_MAKERS)
"""Decoders (llama, opt, gpt2), a masked language model (bert), a bare sentence encoder (encoder)."""


class TinyTokenizer:
    """The numbers that a tokenizer of the tiny models would give; it reads no text."""

    vocab_size = _VOCAB
    pad_token_id, unk_token_id, cls_token_id, sep_token_id, mask_token_id = range(5)
    all_special_ids = (0, 1, 2, 3, 4)


def tiny_model(family: str, *, seed: int = 0, layers: int = 2) -> nn.Module:
    """A random float32 model in eval mode: width 128, FFN 256, 4 heads, 256 tokens, 128 positions.

    The global random state is left as it was.

    Raises:
        UnknownName: there is no such family.
    """
    if family not in _MAKERS:
        raise UnknownName("tiny model", family, _MAKERS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = _MAKERS[family](layers)
    conv1d_to_linear(model)
    return model.eval()
