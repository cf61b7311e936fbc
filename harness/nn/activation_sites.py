"""Where the activations of a Transformer are, and how to put something there.

A *site* is one activation tensor: the sum after attention in block 3, the probabilities of block 0. The
tensors of a block have the same names in every family (`KINDS`); an activation function belongs to the
linear layer before it and dropout is nothing, as in Bondarenko et al. 2021 (arXiv:2109.12948).

Each site is the input or the output of a module that exists already, so a small module can be put there
as its child, called by a hook: no class, no name and no weight changes, and what is put there is saved,
copied, moved and compiled with the model. Queries, keys, values, scores and probabilities exist only
inside the attention function: there the model's attention is swapped for one in plain torch that stops
at each of them, and so gives up the fused kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from harness.errors import NotApplicable
from harness.nn.anatomy import Anatomy, anatomy_of, blocks_of, find
from harness.nn.attention import swap_attention

__all__ = [
    "IN_ATTENTION",
    "KINDS",
    "Site",
    "activation_sites",
    "at_sites",
    "inputs_of_linears",
    "observe_sites",
    "put_for_now",
    "run",
]

IN_ATTENTION = ("query", "key", "value", "scores", "probs")
"""What only the attention function sees; keys and queries after a rotary embedding."""

KINDS = {
    "embedding_sum": "sum of the embeddings, the first block's input",
    "embedding_norm": "its norm (post-norm)",
    "attn_in": "norm output that query, key and value read (pre-norm)",
    "query": "queries",
    "key": "keys",
    "value": "values",
    "scores": "scaled q·k, before the mask and softmax",
    "probs": "softmax output",
    "context": "probabilities times values, the input of the output projection",
    "attn_out": "output of the output projection",
    "attn_sum": "residual sum after attention",
    "ffn_in": "norm output that the FFN reads",
    "ffn_gate": "activated gate (gated FFN)",
    "ffn_up": "up projection (gated FFN)",
    "ffn_hidden": "input of the down projection",
    "ffn_out": "output of the FFN",
    "ffn_sum": "residual sum after the FFN",
    "block_out": "its norm, the next block's input (post-norm)",
    "head_in": "final norm's output (pre-norm)",
    "logits": "output of the head",
}
"""All kinds of sites, in the order in which they are computed."""

_NORMS = {
    "llama": ("input_layernorm", "post_attention_layernorm"),
    "opt": ("self_attn_layer_norm", "final_layer_norm"),
    "gpt2": ("ln_1", "ln_2"),
    "bert": ("attention.output.LayerNorm", "output.LayerNorm"),
}
_EMBEDDING_NORMS = ("bert.embeddings.LayerNorm", "embeddings.LayerNorm")
_GPT2_DROPOUT = ("transformer.drop", "drop")
_GATE = "mlp.act_fn"
_SITES = "activation_sites"  # the children of an attention, and the name of the swapped attention
_CHILD = {"input": "at_input", "in_place": "at_input", "output": "at_output"}

Where = Literal["input", "in_place", "output", "attention"]
See = Callable[["Site", torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class Site:
    """One activation tensor: `kind`, the block it is computed in, and the module it enters or leaves.

    ``in_place`` is an input that the residual branch reads as well: it is changed where it lies.
    """

    kind: str
    block: int | None
    module: str
    where: Where

    @property
    def name(self) -> str:
        return self.kind if self.block is None else f"{self.block}.{self.kind}"


# --- where the sites are --------------------------------------------------------------------------


def activation_sites(model: nn.Module) -> list[Site]:
    """All sites of a model in the order in which they are computed.

    Raises:
        NotApplicable: an unknown family, or post-norm OPT.
    """
    anatomy = anatomy_of(model)
    if not getattr(model.config, "do_layer_norm_before", True):
        raise NotApplicable("the activation sites of post-norm OPT models are not known")
    blocks = blocks_of(model)
    is_post = anatomy.residual_reads_norm
    sites: list[Site] = []
    if is_post:
        name = _existing(model, _EMBEDDING_NORMS)
        sites += [Site("embedding_sum", None, name, "input"), Site("embedding_norm", None, name, "output")]
    for index, (prefix, _) in enumerate(blocks):
        if not is_post:
            # What a block's first norm reads is what the block before it summed up.
            norm = f"{prefix}.{_NORMS[anatomy.family][0]}"
            if index:
                sites.append(Site("ffn_sum", index - 1, norm, "in_place"))
            else:
                sites.append(_embedding_sum(model, anatomy, norm))
        sites += _block_sites(anatomy, index, prefix, is_post)
    if not is_post:
        final = _existing(model, anatomy.final_norm)
        sites += [Site("ffn_sum", len(blocks) - 1, final, "input"), Site("head_in", None, final, "output")]
    head = find(model, anatomy.head)
    if head is not None:
        sites.append(Site("logits", None, head[0], "output"))
    return sites


def _embedding_sum(model: nn.Module, anatomy: Anatomy, first_norm: str) -> Site:
    """Where the first block's input is made; only OPT's sum leaves no module of its own."""
    if anatomy.family == "opt":
        return Site("embedding_sum", None, first_norm, "in_place")
    candidates = anatomy.embedding if anatomy.family == "llama" else _GPT2_DROPOUT
    return Site("embedding_sum", None, _existing(model, candidates), "output")


def _block_sites(anatomy: Anatomy, index: int, prefix: str, is_post: bool) -> Iterator[Site]:
    def site(kind: str, module: str, where: Where) -> Site:
        return Site(kind, index, f"{prefix}.{module}", where)

    first, second = _NORMS[anatomy.family]
    if not is_post:
        yield site("attn_in", first, "output")
    for kind in IN_ATTENTION:
        yield site(kind, anatomy.attention, "attention")
    yield site("context", anatomy.out, "input")
    yield site("attn_out", anatomy.out, "output")
    if is_post:
        yield site("attn_sum", first, "input")
        yield site("ffn_in", first, "output")
    else:
        yield site("attn_sum", second, "in_place")
        yield site("ffn_in", second, "output")
    if len(anatomy.ffn_in) == 2:
        yield site("ffn_gate", _GATE, "output")
        yield site("ffn_up", anatomy.ffn_in[1], "output")
    yield site("ffn_hidden", anatomy.ffn_out, "input")
    yield site("ffn_out", anatomy.ffn_out, "output")
    if is_post:
        yield site("ffn_sum", second, "input")
        yield site("block_out", second, "output")


def inputs_of_linears(model: nn.Module, sites: Sequence[Site]) -> dict[str, Site]:
    """The site that each linear layer inside the blocks reads, by the layer's full name."""
    anatomy = anatomy_of(model)
    found = {(site.kind, site.block): site for site in sites}
    reads: dict[str, Site] = {}
    for index, (prefix, _) in enumerate(blocks_of(model)):
        if anatomy.residual_reads_norm:
            attn_in = found["block_out", index - 1] if index else found["embedding_norm", None]
        else:
            attn_in = found["attn_in", index]
        for names, site in (
            (anatomy.qkv, attn_in),
            ((anatomy.out,), found["context", index]),
            (anatomy.ffn_in, found["ffn_in", index]),
            ((anatomy.ffn_out,), found["ffn_hidden", index]),
        ):
            reads |= {f"{prefix}.{name}": site for name in names}
    return reads


