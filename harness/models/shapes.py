"""Architectures by name: `shape:` (real sizes, random weights) and `scratch:` (small, untrained).

Sizes are those of the published configurations; the parameter counts are tested.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from harness.errors import UnknownName

__all__ = ["SCRATCH", "SHAPES", "build_config"]


def _llama(hidden: int, layers: int, heads: int, ffn: int, **more: Any) -> Mapping[str, Any]:
    return MappingProxyType(
        {
            "model_type": "llama",
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": more.pop("kv_heads", heads),
            "intermediate_size": ffn,
            "vocab_size": more.pop("vocab_size", 32000),
            "max_position_embeddings": more.pop("max_positions", 4096),
            "tie_word_embeddings": more.pop("tied", False),
            **more,
        }
    )


def _opt(hidden: int, layers: int, heads: int, **more: Any) -> Mapping[str, Any]:
    return MappingProxyType(
        {
            "model_type": "opt",
            "hidden_size": hidden,
            "word_embed_proj_dim": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "ffn_dim": more.pop("ffn", 4 * hidden),
            "vocab_size": more.pop("vocab_size", 50272),
            "max_position_embeddings": more.pop("max_positions", 2048),
            "tie_word_embeddings": True,
            **more,
        }
    )


SHAPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama-15m": _llama(288, 6, 6, 768, max_positions=256, tied=True),
        "llama-160m": _llama(768, 12, 12, 2048, max_positions=2048),
        "llama-1b": _llama(2048, 22, 32, 5632, kv_heads=4, max_positions=2048),
        "llama-7b": _llama(4096, 32, 32, 11008),
        "llama-13b": _llama(5120, 40, 40, 13824),
        "llama-3.1-8b": _llama(
            4096,
            32,
            32,
            14336,
            kv_heads=8,
            vocab_size=128256,
            max_positions=131072,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        ),
        "opt-125m": _opt(768, 12, 12),
        "opt-1.3b": _opt(2048, 24, 32),
        "opt-6.7b": _opt(4096, 32, 32),
        "gpt2": MappingProxyType(
            {
                "model_type": "gpt2",
                "n_embd": 768,
                "n_layer": 12,
                "n_head": 12,
                "n_positions": 1024,
                "vocab_size": 50257,
            }
        ),
        "bert-base": MappingProxyType(
            {
                "model_type": "bert",
                "hidden_size": 768,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "intermediate_size": 3072,
                "vocab_size": 30522,
                "max_position_embeddings": 512,
            }
        ),
    }
)
"""Real architectures. Accuracy of random weights means nothing, so tasks refuse them."""

ZOO_VOCABULARY = 4096

SCRATCH: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama-nano": _llama(96, 3, 4, 256, vocab_size=ZOO_VOCABULARY, max_positions=512, tied=True),
        "llama-pico": _llama(72, 3, 4, 192, vocab_size=ZOO_VOCABULARY, max_positions=512, tied=True),
        "llama-tiny": _llama(256, 6, 8, 640, vocab_size=ZOO_VOCABULARY, max_positions=1024, tied=True),
        "opt-nano": _opt(96, 3, 4, ffn=384, vocab_size=ZOO_VOCABULARY, max_positions=512),
    }
)
"""Small untrained models with the zoo's tokenizer."""


def build_config(source: str, name: str) -> Any:
    """A transformers configuration for a name of `SHAPES` (source ``shape``) or `SCRATCH`.

    Raises:
        UnknownName: there is no such name.
    """
    from transformers import AutoConfig

    table = SHAPES if source == "shape" else SCRATCH
    if name not in table:
        raise UnknownName(f"{source} model", name, table)
    sizes = dict(table[name])
    return AutoConfig.for_model(sizes.pop("model_type"), **sizes)
