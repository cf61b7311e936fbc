"""Everything that is registered keeps the contract of a method."""

from __future__ import annotations

import pytest

from harness.plugins import load_plugins
from harness.testing import TINY_FAMILIES, check_method

METHODS = dict(load_plugins().methods)

OPTIONS_FOR_TINY_MODELS = {
    "bitsandbytes": {"scheme": "nf4"},  # the default needs CUDA
    "llm-compressor": {"group_size": 32},
    "channel-permute": {"bounded_regressions": 1, "max_rows": 8, "strategy": "channel-swap"},
    "block-local": {"window": 8},  # models of 128 positions
    "gqa": {"groups": 2},
    "peg": {"groups": 8},  # 6 do not divide a width of 128
    "q-bert": {"n_subsets": 1, "power_iters": 2},
    "zeroquant-lkd": {"iters": 4},
}


@pytest.mark.parametrize("name", METHODS)
def test_contract(name):
    report = check_method(METHODS[name], options=OPTIONS_FOR_TINY_MODELS.get(name))
    assert {*report.checked, *report.skipped} == set(TINY_FAMILIES)


def test_the_bundled_methods_are_found():
    expected = {"baseline", "block-local", "distilbert", "gqa", "magnitude-prune", "mqa"}
    assert expected <= METHODS.keys()


def test_every_small_option_belongs_to_a_method():
    assert OPTIONS_FOR_TINY_MODELS.keys() <= METHODS.keys()
