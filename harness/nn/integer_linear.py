"""A linear layer of packed asymmetric weights that multiplies int8 activations with integers, exactly.

`QuantizedLinear` widens the weights to floating point; here the tokens are rounded to int8 instead and the
product is taken in int32. Scale s and zero point z of a weight row are constant along the summed columns, so
both leave the sum: ``y = s_a s (sum a q - z sum a)`` for codes q and activations a.
"""

from __future__ import annotations

import torch

from harness.kernels.reference import int8_matmul
from harness.nn.packing import unpack_matrix, unpack_rows
from harness.nn.quantized import QuantizedLinear
from harness.nn.quantizer import quantize_activation

__all__ = ["IntegerLinear"]


class IntegerLinear(QuantizedLinear):
    """As `QuantizedLinear` with a scale and a zero point per row, and one activation scale per token.

    Made by `from_weight`. int32 cannot overflow below 66,000 columns (127 * 255 * columns < 2^31).
    """

    a_bits = 8

    @property
    def kernel_name(self) -> str:
        """What the forward pass runs, for any number of rows."""
        return "unpack, _int_mm"

    def kernel_for(self, rows: int, dtype: torch.dtype) -> str:
        """As `kernel_name`: it depends neither on the rows nor on their type."""
        return self.kernel_name

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        assert self.zeros is not None
        tokens, token_scale = quantize_activation(x)  # int8 [rows, in], float32 [rows, 1]
        codes = unpack_matrix(self.codes, self.bits, self.tile)[:, : self.in_features]
        zeros = unpack_rows(self.zeros, self.bits, self.out_features).int()  # [1, out]
        if self.bits == 8:  # 0 to 255 do not fit int8: moved by half, as are the zero points
            codes, zeros = codes ^ 0x80, zeros - 128
        products = int8_matmul(tokens, codes.contiguous().view(torch.int8))
        sums = tokens.int().sum(1, keepdim=True)
        y = (products - sums * zeros).float() * token_scale * self.scales.float()
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(x.dtype)
