"""Fewer key-value heads than query heads, in every decoder family.

Llama's own attention can have any number of key-value heads. OPT's and GPT-2's cannot, so theirs
are replaced here by modules with the same names of projections, the same arithmetic and the same
calls, whose keys and values are narrower. With as many key-value heads as query heads they compute
exactly what the original computes.

A decode step reads each shared head once: transformers would repeat it for every query head first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from harness.errors import ConfigError, NotApplicable
from harness.nn.anatomy import anatomy_of, blocks_of
from harness.nn.attention import keep_bands, swap_attention
from harness.nn.narrowing import require_described_heads
from harness.nn.sdpa import shared_heads_sdpa
from harness.nn.surgery import linear_from, replace_module

__all__ = ["FusedGroupedAttention", "GroupedAttention", "regroup_key_values"]

Pool = Callable[[torch.Tensor, int], torch.Tensor]


def regroup_key_values(model: nn.Module, groups: int, pool: Pool) -> nn.Module:
    """Give a decoder `groups` key-value heads, in place; returns it.

    Args:
        pool: ``pool(heads [kv_heads, head_dim, ...], groups) -> [groups, head_dim, ...]``, called
            for the key and value weights [kv_heads, head_dim, d] and biases [kv_heads, head_dim].

    Raises:
        ConfigError: `groups` does not divide the model's number of key-value heads.
        NotApplicable: the family has no such attention, or another method replaced the projections or
            took heads out of single blocks.
    """
    require_described_heads(model)
    anatomy = anatomy_of(model)
    config: Any = model.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if groups < 1 or kv_heads % groups:
        raise ConfigError(f"groups={groups} does not divide the model's {kv_heads} key-value heads")
    for prefix, block in blocks_of(model):
        name = f"{prefix}.{anatomy.attention}"
        attention: Any = model.get_submodule(name)
        projections = [block.get_submodule(part) for part in anatomy.qkv if _has(block, part)]
        if len(projections) < len(anatomy.qkv) or not all(
            isinstance(projection, nn.Linear) for projection in projections
        ):
            raise NotApplicable(f"{name} has no plain query, key and value projections to pool")
        if anatomy.family == "llama":
            _regroup_llama(attention, heads, kv_heads, groups, pool)
        elif anatomy.family == "opt":
            replace_module(model, name, GroupedAttention(attention, kv_heads, groups, pool))
        elif anatomy.family == "gpt2":
            replace_module(model, name, FusedGroupedAttention(attention, kv_heads, groups, pool))
        else:
            raise NotApplicable(f"{anatomy.family} models keep no key-value cache")
    config.num_key_value_heads = groups
    if config._attn_implementation == "sdpa":
        swap_attention(model, "shared_heads", _shared_heads_attention, mask="sdpa")
    return model


def _shared_heads_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' own `sdpa`, except that a decode step does not repeat the shared heads."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if query.shape[2] == 1:
        out = shared_heads_sdpa(query, key, value, attention_mask, dropout=dropout, scaling=scaling)
        return out, None
    output: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return output


def _has(block: nn.Module, name: str) -> bool:
    try:
        block.get_submodule(name)
    except AttributeError:
        return False
    return True


def _regroup_llama(attention: Any, heads: int, kv_heads: int, groups: int, pool: Pool) -> None:
    attention.k_proj = _pooled(attention.k_proj, kv_heads, groups, pool)
    attention.v_proj = _pooled(attention.v_proj, kv_heads, groups, pool)
    attention.num_key_value_groups = heads // groups
    if hasattr(attention, "num_key_value_heads"):
        attention.num_key_value_heads = groups


def _pooled(linear: nn.Linear, kv_heads: int, groups: int, pool: Pool) -> nn.Linear:
    weight = _pool_rows(linear.weight, kv_heads, groups, pool)
    bias = None if linear.bias is None else _pool_rows(linear.bias, kv_heads, groups, pool)
    return linear_from(weight, bias)


@torch.no_grad()
def _pool_rows(rows: torch.Tensor, kv_heads: int, groups: int, pool: Pool) -> torch.Tensor:
    """[kv_heads * head_dim, ...] -> [groups * head_dim, ...]; one group a head: the rows themselves."""
    if groups == kv_heads:
        return rows
    pooled = pool(rows.detach().unflatten(0, (kv_heads, -1)), groups).flatten(0, 1)
    return pooled.to(rows.dtype).contiguous().requires_grad_(rows.requires_grad)


class _Grouped(nn.Module):
    """What both replacements share: the heads, the cache, and transformers' attention by name."""

    def __init__(self, original: Any, groups: int) -> None:
        super().__init__()
        self.config = original.config
        self.layer_idx = original.layer_idx
        self.num_heads = original.num_heads
        self.head_dim = original.head_dim
        self.scaling = original.scaling
        self.is_causal = True
        self.num_key_value_heads = groups
        self.num_key_value_groups = original.num_heads // groups
        keep_bands(original, self)

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, key_value_heads={self.num_key_value_heads}"

    def _split(self, states: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, heads * head_dim] -> [batch, heads, tokens, head_dim]."""
        return states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        past_key_values: Any,
        attention_mask: Any,
        *,
        scaling: float,
        dropout: float,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
        from transformers.models.llama.modeling_llama import eager_attention_forward

        key, value = self._split(key), self._split(value)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            self._split(query),
            key,
            value,
            attention_mask,
            dropout=dropout if self.training else 0.0,
            scaling=scaling,
            **kwargs,
        )
        return output.flatten(-2).contiguous(), weights


class GroupedAttention(_Grouped):
    """OPT's attention with fewer key-value heads; projections keep their names."""

    def __init__(self, original: Any, kv_heads: int, groups: int, pool: Pool) -> None:
        super().__init__(original, groups)
        self.dropout = original.dropout
        self.q_proj = original.q_proj
        self.k_proj = _pooled(original.k_proj, kv_heads, groups, pool)
        self.v_proj = _pooled(original.v_proj, kv_heads, groups, pool)
        self.out_proj = original.out_proj

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values: Any = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, weights = self._attend(
            self.q_proj(hidden_states) * self.scaling,  # OPT scales here, not inside the attention
            self.k_proj(hidden_states),
            self.v_proj(hidden_states),
            past_key_values,
            attention_mask,
            scaling=1.0,
            dropout=self.dropout,
            **kwargs,
        )
        return self.out_proj(output), weights


