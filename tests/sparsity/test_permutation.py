"""The search for an order of columns against brute force, and against what the paper's searches reach."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from harness_plugins.sparsity._permutation import (
    Search,
    bound,
    groups_for,
    kept_magnitude,
    search_order,
)

from harness.errors import ConfigError


def uniform(rows: int, columns: int, seed: int = 0, problems: int = 1) -> torch.Tensor:
    return torch.rand(problems, rows, columns, generator=torch.Generator().manual_seed(seed))


def searched(x: torch.Tensor, seed: int = 0, **keywords) -> torch.Tensor:
    search = Search(**{"n": 2, "m": 4, "escapes": 0, **keywords})
    return search_order(x, search, torch.Generator().manual_seed(seed))


def kept(x: torch.Tensor, order: torch.Tensor, n: int = 2, m: int = 4) -> torch.Tensor:
    return kept_magnitude(x.gather(2, order[:, None].expand_as(x)), n, m)


def efficacy(x: torch.Tensor, order: torch.Tensor) -> float:
    default, best = float(kept_magnitude(x, 2, 4)), float(bound(x, 2, 4))
    return (float(kept(x, order)) - default) / (best - default)


def partitions(columns: tuple[int, ...], m: int):
    """Every way to part columns into stripes, by definition."""
    if not columns:
        yield ()
        return
    for rest in itertools.combinations(columns[1:], m - 1):
        others = tuple(column for column in columns[1:] if column not in rest)
        for tail in partitions(others, m):
            yield (columns[0], *rest, *tail)


def test_there_are_as_many_partitions_as_the_formula_says():
    assert sum(1 for _ in partitions(tuple(range(8)), 4)) == 35
    assert sum(1 for _ in partitions(tuple(range(12)), 4)) == 5775


def test_kept_magnitude_by_hand():
    x = torch.tensor([[[1.0, 5, 2, 3, 1, 1, 1, 1], [4, 0, 0, 9, 7, 7, 0, 1]]])
    assert kept_magnitude(x, 2, 4).tolist() == [8 + 2 + 13 + 14]
    assert kept_magnitude(x, 1, 4).tolist() == [5 + 1 + 9 + 7]
    assert bound(x, 2, 4).tolist() == [5 + 3 + 2 + 1 + 9 + 7 + 7 + 4]


ORDERS = torch.tensor(list(partitions(tuple(range(12)), 4)))  # [5775, 12]


@pytest.mark.parametrize(
    ("strategy", "stripes", "share"),
    [("stripe-groups", 2, 0.85), ("channel-swap", 2, 0.85), ("stripe-groups", 3, 1)],
)
def test_three_stripes_against_every_order(strategy, stripes, share):
    """12 columns, 16 rows, 20 seeds. Measured shares of the gain that there is: .97, .94, 1."""
    x = torch.cat([uniform(16, 12, seed) for seed in range(20)])
    best = torch.stack([kept_magnitude(each[:, ORDERS].transpose(0, 1), 2, 4).amax() for each in x])
    default = kept_magnitude(x, 2, 4)
    order = searched(x, strategy=strategy, group_stripes=stripes, escapes=10)
    found = kept(x, order)
    assert torch.equal(order.sort(1).values, torch.arange(12).expand(20, -1))
    assert (found <= best + 1e-4).all()
    possible = best > default  # of one seed the given order is the best
    assert possible.sum() >= 19
    shares = ((found - default) / (best - default))[possible]
    print(strategy, stripes, float(shares.mean()))
    assert float(shares.mean()) >= share - 1e-6


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 3), (1, 4), (3, 4)])
def test_other_patterns_against_every_order_of_two_stripes(n, m):
    x = uniform(5, 2 * m, problems=8)
    orders = torch.tensor(list(partitions(tuple(range(2 * m)), m)))
    best = torch.stack([kept_magnitude(each[:, orders].transpose(0, 1), n, m).amax() for each in x])
    torch.testing.assert_close(kept(x, searched(x, n=n, m=m), n, m), best)


def test_uniform_weights_gain_what_the_paper_gains():
    """U(0, 1), 128 x 64. Measured over three seeds: stripe-groups .30 to .34, swaps .30 to .33, random .05
    to .10."""
    x = uniform(128, 64)
    groups, swaps = (
        efficacy(x, searched(x, strategy=strategy)) for strategy in ("stripe-groups", "channel-swap")
    )
    random = efficacy(x, searched(x, strategy="random", escapes=1000))
    assert groups >= 0.25
    assert swaps >= 0.25
    assert 0 < random <= 0.15


@pytest.mark.parametrize("strategy", ["stripe-groups", "channel-swap"])
def test_leaving_minima_never_loses(strategy):
    x = uniform(16, 32, problems=6)
    without = kept(x, searched(x, strategy=strategy))
    gained = [kept(x, searched(x, strategy=strategy, escapes=escapes)) - without for escapes in (5, 20, 60)]
    assert all((gain >= 0).all() for gain in gained)
    assert gained[2].sum() > 0


def test_a_hidden_pattern_is_found_again():
    """A 2:4 matrix, its columns shuffled: .87 of the magnitude is kept as it lies, everything in order."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(1, 32, 8, 4, generator=generator) + 0.1
    places = torch.rand(x.shape, generator=generator).argsort(-1)
    x = torch.where(places < 2, x, 0).view(1, 32, 32)[:, :, torch.randperm(32, generator=generator)]
    share = {
        strategy: float(kept(x, searched(x, strategy=strategy, escapes=100)) / x.sum())
        for strategy in ("stripe-groups", "channel-swap")
    }
    print(share, float(kept_magnitude(x, 2, 4) / x.sum()))
    assert float(kept_magnitude(x, 2, 4) / x.sum()) < 0.9
    assert share["stripe-groups"] >= 0.999
    assert share["channel-swap"] >= 0.97


