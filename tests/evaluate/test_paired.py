"""Paired statistics against scipy, closed forms and simulation."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from harness.errors import ConfigError
from harness.evaluate.paired import (
    benjamini_hochberg,
    choice_kl,
    compare_paired,
    detectable_mean_difference,
    discordant,
    flips,
    mcnemar,
    minimum_detectable_effect,
    paired_bootstrap_difference,
    sign_flip_test,
    wilson,
)
from harness.records import Item


def items(outcomes, metric="acc", **detail):
    return [Item(index, metric, float(value), detail) for index, value in enumerate(outcomes)]


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (1, 1), (3, 8), (8, 3), (0, 12), (40, 61), (900, 1010)])
def test_mcnemar_is_the_binomial_test(b, c):
    expected = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 40), (40, 40), (3, 17), (517, 1000)])
@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_wilson_is_scipys(k, n, confidence):
    expected = stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert wilson(k, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("k", "n"), [(-1, 3), (4, 3), (0, 0)])
def test_wilson_refuses_what_is_no_share(k, n):
    with pytest.raises(ValueError, match="a share needs"):
        wilson(k, n)


@pytest.mark.parametrize("seed", range(3))
def test_benjamini_hochberg_is_scipys(seed):
    pvalues = np.random.default_rng(seed).uniform(size=25) ** 3
    adjusted = benjamini_hochberg(pvalues.tolist())
    assert adjusted == pytest.approx(stats.false_discovery_control(pvalues).tolist())
    assert benjamini_hochberg([]) == []


def test_discordant_items_and_flips():
    a, b = items([1, 1, 0, 0, 1, 0]), items([1, 0, 1, 0, 0, 0])
    assert discordant(a, b, "acc") == (2, 1)
    record = flips(a, b, "acc")
    assert (record.metric, record.value, record.unit, record.n) == ("acc_flips", 0.5, "fraction", 6)
    assert (record.lower, record.upper) == wilson(3, 6)


def test_flips_sees_what_accuracy_does_not():
    a, b = items([1, 0] * 50), items([0, 1] * 50)
    assert sum(i.outcome for i in a) == sum(i.outcome for i in b)
    assert flips(a, b, "acc").value == 1.0


def test_items_are_matched_by_index_not_by_place():
    a = items([1, 0, 1])
    assert flips(a, list(reversed(a)), "acc").value == 0.0


def test_items_of_different_data_are_refused():
    with pytest.raises(ConfigError, match=r"3 and 2, 2 in common"):
        flips(items([1, 0, 1]), items([1, 0]), "acc")
    with pytest.raises(ConfigError, match="no items of 'f1'"):
        flips(items([1]), items([1]), "f1")


def test_paired_difference_is_far_sharper_than_unpaired():
    rng = np.random.default_rng(0)
    hard = rng.normal(5, 2, size=400)  # items differ much more than the two models do
    a, b = hard + rng.normal(0, 0.1, 400), hard + 0.05 + rng.normal(0, 0.1, 400)
    difference = paired_bootstrap_difference(a.tolist(), b.tolist(), seed=1)
    expected = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert difference.value == pytest.approx(np.mean(b - a))
    assert difference.lower == pytest.approx(expected.low, abs=0.002)
    assert difference.upper == pytest.approx(expected.high, abs=0.002)
    assert stats.ttest_ind(b, a).pvalue > 0.2
    assert difference.lower > 0


def test_paired_difference_weights_and_seed():
    a, b, weights = [1.0, 2.0, 3.0], [2.0, 2.0, 5.0], [1.0, 1.0, 2.0]
    assert paired_bootstrap_difference(a, b, 0, weights).value == pytest.approx((1 + 0 + 4) / 4)
    assert paired_bootstrap_difference(a, b, 0) == paired_bootstrap_difference(a, b, 0)
    assert paired_bootstrap_difference(a, a, 0) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="of one length"):
        paired_bootstrap_difference([1.0], [1.0, 2.0], 0)


@pytest.mark.parametrize("n", [2, 7, 12])
def test_sign_flips_of_few_pairs_are_counted_as_scipy_counts_them(n):
    differences = np.random.default_rng(n).normal(0.5, 1, size=n)
    expected = stats.permutation_test(
        (differences,), np.sum, permutation_type="samples", n_resamples=np.inf, vectorized=False
    )
    assert sign_flip_test(differences) == pytest.approx(expected.pvalue)


def test_sign_flips_of_more_pairs_are_drawn_and_of_many_normal():
    rng = np.random.default_rng(0)
    for n in (60, 900, 1100, 5000):
        differences = rng.normal(2 / math.sqrt(n), 1, size=n)
        # For normal differences the t-test of pairs is the reference.
        expected = stats.ttest_1samp(differences, 0).pvalue
        assert sign_flip_test(differences) == pytest.approx(expected, rel=0.15, abs=0.002)


def test_sign_flips_count_what_an_item_weighs():
    differences, weights = [3.0, -1.0, 0.5], [1.0, 5.0, 2.0]
    weighted = [d * w for d, w in zip(differences, weights, strict=True)]
    assert sign_flip_test(differences, weights) == sign_flip_test(weighted)
    assert sign_flip_test([0.0, 0.0]) == 1.0
    assert sign_flip_test([0.0, 1.0, 0.0]) == 1.0  # one pair shows nothing


@pytest.mark.parametrize("n", [11, 25])
def test_a_test_of_nothing_finds_it_one_time_in_twenty(n):
    rng = np.random.default_rng(n)
    values = [sign_flip_test(rng.normal(size=n)) for _ in range(200)]
    assert 0.015 <= np.mean(np.array(values) < 0.05) <= 0.085


def test_mcnemar_of_nothing_errs_at_most_one_time_in_twenty():
    draws = np.random.default_rng(0).multinomial(500, [0.05, 0.05, 0.9], size=2000)
    assert np.mean([mcnemar(int(b), int(c)) < 0.05 for b, c, _ in draws]) <= 0.055


@pytest.mark.parametrize("weighted", [False, True])
def test_the_paired_interval_covers_the_true_difference(weighted):
    rng, covered, n = np.random.default_rng(2), 0, 120
    weights = rng.integers(100, 500, size=n).astype(float).tolist() if weighted else None
    for seed in range(300):
        a = rng.normal(3, 1, size=n)
        b = a + 0.05 + rng.normal(0, 0.2, size=n)
        found = paired_bootstrap_difference(a.tolist(), b.tolist(), seed, weights)
        covered += found.lower <= 0.05 <= found.upper
    assert 0.9 < covered / 300 < 0.985


@pytest.mark.parametrize(("n", "expected"), [(30, 3), (100, 1.5), (1000, 3)])
def test_the_interval_of_a_few_flips_covers_the_true_difference(n, expected):
    """A bootstrap covers it 65 to 90 times in 100: with no flip, or all to one side, it sees no spread."""
    lost, won = 0.8 * expected / n, 0.2 * expected / n
    draws = np.random.default_rng(0).multinomial(n, [lost, won, 1 - lost - won], size=300)
    covered = 0
    for a_only, b_only, same in draws:
        a, b = [1.0] * a_only + [0.0] * b_only, [0.0] * a_only + [1.0] * b_only
        found = compare_paired([*a, *[1.0] * same], [*b, *[1.0] * same]).difference
        covered += found.lower <= won - lost <= found.upper
    assert covered / 300 > 0.93


def test_no_flip_is_no_proof_that_there_is_no_difference():
    few, many = ([1.0] * n for n in (10, 1500))
    assert compare_paired(few, few).difference == pytest.approx((0.0, -0.2775, 0.2775), abs=1e-4)
    assert compare_paired(many, many).difference.upper < 0.003
    # Items that count differently amount to fewer, here to 18² / (9 + 81).
    weighted, z = compare_paired(few, few, [1.0] * 9 + [9.0]), stats.norm.ppf(0.975)
    assert weighted.difference.upper == pytest.approx(z**2 / (3.6 + z**2))
    assert weighted.detectable == math.inf
    some = compare_paired(many, many, [1.0] * 750 + [2.0] * 750)
    assert some.detectable == minimum_detectable_effect(1350, 0)


def test_numbers_that_happen_to_be_0_are_no_answers():
    found = compare_paired([0.0] * 10, [0.0] * 10, answers=False)
    assert (found.difference, found.flips, found.p) == ((0.0, 0.0, 0.0), None, 1.0)
    assert found.detectable == math.inf  # pairs that are all alike say nothing of the spread


def test_a_detectable_difference_is_found_four_times_in_five():
    rng, n, found = np.random.default_rng(0), 60, 0
    weights = rng.uniform(0.5, 2, size=n)
    d = detectable_mean_difference(rng.normal(0, 0.3, size=n), weights.tolist())
    for _ in range(150):
        changes = d + rng.normal(0, 0.3, size=n)
        found += sign_flip_test(changes, weights.tolist()) < 0.05
    assert 0.7 < found / 150 < 0.9
    assert detectable_mean_difference([0.4]) == math.inf


def test_right_and_wrong_is_tested_by_mcnemar_and_the_rest_by_sign_flips():
    a, b = [1.0] * 60 + [0.0] * 40, [1.0] * 50 + [0.0] * 45 + [1.0] * 5
    found = compare_paired(a, b)
    assert (found.n, found.test, found.flips) == (100, "McNemar", 0.15)
    assert found.p == mcnemar(10, 5)
    assert found.detectable == minimum_detectable_effect(100, 0.15)
    assert found.difference.value == pytest.approx(-0.05)
    # Where the members of a group count the same, items do not: McNemar's test would count them.
    assert compare_paired(a, b, [1.0] * 50 + [2.0] * 50).test == "sign flips"
    losses = compare_paired([2.0, 3.0, 4.0], [2.1, 3.3, 4.2])
    assert (losses.test, losses.p, losses.flips) == ("sign flips", 0.25, None)
    with pytest.raises(ValueError, match="of one length"):
        compare_paired([1.0], [])


@pytest.mark.parametrize(("n", "q"), [(200, 0.2), (1000, 0.1), (5000, 0.05)])
def test_minimum_detectable_effect_solves_connors_equation(n, q):
    d = minimum_detectable_effect(n, q)
    z_alpha, z_beta = stats.norm.ppf(0.975), stats.norm.ppf(0.8)
    assert n * d**2 == pytest.approx((z_alpha * math.sqrt(q) + z_beta * math.sqrt(q - d**2)) ** 2)


def test_minimum_detectable_effect_has_its_power():
    """Simulated: an effect of that size is found about four times in five."""
    n, q = 800, 0.15
    d = minimum_detectable_effect(n, q)
    rng = np.random.default_rng(0)
    draws = rng.multinomial(n, [(q + d) / 2, (q - d) / 2, 1 - q], size=2000)
    found = np.mean([mcnemar(int(b), int(c)) < 0.05 for b, c, _ in draws])
    assert 0.74 < found < 0.84  # the exact test is a little more cautious than the formula


@pytest.mark.parametrize(("n", "flips"), [(6, 0), (10, 1), (100, 5), (1500, 2)])
def test_what_few_flips_would_hide_shows_where_all_go_to_one_side(n, flips):
    """A true difference brings flips with it, however few these items have shown."""
    d = minimum_detectable_effect(n, flips / n)
    significant = next(k for k in range(n + 1) if mcnemar(0, k) < 0.05)
    assert stats.binom.sf(significant - 1, n, d) == pytest.approx(0.8)
    # Near the share at which Connor's formula takes over the two agree.
    assert minimum_detectable_effect(1000, 0.0078) == pytest.approx(
        minimum_detectable_effect(1000, 0.0082), rel=0.06
    )


def test_minimum_detectable_effect_shrinks_with_n_and_grows_with_flips():
    assert minimum_detectable_effect(4000, 0.1) < minimum_detectable_effect(1000, 0.1)
    assert minimum_detectable_effect(1000, 0.05) < minimum_detectable_effect(1000, 0.2)
    assert minimum_detectable_effect(5, 0.2) == math.inf
    # No flip among 1000 is no proof that there are none.
    assert minimum_detectable_effect(1000, 0.0) == minimum_detectable_effect(1000, 0.001)


def test_choice_kl_is_scipys_entropy():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 5, 4)) - 50
    sides = [
        [Item(i, "acc", 1.0, {"loglikelihoods": row.tolist()}) for i, row in enumerate(side)]
        for side in logits
    ]
    p, q = (np.exp(side - side.max(-1, keepdims=True)) for side in logits)
    expected = [stats.entropy(x, y) for x, y in zip(p, q, strict=True)]
    record = choice_kl(*sides)
    assert record.value == pytest.approx(np.mean(expected))
    assert record.lower <= record.value <= record.upper
    assert choice_kl(sides[0], sides[0]).value == 0.0
    assert choice_kl(sides[1], sides[0]).value != pytest.approx(record.value)


def test_choice_kl_needs_log_likelihoods():
    with pytest.raises(ConfigError, match="carry no log-likelihoods"):
        choice_kl(items([1]), items([1]))


def test_no_torch_and_no_lm_eval_are_imported():
    code = (
        "import sys, json, harness.evaluate.paired, harness.evaluate.intervals\n"
        "print(json.dumps([m for m in ('torch', 'lm_eval', 'scipy') if m in sys.modules]))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(output.stdout) == []
