"""N of every M: brute force over all choices, ties, and widths that do not fit."""

from __future__ import annotations

import itertools

import pytest
import torch

from harness.errors import ConfigError
from harness.nn.n_of_m import keep_n_of_m


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8), (3, 5), (4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_choice_keeps_more(n, m, dtype):
    scores = torch.rand(7, 4 * m, generator=torch.Generator().manual_seed(n + m)).to(dtype)
    keep = keep_n_of_m(scores, n, m)
    choices = list(itertools.combinations(range(m), n))
    for kept, group in zip(keep.view(-1, m), scores.view(-1, m), strict=True):
        assert int(kept.sum()) == n
        assert float(group[kept].sum()) == pytest.approx(
            max(float(group[list(each)].sum()) for each in choices)
        )


def test_groups_run_along_the_inputs():
    scores = torch.tensor([[9.0, 8, 1, 1, 0, 0, 3, 4]])
    assert keep_n_of_m(scores, 2, 4).tolist() == [[True, True, False, False, False, False, True, True]]


def test_of_equal_scores_the_first_go():
    assert keep_n_of_m(torch.ones(1, 4), 1, 4).tolist() == [[False, False, False, True]]
    assert torch.equal(keep_n_of_m(torch.zeros(3, 8), 2, 4), keep_n_of_m(torch.ones(3, 8), 2, 4))


@pytest.mark.parametrize(
    ("width", "n", "m", "message"),
    [
        (8, 5, 4, "between 1 and 4"),
        (8, 0, 4, "between 1 and 4"),
        (6, 2, 4, "divide the 6"),
        (3, 2, 4, "narrow"),
        (0, 2, 4, "narrow"),
    ],
)
def test_what_does_not_fit_is_refused(width, n, m, message):
    with pytest.raises(ConfigError, match=message):
        keep_n_of_m(torch.ones(2, width), n, m)