def _existing(model: nn.Module, candidates: tuple[str, ...]) -> str:
    found = find(model, candidates)
    if found is None:
        raise NotApplicable(f"{type(model).__name__} has none of {', '.join(candidates)}")
    return found[0]


# --- putting something there ----------------------------------------------------------------------


def at_sites(model: nn.Module, modules: Mapping[Site, nn.Module]) -> list[RemovableHandle]:
    """Put a module at each site: what it makes of the tensor takes the tensor's place.

    It becomes a child of the site's module; a module put at the same site later takes its place. What
    is put into an attention runs only after the attention is swapped, which this does.

    Returns:
        the handles of the new hooks.

    Raises:
        NotApplicable: the attention was swapped by another method, or cannot be.
    """
    handles = []
    inside: dict[str, nn.ModuleDict] = {}
    for site, module in _alike(model, modules).items():
        host = model.get_submodule(site.module)
        if site.where == "attention":
            if not hasattr(host, _SITES):
                host.add_module(_SITES, nn.ModuleDict())
            inside[site.module] = host.get_submodule(_SITES)  # type: ignore[assignment]
            inside[site.module][site.kind] = module
            continue
        child = _CHILD[site.where]
        is_new = not hasattr(host, child)
        host.add_module(child, module)
        if is_new and site.where == "output":
            handles.append(host.register_forward_hook(_replace_output))
        elif is_new:
            hook = _replace_input if site.where == "input" else _replace_input_in_place
            handles.append(host.register_forward_pre_hook(hook))
    implementation = str(getattr(model.config, "_attn_implementation", ""))
    if inside and implementation != f"harness_{_SITES}":
        if implementation.startswith("harness_"):
            raise NotApplicable("the attention was already changed by another step of the chain")
        swap_attention(model, _SITES, _attend, mask="eager")
    return handles