def test_problems_side_by_side_are_searched_as_if_alone():
    x = uniform(16, 32, problems=5)
    together = searched(x)
    for index in range(5):
        assert torch.equal(together[index], searched(x[index : index + 1])[0])


@pytest.mark.parametrize("columns", [4, 260, 532])
def test_wide_problems_are_searched_in_blocks(columns):
    x = uniform(4, columns, problems=2)
    order = searched(x, strategy="channel-swap")
    assert torch.equal(order.sort(1).values, torch.arange(columns).expand(2, -1))
    gain = kept(x, order) / kept_magnitude(x, 2, 4)
    assert (gain > (1.02 if columns > 4 else 0.999)).all()


def test_the_same_seed_gives_the_same_order():
    x = uniform(8, 32)
    assert torch.equal(searched(x, seed=1, escapes=9), searched(x, seed=1, escapes=9))


def test_time_ends_a_search_with_the_best_so_far():
    x = uniform(64, 64)
    started = time.monotonic()
    order = searched(x, escapes=10**6, deadline=started + 0.5)
    assert time.monotonic() - started < 5
    assert kept(x, order) > kept_magnitude(x, 2, 4)


def test_orders_of_equal_columns_stay():
    x = torch.ones(1, 8, 16)
    assert searched(x, escapes=3).tolist() == [list(range(16))]


@pytest.mark.parametrize(("m", "columns", "stripes"), [(4, 8, 2), (4, 12, 3), (8, 16, 2), (2, 6, 3)])
def test_groups_of_columns(m, columns, stripes):
    assert groups_for("stripe-groups", m, columns) == stripes


@pytest.mark.parametrize(
    ("m", "columns", "words"),
    [(4, 10, "8 or 12"), (4, 16, "8 or 12"), (8, 24, "partitions"), (16, 32, "use strategy=channel-swap")],
)
def test_groups_that_cannot_be_tried_are_refused(m, columns, words):
    with pytest.raises(ConfigError, match=words):
        groups_for("stripe-groups", m, columns)
    assert groups_for("channel-swap", m, columns) == 2
