"""The second-order view of a linear layer: how much an error in each weight costs the layer's output.

For ``y = W x`` the squared output error of a change D in W is ``tr(D H D^T)`` with ``H = mean(x x^T)``
over the calibration tokens. GPTQ and SparseGPT (Frantar et al. 2022 and 2023) need the upper Cholesky
factor of the inverse of a damped H.
"""

from __future__ import annotations

import torch

from harness.errors import ConfigError, NumericalFailure

__all__ = ["InputHessian", "inverse_root", "output_error"]

_LARGEST_DAMP = 1.0


class InputHessian:
    """The running mean of ``x x^T`` over tokens, in float32 [in, in]."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.mean = torch.zeros(in_features, in_features, device=device)
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Take in activations [..., in]."""
        x = x.reshape(-1, x.shape[-1]).float()
        if not x.shape[0]:
            return
        before, self.tokens = self.tokens, self.tokens + x.shape[0]
        self.mean *= before / self.tokens
        self.mean.addmm_(x.t(), x, alpha=1 / self.tokens)

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
        damped = hessian.clone()
        damped.diagonal().add_(damp * mean)
        root = _inverse_root(damped)
        if root is not None:
            return root, damp
        if damp >= _LARGEST_DAMP:
            raise NumericalFailure(f"the Hessian cannot be factorised, even with damp={damp:g}")
        damp = min(10 * damp, _LARGEST_DAMP)


def _inverse_root(damped: torch.Tensor) -> torch.Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed):
        return None
    upper: torch.Tensor
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if bool(failed) or not bool(torch.isfinite(upper).all()):
        return None
    return upper


def output_error(difference: torch.Tensor, hessian: torch.Tensor) -> float:
    """``tr(D H D^T)`` of a change D [out, in]: the mean squared error of the outputs, summed over them."""
    return float(((difference @ hessian) * difference).sum())