class FusedGroupedAttention(_Grouped):
    """GPT-2's attention with fewer key-value heads: rows of `c_attn` are query, key, value."""

    def __init__(self, original: Any, kv_heads: int, groups: int, pool: Pool) -> None:
        super().__init__(original, groups)
        width, narrow = self.num_heads * self.head_dim, kv_heads * self.head_dim
        fused: nn.Linear = original.c_attn
        weight = self._pool_fused(fused.weight, (width, narrow, narrow), kv_heads, groups, pool)
        bias = self._pool_fused(fused.bias, (width, narrow, narrow), kv_heads, groups, pool)
        self.c_attn = linear_from(weight, bias)
        self.c_proj = original.c_proj
        self.attn_dropout = original.attn_dropout
        self.resid_dropout = original.resid_dropout

    @staticmethod
    def _pool_fused(
        rows: torch.Tensor, sizes: tuple[int, int, int], kv_heads: int, groups: int, pool: Pool
    ) -> torch.Tensor:
        if groups == kv_heads:
            return rows
        query, key, value = rows.detach().split(sizes)
        key, value = (_pool_rows(part, kv_heads, groups, pool) for part in (key, value))
        return torch.cat([query, key, value]).requires_grad_(rows.requires_grad)

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values: Any = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        narrow = self.num_key_value_heads * self.head_dim
        sizes = (self.num_heads * self.head_dim, narrow, narrow)
        query, key, value = self.c_attn(hidden_states).split(sizes, dim=-1)
        output, weights = self._attend(
            query,
            key,
            value,
            past_key_values,
            attention_mask,
            scaling=self.scaling,
            dropout=self.attn_dropout.p,
            **kwargs,
        )
        return self.resid_dropout(self.c_proj(output)), weights
