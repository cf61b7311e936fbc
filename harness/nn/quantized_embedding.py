"""An embedding whose rows are packed, and the output head that shares them.

A lookup unpacks the rows of its tokens. A head that was tied to the embedding becomes the very matrix that
the lookups read from, so both are still stored once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from harness.errors import ConfigError, NotApplicable
from harness.nn.anatomy import anatomy_of, find
from harness.nn.packing import unpack_matrix
from harness.nn.quantized import QuantizedLinear
from harness.nn.quantizer import QuantizedWeight
from harness.nn.surgery import replace_module

__all__ = ["QuantizedEmbedding", "quantize_embedding"]


class QuantizedEmbedding(nn.Module):
    """Takes the place of an `nn.Embedding`: tokens int64 [...] to rows [..., width].

    Args:
        rows: the packed matrix [tokens, width], 4 or 8 bits, a scale and a zero point per row.
        dtype: the type of the result; follows `Module.to`.

    Raises:
        ConfigError: other bits, or a matrix with groups along its columns.
    """

    like: torch.Tensor

    def __init__(self, rows: QuantizedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        if rows.bits not in (4, 8) or rows.group_size != -1 or rows.sym:
            raise ConfigError("an embedding is stored in 4 or 8 bits with a scale and a zero point per row")
        self.rows = rows
        self.num_embeddings, self.embedding_dim, self.bits = rows.out_features, rows.in_features, rows.bits
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=rows.codes.device), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if tokens.numel() == 0:
            return self.like.new_empty(*tokens.shape, self.embedding_dim)
        flat = tokens.reshape(-1)
        packed, zeros = self.rows.codes.index_select(1, flat), self.rows.zeros
        assert zeros is not None
        codes = unpack_matrix(packed, self.bits, self.rows.tile)[:, : self.embedding_dim]
        if self.bits == 8:
            zero = zeros[0, flat]
        else:
            zero = zeros[0, flat >> 1] >> (4 * (flat & 1)).to(torch.uint8) & 15
        scale = self.rows.scales[0, flat].float()
        values = (codes.float() - zero.float()[:, None]) * scale[:, None]
        return values.to(self.like.dtype).view(*tokens.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}"


def quantize_embedding(model: nn.Module, quantize: Callable[[torch.Tensor], QuantizedWeight]) -> bool:
    """Pack the token embedding of a model, and with it a head that is tied to it.

    Args:
        quantize: rounds the matrix [tokens, width].

    Returns:
        Whether a tied head came along.

    Raises:
        NotApplicable: the model has no token embedding that only looks rows up.
    """
    anatomy = anatomy_of(model)
    found = find(model, anatomy.embedding)
    if found is None or type(found[1]) is not nn.Embedding:
        raise NotApplicable(
            "the token embedding is no plain nn.Embedding, so it cannot be packed (emb_bits=16 leaves it)"
        )
    name, embedding = found
    assert isinstance(embedding, nn.Embedding)
    head = find(model, anatomy.head)
    tied = head is not None and isinstance(head[1], nn.Linear) and head[1].weight is embedding.weight
    bias = head[1].bias if tied and head is not None else None
    rows = QuantizedLinear.from_weight(quantize(embedding.weight), bias)  # type: ignore[arg-type]
    replace_module(model, name, QuantizedEmbedding(rows, embedding.weight.dtype))
    if tied and head is not None:
        replace_module(model, head[0], rows)
    return tied