def _alike(model: nn.Module, modules: Mapping[Site, nn.Module]) -> dict[Site, nn.Module]:
    """The modules, with identities where one block has a module and another has none.

    The compiler reuses the code of a block for the next without looking at hooks, but looks at the modules
    that the hooks call: where all blocks have the same hooks, different modules get code of their own.
    """
    prefixes = [prefix for prefix, _ in blocks_of(model)]
    places = {(site.module, site.where == "output") for site in modules}
    result = dict(modules)
    for site in modules:
        home = next((p for p in prefixes if site.module.startswith(f"{p}.")), None)
        if home is None or site.where == "attention":
            continue
        for prefix in prefixes:
            name = prefix + site.module.removeprefix(home)
            if (name, site.where == "output") not in places:
                result[Site("", prefixes.index(prefix), name, site.where)] = nn.Identity()
    return result


def _replace_input(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module.at_input(args[0]), *args[1:])


def _replace_input_in_place(module: Any, args: tuple[Any, ...]) -> None:
    # The sum was made a moment ago, and the residual branch reads the same memory.
    args[0].copy_(module.at_input(args[0]))


def _replace_output(module: Any, _args: tuple[Any, ...], output: torch.Tensor) -> Any:
    return module.at_output(output)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of [batch, heads, q, d] to [batch, kv_heads, kv, d] that stops at every site."""
    if extra := [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise NotApplicable(f"the model's attention also has {', '.join(extra)}")
    sites = module.get_submodule(_SITES)
    query, key, value = _at(sites, "query", query), _at(sites, "key", key), _at(sites, "value", value)
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is not None:
        mask = mask[..., : key.shape[2]]
    scores = _at(sites, "scores", scores, mask)
    if mask is not None:
        scores = scores + mask
    probs = _at(sites, "probs", scores.softmax(-1, dtype=torch.float32).to(query.dtype), mask)
    probs = functional.dropout(probs, dropout, module.training)
    return (probs @ value).transpose(1, 2).contiguous(), None


def _at(sites: Any, kind: str, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    if kind not in sites:
        return x
    site = sites[kind]
    if mask is not None and isinstance(site, _Watch):
        site(x[(mask > torch.finfo(mask.dtype).min / 2).expand_as(x)])  # hidden scores are never read
        return x
    changed: torch.Tensor = site(x)
    return changed


# --- looking --------------------------------------------------------------------------------------


class _Watch(nn.Module):
    """Shows a tensor to a function and hands it on."""

    def __init__(self, site: Site, see: See) -> None:
        super().__init__()
        self.site, self.see = site, see

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.see(self.site, x.detach())
        return x


@torch.no_grad()
def observe_sites(model: nn.Module, sites: Iterable[Site], batches: Iterable[torch.Tensor], see: See) -> None:
    """Run token ids [batch, tokens] and show ``see(site, x)`` every tensor x on its way.

    Scores and probabilities that the mask hides are left out, so those come flat. Afterwards the model is
    as it was.
    """
    with put_for_now(model, {site: _Watch(site, see) for site in sites}):
        for batch in batches:
            run(model, batch)


@contextmanager
def put_for_now(model: nn.Module, modules: Mapping[Site, nn.Module]) -> Iterator[None]:
    """`at_sites` while inside; before and after there is nothing at any of the sites. In eval mode."""
    was_training, config = model.training, model.config
    implementation = getattr(config, "_attn_implementation", None)
    model.eval()
    handles = at_sites(model, modules)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for site in _alike(model, modules):
            host = model.get_submodule(site.module)
            child = _SITES if site.where == "attention" else _CHILD[site.where]
            if hasattr(host, child):
                delattr(host, child)
        if getattr(config, "_attn_implementation", None) != implementation:
            model.set_attn_implementation(implementation)  # type: ignore[operator]
        model.train(was_training)


def run(model: nn.Module, tokens: torch.Tensor) -> Any:
    """The output of a model on token ids [batch, tokens], without a cache."""
    tokens = tokens.to(next(model.parameters()).device)
    options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    return model(input_ids=tokens, **options)
