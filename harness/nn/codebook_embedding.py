"""An embedding of packed places in a table, and the output head that shares it.

A lookup unpacks the rows that it needs. Where the head was tied to the embedding, it reads the same
packed rows as a matrix: both are still stored once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from harness.errors import ConfigError
from harness.kernels import table as table_kernels
from harness.nn.anatomy import anatomy_of, find
from harness.nn.codebook import PackedCodebook
from harness.nn.codebook_weight import CodebookWeight
from harness.nn.quantized import PackedLinear, stored_bias
from harness.nn.surgery import replace_module

__all__ = ["CodebookEmbedding", "TiedHead", "find_embedding", "replace_embedding"]


class CodebookEmbedding(PackedCodebook):
    """An `nn.Embedding` whose rows are packed places in a table, outliers exact.

    Args:
        num_embeddings, embedding_dim: as of `nn.Embedding`.
        most_outliers: the largest number of outliers in a row; so many are looked at for every token.
        dtype: the type of the output.

    The others are those of `PackedCodebook`; there are no scales.
    """

    like: torch.Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        bits: int,
        outliers: int = 0,
        outlier_dtype: torch.dtype = torch.float32,
        most_outliers: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.most_outliers = most_outliers
        self._register(
            num_embeddings,
            embedding_dim,
            bits=bits,
            outliers=outliers,
            outlier_dtype=outlier_dtype,
            device=device,
        )
        # Holds nothing; its type follows that of the model, and the output has it.
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @classmethod
    def from_weight(cls, weight: CodebookWeight, dtype: torch.dtype) -> CodebookEmbedding:
        """Pack a matrix [num_embeddings, embedding_dim].

        Raises:
            ConfigError: the matrix has scales.
        """
        if weight.scales is not None:
            raise ConfigError("a packed embedding has no groups: a lookup takes the table's values")
        rows, device = weight.codes.shape[0], weight.codes.device
        layer = cls(rows, weight.in_features, bits=weight.bits, device="meta")
        layer._store(weight)
        layer.like = torch.empty(0, dtype=dtype, device=device)
        if weight.outliers is not None and weight.outliers.index.numel():
            row_of = weight.outliers.index.long() // weight.in_features
            layer.most_outliers = int(torch.bincount(row_of).max())
        return layer

    @property
    def kernel_name(self) -> str:
        return "gather"

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows [..., embedding_dim] of ids [...]."""
        flat = ids.reshape(-1)
        codes = self._unpacked(self.codes.index_select(1, flat))
        rows = self.table.to(self.like.dtype)[codes.int()]  # [n, dim]
        if self.outlier_index is not None:
            rows = self._with_outliers(rows, flat)
        return rows.view(*ids.shape, self.embedding_dim)

    def _with_outliers(self, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Put each row's outliers in their columns; by shapes alone, so that a CUDA graph can hold it."""
        assert self.outlier_index is not None
        assert self.outlier_values is not None
        index, values = self.outlier_index, self.outlier_values.to(rows.dtype)
        starts = torch.searchsorted(index, ids.to(index.dtype) * self.embedding_dim)  # [n]
        places = starts[:, None] + torch.arange(self.most_outliers, device=ids.device)
        places = places.clamp_(max=index.numel() - 1)  # [n, most]
        columns = index[places].long() - ids[:, None].long() * self.embedding_dim
        # What belongs to another row goes into a column that is cut off.
        columns = torch.where((columns >= 0) & (columns < self.embedding_dim), columns, self.embedding_dim)
        return functional.pad(rows, (0, 1)).scatter_(1, columns, values[places])[:, :-1].contiguous()

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._described()}"


class TiedHead(PackedLinear):
    """An output head that multiplies with the rows of a packed embedding and stores only its bias."""

    bias: nn.Parameter | None

    def __init__(self, embedding: CodebookEmbedding, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.embedding = embedding
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.bits = embedding.bits
        self.bias = None if bias is None else stored_bias(bias)

    def kernel_for(self, rows: int, dtype: torch.dtype) -> str:
        """What the forward pass runs for so many rows of activations of this type."""
        return table_kernels.choose(self.embedding.stored, rows, dtype)

    @property
    def kernel_name(self) -> str:
        return self.kernel_for(1, self.embedding.like.dtype)

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [out, in] that the codes stand for."""
        return self.embedding.dense_weight(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [..., out] of x [..., in], in x's type."""
        return self._flat(x, self._multiply)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        if table_kernels.runs(x, self.embedding.stored):
            return table_kernels.linear(x, self.embedding.stored, self.bias)
        return functional.linear(x, self.dense_weight(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def find_embedding(model: nn.Module) -> tuple[str, nn.Embedding] | None:
    """The word embedding with its full name, where it is a plain `nn.Embedding` (no packed or scaled one)."""
    found = find(model, anatomy_of(model).embedding)
    if found is None or type(found[1]) is not nn.Embedding:
        return None
    return found[0], found[1]


def replace_embedding(model: nn.Module, name: str, new: CodebookEmbedding) -> bool:
    """Put `new` in the place of the word embedding `name`, and in that of the head tied to it.

    Returns:
        whether there was such a head.
    """
    old: Any = model.get_submodule(name)
    tied = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight is old.weight
    ]
    replace_module(model, name, new)
    for path, head in tied:
        replace_module(model, path, TiedHead(new, head.bias))
    return bool(tied)
