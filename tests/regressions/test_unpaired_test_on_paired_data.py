"""An unpaired z-test on paired data: it misses what the items show, and its p-value is not the question's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from harness.comparing import compare_methods
from harness.derive import baseline_records
from harness.evaluate.paired import compare_paired
from harness.records import Record
from harness.store.store import Store
from tests.core.stores import add_cell, add_sweep, items

N = 1000


def z_test(a, b):
    """What others ship: two shares with their standard errors, as if of two sets of items."""
    error = math.sqrt(sum(x.mean() * (1 - x.mean()) / len(x) for x in (a, b)))
    return 2 * stats.norm.sf(abs(b.mean() - a.mean()) / error)


@pytest.fixture
def outcomes():
    """Of 1,000 items 600 are right; the variant loses 20 of them and wins 4."""
    a = np.zeros(N)
    a[:600] = 1
    b = a.copy()
    b[:20] = 0
    b[600:604] = 1
    return a, b


def test_what_the_items_show_is_found(tmp_path, outcomes):
    a, b = outcomes
    assert z_test(a, b) > 0.4
    expected = stats.binomtest(4, 24).pvalue
    assert expected < 0.002
    with Store.open(tmp_path / "results.db") as store:
        sweep = add_sweep(store)
        for method, outcome in (("baseline", a), ("new", b)):
            record = Record("acc", outcome.mean(), "fraction", n=N)
            add_cell(store, sweep, method, record, task="grammar", items=items(outcome))
        (row,) = compare_methods(store, "baseline", "new")
    assert row.p_raw == pytest.approx(expected)
    assert row.verdict == "worse"
    assert row.upper < 0
    stored = {record.metric: record for record in baseline_records(items(a), items(b))}
    assert stored["acc_difference_p"].value == pytest.approx(expected)


def test_the_unpaired_test_almost_never_finds_a_difference_that_the_paired_one_nearly_always_does():
    rng, paired, unpaired = np.random.default_rng(0), 0, 0
    for _ in range(60):
        a = (rng.random(N) < 0.6).astype(float)
        b = np.where(rng.random(N) < 0.05, 0.0, a)  # one right answer in twenty is lost
        paired += compare_paired(a, b).p < 0.05
        unpaired += z_test(a, b) < 0.05
    assert paired == 60
    assert unpaired < 30
