"""A linear layer of int8 weights and activations on a static asymmetric grid, as exact int8 products.

A scale may leave an integer sum only where it is constant along the summed columns. Groups of input
dimensions with a scale each therefore become one product for each group:

    y = s_w * sum_g s_g * (C_g - z_g) W_g^T = s_w * sum_g s_g * U_g W_g^T + offset

where the unsigned codes C are moved into int8 (U = C - 128) and everything that does not depend on the
input, the zero points times the row sums of the weights, is in `offset` together with the bias. Codes of
16 bits are two bytes: ``U = 256 * high + low``, so two int8 products.

Source: Jacob et al. 2018 (arXiv:1712.05877), section 2.3; Bondarenko et al. 2021 (arXiv:2109.12948),
section 4.
"""

from __future__ import annotations

import torch

from harness.errors import ConfigError, NotApplicable
from harness.kernels import int8
from harness.kernels.reference import int8_matmul
from harness.nn.activation_grid import ActivationGrid
from harness.nn.quantized import PackedLinear
from harness.nn.quantizer import QuantizedWeight

__all__ = ["StaticInt8Linear"]


class StaticInt8Linear(PackedLinear):
    """Takes the place of an `nn.Linear`; the input [..., in] is rounded to the given grid.

    Args:
        sizes: input dimensions of each group, ``(in,)`` for one.
        a_bits: 8, or 16 in two int8 products.
        per_tensor: one weight scale for the whole matrix.
        reordered: columns are stored by group, and the input is gathered in that order.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    input_scale: torch.Tensor
    input_zero: torch.Tensor
    offset: torch.Tensor
    order: torch.Tensor | None
    bits = 8
    sym = True
    _kept = ("scales", "input_scale", "input_zero", "offset")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sizes: tuple[int, ...],
        a_bits: int = 8,
        per_tensor: bool = True,
        reordered: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if a_bits not in (8, 16):
            raise ConfigError(f"int8 products take activations of 8 or 16 bits, not {a_bits}")
        if sum(sizes) != in_features:
            raise ConfigError(f"groups of {sum(sizes)} dimensions do not fit {in_features} columns")
        self.in_features, self.out_features = in_features, out_features
        self.sizes, self.a_bits = tuple(sizes), a_bits
        self.folded_biases = 0  # parameters that are in `offset`
        groups = len(sizes)

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # The columns of a group lie together, [out, size] after [out, size]: each product reads its own.
        self.register_buffer("codes", buffer(out_features * in_features, dtype=torch.int8))
        self.register_buffer("scales", buffer(1 if per_tensor else out_features))
        self.register_buffer("input_scale", buffer(groups))
        self.register_buffer("input_zero", buffer(groups))
        self.register_buffer("offset", buffer(out_features))
        self.register_buffer("order", buffer(in_features, dtype=torch.int32) if reordered else None)

    @classmethod
    def from_weight(
        cls, weight: QuantizedWeight, grid: ActivationGrid, bias: torch.Tensor | None = None
    ) -> StaticInt8Linear:
        """Store a symmetric 8-bit matrix [out, in] for inputs on `grid`.

        Raises:
            NotApplicable: weights in groups or with zero points, which no int8 product can apply.
            ConfigError: the grid is for another number of dimensions.
        """
        if weight.bits != 8 or not weight.sym or weight.scale.shape[1] != 1:
            raise NotApplicable(
                "an int8 product needs symmetric 8-bit weights with one scale per row or in all "
                f"(bits={weight.bits}, sym={weight.sym}, group_size={weight.group_size})"
            )
        out, in_features = weight.codes.shape
        layer = cls(
            in_features,
            out,
            sizes=grid.sizes or (in_features,),
            a_bits=grid.bits,
            per_tensor=weight.scale.numel() < out,
            reordered=grid.order is not None,
            device="meta",
        )
        codes = (weight.codes.to(torch.int16) - 128).to(torch.int8)
        if grid.order is not None:
            layer.order = grid.order.to(torch.int32)
            codes = codes[:, grid.order]
        blocks = codes.split(list(layer.sizes), dim=1)
        layer.codes = torch.cat([block.reshape(-1) for block in blocks])
        layer.scales = weight.scale[:, 0].float().contiguous()
        layer.input_scale, layer.input_zero = grid.scale.float(), grid.zero.float()
        row_sums = torch.stack([block.long().sum(1) for block in blocks]).double()  # [groups, out]
        shift = layer.input_scale.double() * (_middle(grid.bits) - layer.input_zero.double())
        offset = (shift @ row_sums) * layer.scales.double()
        if bias is not None:
            offset += bias.detach().double()
            layer.folded_biases = bias.numel()
        layer.offset = offset.float()
        return layer

    @property
    def kernel_name(self) -> str:
        products = len(self.sizes) * (self.a_bits // 8)
        return int8.choose(self.codes.device) if products == 1 else f"{products} x _int_mm"

    def kernel_for(self, rows: int, dtype: torch.dtype) -> str:
        """As `kernel_name`: it depends neither on the rows nor on their type."""
        return self.kernel_name

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [out, in] that the codes stand for, in its own column order."""
        weight = torch.cat(self._blocks(), dim=1).float()
        if self.order is not None:
            weight = torch.empty_like(weight).index_copy_(1, self.order.long(), weight)
        return (weight * self.scales[:, None]).to(dtype)

    def dense_weight(self) -> torch.Tensor:
        """As `dequantize`: what is counted when the zeros of a layer are counted."""
        return self.dequantize()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., out] for x [..., in], in x's type."""
        return self._flat(x, self._multiply)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        if self.order is not None:
            x = x.index_select(1, self.order)
        if self.a_bits == 8 and len(self.sizes) == 1:
            scale, zero = self.input_scale, self.input_zero
            codes = torch.round(x.float() / scale).add_(zero).clamp_(0, 255).sub_(128).to(torch.int8)
            weight = self.codes.view(self.out_features, -1)
            return int8.linear_of_codes(codes, scale, weight, self.scales, self.offset, x.dtype)
        total: torch.Tensor | None = None
        for group, (part, block) in enumerate(
            zip(x.split(list(self.sizes), dim=1), self._blocks(), strict=True)
        ):
            scale, zero = self.input_scale[group], self.input_zero[group]
            codes = torch.round(part.float() / scale).add_(zero).clamp_(0, 2**self.a_bits - 1)
            product = self._product(codes, block) * scale
            total = product if total is None else total + product
        assert total is not None
        return (total * self.scales + self.offset).to(x.dtype)

    def _product(self, codes: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        """Float32 of the integer product of moved codes [rows, size] with int8 [out, size]."""
        if self.a_bits == 8:
            return int8_matmul((codes - 128).to(torch.int8), block).float()
        whole = codes.to(torch.int32)
        high, low = (whole >> 8) - 128, (whole & 255) - 128
        upper = int8_matmul(high.to(torch.int8), block).float()
        return upper * 256 + int8_matmul(low.to(torch.int8), block).float()

    def _blocks(self) -> list[torch.Tensor]:
        """The stored columns of each group, int8 [out, size]."""
        parts = self.codes.split([self.out_features * size for size in self.sizes])
        return [part.view(self.out_features, -1) for part in parts]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, a_bits={self.a_bits}, groups={len(self.sizes)}"


def _middle(bits: int) -> int:
    """What was subtracted from unsigned codes so that each byte fits int8."""
    return 128 if bits == 8 else 128 * 256 + 128
