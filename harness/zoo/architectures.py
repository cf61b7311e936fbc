"""The two architectures of the zoo, as Hugging Face models with random weights."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from harness.errors import ConfigError

__all__ = ["ARCHITECTURES", "Architecture", "build_model", "count_parameters"]


@dataclass(frozen=True)
class Architecture:
    """The shape of a decoder; widths in features, `context_tokens` in tokens."""

    family: str
    layers: int
    ffn_width: int
    width: int = 256
    heads: int = 8
    context_tokens: int = 1024

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} is not divisible by {self.heads} heads")

    @property
    def description(self) -> str:
        """The shape in words, for the model card."""
        parts = {
            "llama": "RMSNorm, rotary positions, SwiGLU",
            "opt": "LayerNorm, learned positions, ReLU, biases",
        }
        return (
            f"{self.layers} pre-norm layers, width {self.width}, {self.heads} attention heads, "
            f"feed-forward width {self.ffn_width}, {parts[self.family]}, "
            f"{self.context_tokens:,} positions"
        )


# Both feed-forward widths are multiples of 128, so that 128-wide quantization groups fit.
ARCHITECTURES = {
    "llama": Architecture("llama", layers=6, ffn_width=640),
    "opt": Architecture("opt", layers=4, ffn_width=768),
}


def build_model(architecture: Architecture, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The model in float32, weights drawn from torch's global generator."""
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": architecture.width,
        "num_hidden_layers": architecture.layers,
        "num_attention_heads": architecture.heads,
        "max_position_embeddings": architecture.context_tokens,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if architecture.family == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                **common,
                intermediate_size=architecture.ffn_width,
                num_key_value_heads=architecture.heads,
                rms_norm_eps=1e-5,
            )
        )
    return OPTForCausalLM(
        OPTConfig(
            **common,
            ffn_dim=architecture.ffn_width,
            word_embed_proj_dim=architecture.width,
            do_layer_norm_before=True,
            activation_function="relu",
            dropout=0.0,  # too few epochs over too much text for so small a model to overfit
        )
    )


def count_parameters(model: PreTrainedModel) -> int:
    """Parameters of the model, a tied matrix counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
