"""The tables of what methods cost in quality, and the page that shows the committed ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.quality_tables import PAGE, quality_section, update_quality_page
from harness.records import CellKind, Record, Status
from harness.reference_tables import BEGIN, END, QUALITY, reference_files, update_readme, with_section
from harness.store.exchange_export import Wanted, export_results
from harness.store.store import Store
from tests.store.rows import begin_sweep, make_result, make_variant

ROOT = Path(__file__).parents[2]
MANIFEST = {"time_utc": "2026-01-02T03:04:05+00:00", "measuring_version": 2, "versions": {"torch": "2.11"}}


def _stored(bits, ratio):
    return [Record("stored_bits_per_weight", bits, "bit"), Record("compression_ratio", ratio, "x")]


def _kjv(perplexity, rise=None):
    records = [Record("nll", 3.0, "nats/token"), Record("token_perplexity", perplexity, "ppl")]
    if rise is not None:
        records += [
            Record("nll_rise", rise, "nats/token", rise - 0.01, rise + 0.01),
            Record("mean_kl", 0.0625, "nats/token"),
        ]
    return records


def _grammar(acc, difference=None):
    records = [Record("acc", acc, "fraction", acc - 0.02, acc + 0.02)]
    if difference is not None:
        records += [
            Record("acc_difference", difference, "fraction", difference - 0.01, difference + 0.01),
            Record("flips", 0.047, "fraction"),
        ]
    return records


@pytest.fixture
def checkout(tmp_path):
    """A baseline, a worse and a better method of 4 bits, one of 8, and one that failed."""
    about = {"model": "zoo:m", "device_name": "a CPU", "dtype": "float32", "synthetic": False}
    variants = {
        "baseline": ("baseline", False, _stored(32.0, 1.0), _kjv(20.0), _grammar(0.75)),
        "worse:bits=4": ("quantization", True, _stored(4.25, 2.5), _kjv(26.0, 0.2), _grammar(0.7, -0.05)),
        "better": ("quantization", False, _stored(4.15, 2.4), _kjv(21.0, 0.05), _grammar(0.74, -0.01)),
        "eight": ("quantization", False, _stored(8.0, 1.9), _kjv(20.1, -0.001), _grammar(0.75, 0.0)),
        "broken": ("quantization", False, _stored(4.0, 2.5), None, None),
    }
    made = {
        name: make_variant(
            name.replace(":bits=", "-"), method=name, family=family, simulated=simulated, **about
        )
        for name, (family, simulated, *_) in variants.items()
    }
    with Store.open(tmp_path / "results.db") as store:
        sweep = begin_sweep(store, *made.values(), manifest=MANIFEST)
        for name, (_, _, stored, kjv, grammar) in variants.items():
            key = made[name].key
            transformed = make_result(f"{key}-t", key, records=tuple(stored), items=())
            store.write_cell(sweep, transformed, kind=CellKind.TRANSFORM, task=None, scenario=None)
            for task, records in (("kjv", kjv), ("grammar", grammar)):
                status, reason = (Status.OK, None) if records else (Status.FAILED, "NaN in the logits")
                scored = make_result(
                    f"{key}-{task}", key, status, records=tuple(records or ()), items=(), reason=reason
                )
                store.write_cell(sweep, scored, kind=CellKind.TASK, task=task, scenario=None)
        (tmp_path / "reference").mkdir()
        export_results(store, tmp_path / "reference" / f"{QUALITY}m.jsonl", Wanted())
    return tmp_path


def test_a_line_for_every_scored_variant_fewest_bits_last_and_least_loss_first(checkout):
    section = quality_section(reference_files(checkout))
    assert "**a CPU**, float32, torch 2.11, 2026-01-02 (measuring version 2, nothing timed;" in section
    assert "(../reference/quality-m.jsonl)" in section
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert [row.split(" | ")[0] for row in rows] == [
        "| baseline", "| eight", "| better", "| worse:bits=4 (simulated)",
    ]  # fmt: skip
    assert rows[0] == "| baseline | 32 | 1x | 20 |  |  | 75.0 |  |  |"
    assert rows[3] == (
        "| worse:bits=4 (simulated) | 4.25 | 2.5x | 26 | +0.2 [+0.19, +0.21] | 0.062 | 70.0 "
        "| -5.0 [-6.0, -4.0] | 4.7 |"
    )
    assert "- zoo:m kjv: failed (NaN in the logits): broken" in section


def test_an_encoder_has_columns_of_its_own(tmp_path):
    about = {"model": "minilm", "device_name": "a CPU", "synthetic": False}
    scored = {
        "baseline": [Record("spearman", 0.8672, "1")],
        "gobo": [
            Record("spearman", 0.85, "1"),
            Record("spearman_difference", -0.0172, "1", -0.02, -0.014),
            Record("embedding_distance", 0.0123, "1"),
        ],
    }
    with Store.open(tmp_path / "results.db") as store:
        made = [make_variant(name, method=name, family=name, **about) for name in scored]
        sweep = begin_sweep(store, *made, manifest=MANIFEST)
        for name, records in scored.items():
            result = make_result(f"{name}-stsb", name, records=tuple(records), items=())
            store.write_cell(sweep, result, kind=CellKind.TASK, task="stsb", scenario=None)
        (tmp_path / "reference").mkdir()
        export_results(store, tmp_path / "reference" / f"{QUALITY}m.jsonl", Wanted())
    rows = [line for line in quality_section(reference_files(tmp_path)).splitlines() if line.startswith("|")]
    assert rows == [
        "| method | stsb Spearman | stsb difference | stsb embedding distance |",
        "|---|---|---|---|",
        "| baseline | 0.8672 |  |  |",
        "| gobo | 0.8500 | -0.0172 [-0.0200, -0.0140] | 0.012 |",
    ]


def test_the_page_and_not_the_readme_shows_them(checkout):
    (checkout / "docs").mkdir()
    for page in (checkout / PAGE, checkout / "README.md"):
        page.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n")
    update_readme(checkout)
    update_quality_page(checkout)
    assert "worse:bits=4" not in (checkout / "README.md").read_text()
    page = (checkout / PAGE).read_text()
    assert "worse:bits=4" in page
    assert "old" not in page


def test_a_checkout_without_the_page_is_left_as_it_is(checkout):
    update_quality_page(checkout)
    assert not (checkout / PAGE).exists()


def test_the_page_shows_the_rows_that_are_committed():
    page = (ROOT / PAGE).read_text()
    files = [file for file in reference_files(ROOT) if file.name.startswith(QUALITY)]
    assert files
    assert with_section(page, quality_section(files), PAGE) == page, "run: make docs"
