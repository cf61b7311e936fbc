"""Outliers on demand: a rescaling that changes a model's activations and not its function.

Large language models have a few channels with activations tens of times larger than the rest; small
ones have not, so methods that deal with them have nothing to do there. Multiplying what makes a
channel by k and dividing what reads it by k plants such channels without changing the output: the
inverse of SmoothQuant's migration (Xiao et al. 2023, arXiv:2211.10438, equation 3). With k a power of
two every product stays the same number, so the logits are bit-identical.

Results on such a model must say so: the outliers are synthetic. At the sites behind a norm SmoothQuant
undoes the change exactly, by construction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from harness.errors import ConfigError, NotApplicable
from harness.nn.anatomy import Anatomy, anatomy_of, blocks_of, norm_sites

__all__ = ["SITES", "inject_outliers"]

SITES = ("norm", "ffn", "vo")
"""Behind the norms of a block; between the two halves of its FFN; between values and output."""


@torch.no_grad()
def inject_outliers(
    model: nn.Module,
    *,
    k: float = 64.0,
    channels: int = 4,
    sites: Sequence[str] = ("norm",),
    seed: int = 0,
) -> nn.Module:
    """Plant `channels` outlier channels, `k` times larger, at the sites; the same in every block.

    Args:
        model: of a known family, unquantized, `Conv1D` already turned into `nn.Linear`; changed in
            place and returned.
        k: the factor; a power of two keeps the outputs bit-identical.
        sites: some of `SITES`. ``ffn`` needs a gate that the factor passes through unchanged (Llama's
            up projection, OPT's ReLU); ``vo`` needs separate value and output projections.
        seed: of the choice of channels.

    Raises:
        ConfigError: a factor, a number of channels or a site that makes no sense.
        NotApplicable: the family has no such site.
    """
    if not (math.isfinite(k) and k > 0):
        raise ConfigError(f"outliers: k must be a positive number, not {k}")
    if channels < 1:
        raise ConfigError(f"outliers: channels must be at least 1, not {channels}")
    if not sites or len(set(sites)) != len(sites) or set(sites) - set(SITES):
        raise ConfigError(
            f"outliers: sites must be some of {', '.join(SITES)}, each once, not {', '.join(sites) or 'none'}"
        )
    anatomy = anatomy_of(model)
    # All sites are checked before the first weight is touched.
    for site in sites:
        _require(model, anatomy, site)
    blocks = [block for _, block in blocks_of(model)]
    for block in blocks:
        for name in anatomy.linears:
            _linear(block, name)
    chosen = {site: _choose(_width(blocks[0], anatomy, site), channels, site, seed) for site in sites}
    for block in blocks:
        for site in sites:
            _SCALERS[site](model, block, anatomy, chosen[site], k)
    return model


def _require(model: nn.Module, anatomy: Anatomy, site: str) -> None:
    config = getattr(model, "config", None)
    if site == "norm":
        if not norm_sites(model) or anatomy.residual_reads_norm:
            raise NotApplicable("outliers: this post-norm model's residual branch reads its norms")
        if getattr(config, "model_type", "").startswith("gemma"):
            raise NotApplicable("outliers: Gemma's norms store their gain minus one")
        norms = [blocks_of(model)[0][1].get_submodule(place.norm) for place in norm_sites(model)]
        if any(getattr(norm, "weight", None) is None for norm in norms):
            raise NotApplicable("outliers: this model's norms have no gain to scale")
    elif site == "ffn":
        relu = getattr(config, "activation_function", "") == "relu"
        if anatomy.family != "llama" and not (anatomy.family == "opt" and relu):
            raise NotApplicable(
                f"outliers: no factor passes through the activation of {anatomy.family} unchanged"
            )
    elif len(anatomy.qkv) != 3 or anatomy.family == "bert":
        raise NotApplicable(f"outliers: the vo site is defined for llama and opt, not {anatomy.family}")


def _width(block: nn.Module, anatomy: Anatomy, site: str) -> int:
    """How many channels there are to choose from at the site."""
    if site == "norm":
        return _linear(block, anatomy.qkv[0]).in_features
    return _linear(block, anatomy.ffn_out).in_features if site == "ffn" else _values(block, anatomy)


def _choose(width: int, channels: int, site: str, seed: int) -> torch.Tensor:
    if channels > width:
        raise ConfigError(f"outliers: channels={channels}, but the {site} site has {width}")
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(width, generator=generator)[:channels]


def _scale_norms(
    model: nn.Module, block: nn.Module, _anatomy: Anatomy, chosen: torch.Tensor, k: float
) -> None:
    for site in norm_sites(model):
        _scale_output(block.get_submodule(site.norm), chosen, k)
        for consumer in site.consumers:
            _scale_input(_linear(block, consumer), chosen, k)


def _scale_ffn(_model: nn.Module, block: nn.Module, anatomy: Anatomy, chosen: torch.Tensor, k: float) -> None:
    # Of gate and up, up is the one that the activation function does not see.
    _scale_output(_linear(block, anatomy.ffn_in[-1]), chosen, k)
    _scale_input(_linear(block, anatomy.ffn_out), chosen, k)


def _scale_values(
    model: nn.Module, block: nn.Module, anatomy: Anatomy, chosen: torch.Tensor, k: float
) -> None:
    value, out = _linear(block, anatomy.qkv[2]), _linear(block, anatomy.out)
    config = getattr(model, "config", None)
    head_dim = out.in_features // int(getattr(config, "num_attention_heads", 1))
    groups = out.in_features // value.out_features  # query heads that share a key-value head
    kv_head, within = chosen // head_dim, chosen % head_dim
    readers = [(kv_head * groups + member) * head_dim + within for member in range(groups)]
    _scale_output(value, chosen, k)
    _scale_input(out, torch.cat(readers), k)


_SCALERS = {"norm": _scale_norms, "ffn": _scale_ffn, "vo": _scale_values}


def _scale_output(module: nn.Module, chosen: torch.Tensor, k: float) -> None:
    """Multiply output channels: rows of a linear layer or gains of a norm, and their bias."""
    for tensor in (module.weight, getattr(module, "bias", None)):
        if isinstance(tensor, torch.Tensor):
            tensor[chosen.to(tensor.device)] *= k


def _scale_input(linear: nn.Linear, chosen: torch.Tensor, k: float) -> None:
    linear.weight[:, chosen.to(linear.weight.device)] /= k


def _linear(block: nn.Module, name: str) -> nn.Linear:
    module = block.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise NotApplicable(
            f"outliers: {name} is no nn.Linear but {type(module).__name__}; plant outliers first"
        )
    return module


def _values(block: nn.Module, anatomy: Anatomy) -> int:
    return _linear(block, anatomy.qkv[2]).out_features
