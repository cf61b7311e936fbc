"""A linear layer of packed asymmetric weights that multiplies int8 activations with integers, exactly.

`QuantizedLinear` widens the weights to floating point; here the tokens are rounded to int8 instead and the
product is taken in int32. Scale s and zero point z of a weight row are constant along the summed columns, so
both leave the sum: ``y = s_a s (sum a q - z sum a)`` for codes q and activations a.
"""

from __future__ import annotations

import torch

from harness.kernels import packed_int8
from harness.nn.quantized import QuantizedLinear

__all__ = ["IntegerLinear"]


class IntegerLinear(QuantizedLinear):
    """As `QuantizedLinear` with a scale and a zero point per row, and one activation scale per token.

    Made by `from_weight`. int32 cannot overflow below 66,000 columns (127 * 255 * columns < 2^31).
    """

    a_bits = 8

    @property
    def kernel_name(self) -> str:
        """The kernel of a decode step (one row)."""
        return packed_int8.choose(self.packed, 1)

    def kernel_for(self, rows: int, dtype: torch.dtype) -> str:
        """The kernel that the forward pass runs for so many rows, whatever their type."""
        return packed_int8.choose(self.packed, rows)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        return packed_int8.linear(x, self.packed, self.bias)
