"""The facts about a model that can be known from its configuration, before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["ModelInfo", "info_from_config"]

_FAMILIES = {
    "llama": ("llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3"),
    "opt": ("opt",),
    "gpt2": ("gpt2",),
    "bert": ("bert",),
}


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a method's `applies` and the grid may know of a model.

    Sizes are in units of features (widths), tokens (positions) and counts (layers, heads).
    """

    label: str  # as the user wrote it
    family: str  # llama | opt | gpt2 | bert | other: the anatomy that module surgery uses
    model_type: str  # transformers' own name of the architecture
    kind: str  # decoder | encoder
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    max_positions: int
    tied_embeddings: bool
    synthetic: bool = False  # random weights: speed and memory only
    scratch: bool = False  # untrained: the context's training loop trains it after the transform
    modifiers: tuple[str, ...] = ()

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


def info_from_config(
    config: Any,
    label: str,
    *,
    synthetic: bool = False,
    scratch: bool = False,
    modifiers: tuple[str, ...] = (),
) -> ModelInfo:
    """Read a transformers configuration (a `PreTrainedConfig`)."""
    model_type = config.model_type
    family = next((name for name, types in _FAMILIES.items() if model_type in types), "other")
    heads = config.num_attention_heads
    ffn = (
        getattr(config, "intermediate_size", None)
        or getattr(config, "ffn_dim", None)
        or getattr(config, "n_inner", None)
        or 4 * config.hidden_size
    )
    is_encoder = family == "bert" and not getattr(config, "is_decoder", False)
    return ModelInfo(
        label=label,
        family=family,
        model_type=model_type,
        kind="encoder" if is_encoder else "decoder",
        hidden_size=config.hidden_size,
        ffn_size=ffn,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        vocab_size=config.vocab_size,
        max_positions=getattr(config, "max_position_embeddings", None) or 2048,
        tied_embeddings=bool(getattr(config, "tie_word_embeddings", True)),
        synthetic=synthetic,
        scratch=scratch,
        modifiers=modifiers,
    )
