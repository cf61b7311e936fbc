"""The second-order view of a linear layer: how much an error in each weight costs the layer's output.

For ``y = W x`` the squared output error of a change D in W is ``tr(D H D^T)`` with ``H = mean(x x^T)``
over the calibration tokens. GPTQ and SparseGPT (Frantar et al. 2022 and 2023) need the upper Cholesky
factor of the inverse of a damped H.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from harness.errors import ConfigError, NumericalFailure
from harness.nn.blocks import Block

__all__ = [
    "Factor",
    "InputHessian",
    "factorise",
    "inverse_root",
    "observe_hessians",
    "output_error",
    "output_size",
    "packed_lower",
    "unpacked_lower",
]

_LARGEST_DAMP = 1.0
_EXACT_ON_TENSOR_CORES = (torch.bfloat16, torch.float16)


class InputHessian:
    """The running mean of ``x x^T`` over tokens, in float32 [in, in]."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.mean = torch.zeros(in_features, in_features, device=device)
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Take in activations [..., in].

        On CUDA those in bfloat16 and float16 are multiplied on tensor cores as they are: their products
        are exact in float32, in which they are added up. Others are multiplied in full float32.
        """
        x = x.reshape(-1, x.shape[-1])
        if not x.shape[0]:
            return
        before, self.tokens = self.tokens, self.tokens + x.shape[0]
        kept, new = before / self.tokens, 1 / self.tokens
        if x.is_cuda and x.dtype in _EXACT_ON_TENSOR_CORES:
            self.mean.mul_(kept).add_(torch.mm(x.t(), x, out_dtype=torch.float32), alpha=new)
            return
        x = x.float()
        with _float32_products("highest"):
            self.mean.addmm_(x.t(), x, beta=kept, alpha=new)

    def matrix(self, layer: str) -> torch.Tensor:
        """The mean [in, in].

        Raises:
            ConfigError: no tokens were seen.
            NumericalFailure: the activations were NaN or infinite.
        """
        if not self.tokens:
            raise ConfigError(f"{layer}: no calibration tokens reached the layer")
        if not bool(torch.isfinite(self.mean).all()):
            raise NumericalFailure(f"{layer}: calibration activations are NaN or infinite")
        return self.mean


def observe_hessians(block: Block, names: Sequence[str], *, advance: bool = False) -> dict[str, torch.Tensor]:
    """``mean(x x^T)`` [in, in] of the inputs x of the named layers of a block, in one pass; by name.

    Args:
        advance: as of `Block.observe`.

    Raises:
        ConfigError, NumericalFailure: as `InputHessian.matrix`.
    """
    found: dict[str, InputHessian] = {}

    def see(name: str, x: torch.Tensor) -> None:
        if name not in found:
            found[name] = InputHessian(x.shape[-1], x.device)
        found[name].add(x)

    block.observe(names, see, advance=advance)
    return {name: found.get(name, InputHessian(0)).matrix(f"{block.name}.{name}") for name in names}


@dataclass(frozen=True)
class Factor:
    """A damped Hessian, factorised: what layers with the same input share.

    Args:
        root: upper triangular [in, in], in the order in which columns are worked on.
        order: int64 [in], or None for the columns' own order.
        dead: bool [in], the columns that no token ever reaches.
        damp: the damping that was used.
    """

    root: torch.Tensor
    order: torch.Tensor | None
    dead: torch.Tensor
    damp: float


def factorise(hessian: torch.Tensor, *, damp: float, act_order: bool = False) -> Factor:
    """Order the columns (`act_order`: the most active first), and factorise; raises as `inverse_root`."""
    hessian = hessian.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal().masked_fill_(dead, 1)
    order = None
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        hessian = hessian[order][:, order]
    root, damp = inverse_root(hessian, damp)
    return Factor(root, order, dead, damp)


def inverse_root(hessian: torch.Tensor, damp: float) -> tuple[torch.Tensor, float]:
    """The upper triangular U with ``(H + damp * mean(diag H) * I)^-1 = U^T U``, and the damp used.

    Where the factorisation fails, `damp` is raised tenfold, up to 1.0.

    Raises:
        ConfigError: `damp` is not positive.
        NumericalFailure: H has NaN, or the factorisation fails at the largest damp as well.
    """
    if not damp > 0:
        raise ConfigError(f"damp must be above 0, not {damp}")
    if not bool(torch.isfinite(hessian).all()):
        raise NumericalFailure("the Hessian has NaN or infinite entries")
    mean = hessian.diagonal().mean()
    while True:
        root = _inverse_root(hessian, damp * mean)
        if root is not None:
            return root, damp
        if damp >= _LARGEST_DAMP:
            raise NumericalFailure(f"the Hessian cannot be factorised, even with damp={damp:g}")
        damp = min(10 * damp, _LARGEST_DAMP)


def _inverse_root(hessian: torch.Tensor, shift: torch.Tensor) -> torch.Tensor | None:
    # With rows and columns reversed, H = L L^T. Reversed again, L is upper triangular: H = R R^T, so
    # H^-1 = R^-T R^-1, and the root is R^-1: one factorisation and one triangular inverse.
    reverse = hessian.flip(0, 1)
    reverse.diagonal().add_(shift)
    lower, failed = torch.linalg.cholesky_ex(reverse)
    if bool(failed):
        return None
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    root = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
    return root if bool(torch.isfinite(root).all()) else None


def output_error(difference: torch.Tensor, hessian: torch.Tensor) -> float:
    """``tr(D H D^T)`` of a change D [out, in]: the mean squared error of the outputs, summed over them."""
    with _float32_products("highest"):
        return float(((difference @ hessian) * difference).sum())


def output_size(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """``tr(W H W^T)``: the mean square of the outputs, summed over them, to three digits.

    A sum of squares in which nothing cancels, as it does in `output_error`: TensorFloat-32 is enough.
    """
    with _float32_products("high"):
        return float(((weight @ hessian) * weight).sum())


def packed_lower(matrix: torch.Tensor) -> torch.Tensor:
    """The lower triangle of a matrix [n, n] as a rectangle [ceil(n / 2), n + 1].

    Row `k` holds the row ``n - 1 - k`` of the triangle and, from the other end, its row `k`.
    """
    size, half = len(matrix), (len(matrix) + 1) // 2
    long = functional.pad(matrix[size - half :].flip(0), (0, 1))
    short = functional.pad(matrix[:half].flip(1), (1, 0))
    rows = torch.arange(half, device=matrix.device)[:, None]
    return torch.where(torch.arange(size + 1, device=matrix.device) < size - rows, long, short)


def unpacked_lower(packed: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix [n, n] whose lower triangle `packed_lower` packed."""
    half, size = packed.shape[0], packed.shape[1] - 1
    lower = packed.new_empty(size, size)
    lower[size - half :] = packed[:, :size].flip(0)
    lower[:half] = packed[:, 1:].flip(1)
    lower = lower.tril_()
    return lower + lower.tril(-1).t()


@contextmanager
def _float32_products(precision: Literal["highest", "high"]) -> Iterator[None]:
    """Products of float32 matrices in full ("highest") or TensorFloat-32, whatever the process allows."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
