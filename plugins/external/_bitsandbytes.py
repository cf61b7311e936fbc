"""Linear layers that call bitsandbytes' kernels on plain buffers.

bitsandbytes keeps scales beside its parameters, where neither a state dict nor a count of bytes finds
them. Here everything that is stored is a buffer; quantizing and multiplying are the library's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from harness.nn.kept_types import KeptTypes

__all__ = ["Int8OutlierLinear", "Nf4Linear"]


class _Wrapped(KeptTypes):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = None
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Int8OutlierLinear(_Wrapped):
    """LLM.int8(): int8 weights with a scale a row; input columns beyond `threshold` in 16 bit.

    On CUDA bitsandbytes multiplies in int8 and float16 whatever the input is, and gives the input's type
    back. On a CPU it multiplies with the dequantized weights and rounds no activations.
    """

    bits = 8
    codes: torch.Tensor
    scales: torch.Tensor
    _kept = ("scales",)

    def __init__(self, linear: nn.Linear, threshold: float) -> None:
        from bitsandbytes import functional

        super().__init__(linear)
        self.threshold = threshold
        codes, scales, _ = functional.int8_vectorwise_quant(linear.weight.detach().to(torch.float16))
        self.register_buffer("codes", codes)  # int8 [out, in]
        self.register_buffer("scales", scales)  # float32 [out], the largest magnitudes

    @property
    def kernel_name(self) -> str:
        """What runs on the layer's device."""
        return "bitsandbytes LLM.int8()" if self.codes.is_cuda else "dequantize+matmul"

    def dense_weight(self) -> torch.Tensor:
        """The matrix [out, in] that the codes stand for."""
        return self.codes.float() * (self.scales[:, None] / 127)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., out] for x [..., in], in x's type."""
        import bitsandbytes

        state = bitsandbytes.MatmulLtState()
        state.threshold, state.has_fp16_weights = self.threshold, False
        state.CB, state.SCB = self.codes, self.scales
        half = x.to(torch.float16) if x.is_cuda else x
        y = bitsandbytes.matmul(half, self.codes, bias=None, state=state).to(x.dtype)
        return y if self.bias is None else y + self.bias


class Nf4Linear(_Wrapped):
    """4-bit NormalFloat in blocks of 64, the scales of the blocks quantized in turn."""

    bits = 4
    kernel_name = "bitsandbytes nf4"
    codes: torch.Tensor
    absmax: torch.Tensor
    offset: torch.Tensor
    nested_absmax: torch.Tensor
    _kept = ("offset", "nested_absmax")

    def __init__(self, linear: nn.Linear) -> None:
        from bitsandbytes import functional

        super().__init__(linear)
        weight = linear.weight.detach()
        codes, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        self._dtype, self._block, self._nested_block = weight.dtype, state.blocksize, state.state2.blocksize
        self.register_buffer("codes", codes)  # uint8 [out * in / 2, 1]
        self.register_buffer("absmax", state.absmax)  # uint8 [blocks]
        self.register_buffer("offset", state.offset.clone())
        self.register_buffer("nested_absmax", state.state2.absmax)  # float32 [blocks / 256]
        # The tables are constants of the format, the same for every layer.
        self._tables = (state.code, state.state2.code)

    def _moved(self) -> None:
        self._tables = tuple(table.to(self.codes.device) for table in self._tables)

    def _state(self) -> Any:
        from bitsandbytes.functional import QuantState

        codebook, nested_codebook = self._tables
        nested = QuantState(self.nested_absmax, code=nested_codebook, blocksize=self._nested_block)
        nested.dtype = torch.float32
        return QuantState(
            self.absmax,
            shape=torch.Size((self.out_features, self.in_features)),
            code=codebook,
            blocksize=self._block,
            quant_type="nf4",
            dtype=self._dtype,
            offset=self.offset,
            state2=nested,
        )

    def dense_weight(self) -> torch.Tensor:
        """The matrix [out, in] that the codes stand for."""
        from bitsandbytes import functional

        weight: torch.Tensor = functional.dequantize_4bit(self.codes, self._state())
        return weight.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., out] for x [..., in], in x's type."""
        import bitsandbytes

        y: torch.Tensor = bitsandbytes.matmul_4bit(x, self.codes.t(), quant_state=self._state(), bias=None)
        return y if self.bias is None else y + self.bias
