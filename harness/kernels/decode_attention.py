"""Attention of a decode step, a few queries on many keys: which kernel runs, and the operator for compilers.

Libraries give each head of each sequence to one program, or split the keys and write the parts down with
a mask that they first turn into numbers; query heads that share keys read copies of them. Here keys are split
so that the device is full, heads that share keys are the rows of one product, and the mask is read as it is.

`decode_attention` is an operator (``torch.ops.harness.decode_attention``) with the meaning of
`torch.nn.functional.scaled_dot_product_attention`; torch.compile keeps it as it is.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from harness.kernels.weight_only import has_triton

__all__ = ["MOST_APART", "MOST_QUERIES", "decode_attention", "fits"]

MOST_QUERIES = 64
"""Queries on the same keys; more are a prefill."""
MOST_APART = 128
"""Heads of all sequences up to which splitting the keys pays where no heads share them: more fill a device by
themselves, and libraries' kernels are then as fast (measured on an H200)."""
WIDEST_HEAD = 256
"""Elements of a head that a program can hold."""

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def fits(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> bool:
    """Whether the kernel takes these; by shapes, types and the device only.

    Args:
        query: [batch, heads, queries, width].
        key: [batch, heads, keys, width]; more than twice as many keys as queries.
        value: [batch, heads, keys, value width].
        mask: bool (True: may be seen) or of the query's type (added), broadcast to
            [batch, heads, queries, keys].
    """
    tensors = (query, key, value)
    return (
        all(each.dim() == 4 and each.dtype == query.dtype and each.numel() > 0 for each in tensors)
        and query.dtype in _FLOATS
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and key.shape[2] == value.shape[2]
        and query.shape[3] == key.shape[3]
        and query.shape[2] <= MOST_QUERIES
        and key.shape[2] > 2 * query.shape[2]
        and max(query.shape[3], value.shape[3]) <= WIDEST_HEAD
        and (mask is None or _is_mask_for(mask, query, key))
        and has_triton(query.device)
    )


def _is_mask_for(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> bool:
    shape = (*query.shape[:3], key.shape[2])
    fits_shape = mask.dim() <= 4 and all(
        have in (1, wanted) for have, wanted in zip(reversed(mask.shape), reversed(shape), strict=False)
    )
    return fits_shape and mask.dtype in (torch.bool, query.dtype)


@torch.library.custom_op("harness::decode_attention", mutates_args=())
def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """``softmax(scale * query @ key.T + mask) @ value``, [batch, heads, queries, value width], contiguous.

    Sums are float32. A query that may see no key gives zeros.

    Args:
        query, key, value, mask: as of `fits`.
        scale: what products of queries and keys are multiplied by.
    """
    if _runs(query, key, value, mask):
        from harness.kernels import triton_decode_attention

        return triton_decode_attention.decode_attention(query, key, value, mask, scale)
    return functional.scaled_dot_product_attention(query, key, value, mask, scale=scale).contiguous()


@decode_attention.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


def _runs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    return fits(query, key, value, mask)
