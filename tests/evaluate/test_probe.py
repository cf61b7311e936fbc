"""The linear probe against Newton's method, and against scikit-learn where it is installed."""

from __future__ import annotations

import numpy as np
import pytest

from harness.errors import NumericalFailure
from harness.evaluate.probe import fit_probe


def blobs(classes, n=300, width=6, seed=0):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes, size=n)
    centres = rng.normal(size=(classes, width))
    return centres[targets] + 1.5 * rng.normal(size=(n, width)), targets


def newton(features, targets, steps=30):
    """The optimum of sum log(1 + exp(-y z)) + |w|²/2 by the full Hessian; the intercept is free."""
    design = np.hstack([features, np.ones((len(features), 1))])
    penalty = np.diag([1.0] * features.shape[1] + [0.0])
    w = np.zeros(design.shape[1])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-design @ w))
        gradient = design.T @ (p - targets) + penalty @ w
        w -= np.linalg.solve((design * (p * (1 - p))[:, None]).T @ design + penalty, gradient)
    return w


def test_two_classes_reach_the_optimum_of_newtons_method():
    features, targets = blobs(2)
    probe = fit_probe(features, targets, 2)
    expected = newton(features, targets)
    np.testing.assert_allclose(probe.weights[:, 0], expected[:-1], atol=2e-5)
    np.testing.assert_allclose(probe.intercepts, expected[-1:], atol=2e-5)
    log_p = probe.log_probabilities(features)
    np.testing.assert_allclose(np.exp(log_p).sum(1), 1)
    z = features @ expected[:-1] + expected[-1]
    np.testing.assert_allclose(np.exp(log_p[:, 1]), 1 / (1 + np.exp(-z)), atol=1e-5)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_it_is_the_default_of_scikit_learn(classes):
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, targets = blobs(classes)
    expected = linear_model.LogisticRegression(tol=1e-9, max_iter=10_000).fit(features, targets)
    found = fit_probe(features, targets, classes).log_probabilities(features)
    np.testing.assert_allclose(found, expected.predict_log_proba(features), atol=1e-4)


def test_it_is_the_same_every_time_and_separable_data_do_not_diverge():
    features = np.array([[-1.0], [-2.0], [1.0], [2.0]])
    first, second = (fit_probe(features, np.array([0, 0, 1, 1]), 2) for _ in range(2))
    assert first.weights.tobytes() == second.weights.tobytes()
    assert 0 < first.weights[0, 0] < 3


def test_an_embedding_that_is_no_number_is_refused():
    with pytest.raises(NumericalFailure, match="NaN or infinite"):
        fit_probe(np.array([[np.nan], [1.0]]), np.array([0, 1]), 2)
