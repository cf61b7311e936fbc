"""The facts about a model that can be known from its configuration, before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness.errors import ConfigError

__all__ = ["ModelInfo", "info_from_config"]

_FAMILIES = {
    "llama": ("llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3"),
    "opt": ("opt",),
    "gpt2": ("gpt2",),
    "bert": ("bert",),
}

# transformers loads these as causal language models too, where `is_decoder` in their configuration is the
# only thing that hides the tokens that follow. Without it their perplexity would be that of a copy.
_SEE_WHAT_FOLLOWS = frozenset({
    "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
    "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta",
    "xlm-roberta-xl", "xmod",
})  # fmt: skip


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
    head_size: int | None = None  # of a head, where the configuration gives it (Qwen3, Gemma)

    @property
    def head_dim(self) -> int:
        return self.head_size or self.hidden_size // self.num_heads


# The largest Transformers have a tenth of these; what is larger is a slip or an attack on the memory.
_MOST = {
    "hidden_size": 2**18,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**16,
    "intermediate_size": 2**20,
    "ffn_dim": 2**20,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**30,
}
_OPTIONAL = ("num_key_value_heads", "head_dim", "intermediate_size", "ffn_dim", "max_position_embeddings")


def _check_sizes(config: Any, label: str) -> None:
    """Refuse sizes that no model has.

    Raises:
        ConfigError: a size that is no whole number, below 1 or absurd.
        AttributeError: a size that every Transformer has is absent.
    """
    for name, most in _MOST.items():
        value = getattr(config, name, None) if name in _OPTIONAL else getattr(config, name)
        if value is None and name in _OPTIONAL:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ConfigError(
                f"model {label!r}: its config.json says {name} {value!r}; "
                f"it must be a number from 1 to {most:,}"
            )
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if kv_heads is not None and heads % kv_heads:
        raise ConfigError(
            f"model {label!r}: {heads} heads cannot share {kv_heads} key and value heads evenly"
        )


def info_from_config(
    config: Any,
    label: str,
    *,
    synthetic: bool = False,
    scratch: bool = False,
    modifiers: tuple[str, ...] = (),
) -> ModelInfo:
    """Read a transformers configuration (a `PreTrainedConfig`).

    Raises:
        ConfigError: sizes that no model has, or an encoder that would be measured as a decoder.
        AttributeError: a size that every Transformer has is absent.
    """
    model_type = config.model_type
    is_decoder = getattr(config, "is_decoder", False)
    if model_type in _SEE_WHAT_FOLLOWS and not is_decoder:
        raise ConfigError(
            f"model {label!r}: {model_type!r} is an encoder, and of encoders the harness knows BERT only: "
            "as a decoder it would see the tokens that it is to predict"
        )
    _check_sizes(config, label)
    family = next((name for name, types in _FAMILIES.items() if model_type in types), "other")
    heads = config.num_attention_heads
    ffn = (
        getattr(config, "intermediate_size", None)
        or getattr(config, "ffn_dim", None)
        or getattr(config, "n_inner", None)
        or 4 * config.hidden_size
    )
    is_encoder = family == "bert" and not is_decoder
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
        head_size=getattr(config, "head_dim", None),
    )
