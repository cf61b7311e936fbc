"""Where the parts of a Transformer are, family by family.

Methods speak of "the blocks", "the query projection" or "the norm before the FFN"; this module says
where those are in the Llama, OPT, GPT-2 and BERT families of transformers. One table, no dispatch on
substrings: a family that is not in the table is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from harness.errors import NotApplicable

__all__ = ["ANATOMIES", "Anatomy", "NormSite", "anatomy_of", "blocks_of", "norm_sites", "sharing_input"]


@dataclass(frozen=True, slots=True)
class NormSite:
    """A normalisation (name inside the block) and all the linear layers that read its output.

    Scaling a channel of the norm and unscaling that input column of every consumer preserves the
    function, provided that nothing else reads the norm (`residual_reads_norm`).
    """

    norm: str
    consumers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Names of the parts: `blocks`, `embedding`, `final_norm` and `head` from the model's root (the
    first candidate that exists), the rest from a block."""

    family: str
    blocks: tuple[str, ...]
    embedding: tuple[str, ...]
    final_norm: tuple[str, ...]
    head: tuple[str, ...]
    attention: str  # the module that holds the projections
    qkv: tuple[str, ...]  # (query, key, value), or one fused projection
    out: str
    ffn_in: tuple[str, ...]  # (gate, up) or (up,)
    ffn_out: str
    norm_sites: tuple[NormSite, ...]
    residual_reads_norm: bool  # post-norm: the residual branch reads the norm's output as well
    positions: str  # rope | learned

    @property
    def linears(self) -> tuple[str, ...]:
        """The linear layers of a block in the order in which they run."""
        return (*self.qkv, self.out, *self.ffn_in, self.ffn_out)

    @property
    def sequential_groups(self) -> tuple[tuple[str, ...], ...]:
        """The linears of a block in groups that read the same input, in the order in which they run."""
        return (self.qkv, (self.out,), self.ffn_in, (self.ffn_out,))


_LLAMA_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

ANATOMIES = {
    "llama": Anatomy(
        family="llama",
        blocks=("model.layers", "layers"),
        embedding=("model.embed_tokens", "embed_tokens"),
        final_norm=("model.norm", "norm"),
        head=("lm_head",),
        attention="self_attn",
        qkv=_LLAMA_QKV,
        out="self_attn.o_proj",
        ffn_in=("mlp.gate_proj", "mlp.up_proj"),
        ffn_out="mlp.down_proj",
        norm_sites=(
            NormSite("input_layernorm", _LLAMA_QKV),
            NormSite("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ),
        residual_reads_norm=False,
        positions="rope",
    ),
    "opt": Anatomy(
        family="opt",
        blocks=("model.decoder.layers", "decoder.layers"),
        embedding=("model.decoder.embed_tokens", "decoder.embed_tokens"),
        final_norm=("model.decoder.final_layer_norm", "decoder.final_layer_norm"),
        head=("lm_head",),
        attention="self_attn",
        qkv=_LLAMA_QKV,
        out="self_attn.out_proj",
        ffn_in=("fc1",),
        ffn_out="fc2",
        norm_sites=(
            NormSite("self_attn_layer_norm", _LLAMA_QKV),
            NormSite("final_layer_norm", ("fc1",)),
        ),
        residual_reads_norm=False,
        positions="learned",
    ),
    "gpt2": Anatomy(
        family="gpt2",
        blocks=("transformer.h", "h"),
        embedding=("transformer.wte", "wte"),
        final_norm=("transformer.ln_f", "ln_f"),
        head=("lm_head",),
        attention="attn",
        qkv=("attn.c_attn",),
        out="attn.c_proj",
        ffn_in=("mlp.c_fc",),
        ffn_out="mlp.c_proj",
        norm_sites=(NormSite("ln_1", ("attn.c_attn",)), NormSite("ln_2", ("mlp.c_fc",))),
        residual_reads_norm=False,
        positions="learned",
    ),
    "bert": Anatomy(
        family="bert",
        blocks=("bert.encoder.layer", "encoder.layer"),
        embedding=("bert.embeddings.word_embeddings", "embeddings.word_embeddings"),
        final_norm=(),
        head=("cls.predictions.decoder", "classifier"),
        attention="attention.self",
        qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
        out="attention.output.dense",
        ffn_in=("intermediate.dense",),
        ffn_out="output.dense",
        norm_sites=(NormSite("attention.output.LayerNorm", ("intermediate.dense",)),),
        residual_reads_norm=True,
        positions="learned",
    ),
}


def anatomy_of(model: nn.Module) -> Anatomy:
    """The anatomy of a transformers model.

    Raises:
        NotApplicable: the architecture is not one of the families in `ANATOMIES`.
    """
    from harness.models.info import info_from_config

    config = getattr(model, "config", None)
    family = info_from_config(config, "").family if config is not None else "other"
    if family not in ANATOMIES:
        name = getattr(config, "model_type", type(model).__name__)
        raise NotApplicable(f"architecture {name!r} is not known; known families: {', '.join(ANATOMIES)}")
    return ANATOMIES[family]


def find(model: nn.Module, candidates: tuple[str, ...]) -> tuple[str, nn.Module] | None:
    """The first of the dotted names that exists, with its module."""
    for name in candidates:
        try:
            return name, model.get_submodule(name)
        except AttributeError:
            continue
    return None


def blocks_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks (decoder or encoder layers) in order, with their full names."""
    anatomy = anatomy_of(model)
    found = find(model, anatomy.blocks)
    if found is None:
        raise NotApplicable(f"{type(model).__name__} has none of {', '.join(anatomy.blocks)}")
    prefix, container = found
    return [(f"{prefix}.{name}", block) for name, block in container.named_children()]


def norm_sites(model: nn.Module) -> tuple[NormSite, ...]:
    """The norms of a block with their consumers; raises `NotApplicable` as `anatomy_of` does.

    Post-norm OPT models (``do_layer_norm_before=False``, OPT-350m) read the norm in the residual
    branch too, so they have no site that can be folded.
    """
    anatomy = anatomy_of(model)
    config = getattr(model, "config", None)
    if anatomy.family == "opt" and not getattr(config, "do_layer_norm_before", True):
        return ()
    return anatomy.norm_sites


def sharing_input(names: list[str], groups: tuple[tuple[str, ...], ...]) -> list[list[str]]:
    """The layers of a block in the order in which they run, those that read the same input together."""
    found = [[name for name in group if name in names] for group in groups]
    known = {name for group in groups for name in group}
    return [group for group in found if group] + [[name] for name in names if name not in known]
