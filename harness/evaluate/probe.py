"""A linear probe: L2-regularised logistic regression, fitted to its one optimum. Only numpy and scipy.

The objective is scikit-learn's with its default ``C = 1``: the sum of the cross-entropies plus half the
squared norm of the weights, the intercepts free. Two classes have one weight vector, more have one each
(softmax). It is strictly convex in the weights, so the recipe has no seed and no learning rate: L-BFGS from
zero in float64, until the largest component of the gradient is below `GRADIENT_TOLERANCE`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from harness.errors import NumericalFailure

__all__ = ["GRADIENT_TOLERANCE", "LinearProbe", "fit_probe"]

GRADIENT_TOLERANCE = 1e-4  # of a sum over thousands of sentences
_ITERATIONS = 2000

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LinearProbe:
    """`weights` [d, columns] and `intercepts` [columns]: one column for two classes, else one a class."""

    weights: Floats
    intercepts: Floats

    def log_probabilities(self, features: Floats) -> Floats:
        """For features [n, d] the log-probabilities of the classes, [n, classes]."""
        return _log_softmax(_scores(features @ self.weights + self.intercepts))


def fit_probe(features: Floats, targets: npt.NDArray[np.int64], classes: int) -> LinearProbe:
    """Fit features [n, d] to class numbers [n] (see the module).

    Raises:
        NumericalFailure: a feature is NaN or infinite, or no optimum is found.
    """
    from scipy.optimize import minimize

    if not np.isfinite(features).all():
        raise NumericalFailure("an embedding is NaN or infinite")
    width, columns = features.shape[1], 1 if classes == 2 else classes
    wanted = np.eye(classes)[targets]  # [n, classes]

    def loss(flat: Floats) -> tuple[float, Floats]:
        weights, intercepts = _unpacked(flat, width, columns)
        log_p = _log_softmax(_scores(features @ weights + intercepts))
        slope = (np.exp(log_p) - wanted)[:, -columns:]  # [n, columns]
        gradient = np.concatenate([(features.T @ slope + weights).ravel(), slope.sum(0)])
        return float(-(wanted * log_p).sum() + 0.5 * (weights**2).sum()), gradient

    options = {"maxiter": _ITERATIONS, "maxfun": 2 * _ITERATIONS, "gtol": GRADIENT_TOLERANCE, "ftol": 0.0}
    start = np.zeros((width + 1) * columns)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
    # Beyond what float64 resolves the line search stops by itself: the gradient decides, not the message.
    if not np.abs(loss(found.x)[1]).max() < 10 * GRADIENT_TOLERANCE:
        raise NumericalFailure(f"the probe found no optimum: {found.message}")
    return LinearProbe(*_unpacked(found.x, width, columns))


def _unpacked(flat: Floats, width: int, columns: int) -> tuple[Floats, Floats]:
    return flat[: width * columns].reshape(width, columns), flat[width * columns :]


def _scores(columns: Floats) -> Floats:
    """One score for each class; of two classes the first has 0."""
    return np.hstack([np.zeros_like(columns), columns]) if columns.shape[1] == 1 else columns


def _log_softmax(scores: Floats) -> Floats:
    shifted = scores - scores.max(axis=1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
