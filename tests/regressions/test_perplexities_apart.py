"""Perplexities that mean different things are never put in one column."""

from __future__ import annotations

import pytest
from harness_dashboard.queries import columns as dashboard_columns

from harness.cli.app import run
from harness.evaluate.metrics import record_name
from harness.records import Record
from harness.store.store import Store
from tests.core.stores import add_cell, add_sweep


def note(length, windows):
    return f"seq_len={length}, windows={windows}, dropped_tokens=0"


@pytest.mark.parametrize(
    ("cells", "columns"),
    [
        # Another task.
        (
            [("m", "kjv", note(128, 9)), ("m", "wikitext", note(128, 9))],
            {"kjv token_perplexity", "wikitext token_perplexity"},
        ),
        # Another length of windows: a model sees less of what came before.
        (
            [("m", "kjv", note(128, 16)), ("n", "kjv", note(512, 4))],
            {"kjv token_perplexity (windows of 128)", "kjv token_perplexity (windows of 512)"},
        ),
        # Another number of windows of one text: another tokenizer, so another unit.
        (
            [("m", "kjv", note(128, 16)), ("n", "kjv", note(128, 21))],
            {"kjv token_perplexity (16 windows)", "kjv token_perplexity (21 windows)"},
        ),
        # The same everywhere: one column.
        ([("m", "kjv", note(128, 16)), ("n", "kjv", note(128, 16))], {"kjv token_perplexity"}),
    ],
)
def test_each_meaning_has_a_column(tmp_path, capsys, cells, columns):
    with Store.open(tmp_path / "results.db") as store:
        sweep = add_sweep(store)
        for number, (model, task, said) in enumerate(cells):
            record = Record("token_perplexity", 20.0 + number, "ppl", note=said)
            add_cell(store, sweep, "new", record, task=task, model=model, key=f"{model} {task}")
        dashboard = {column.name for column in dashboard_columns(store, None)}
    assert run(["results", "--db", str(tmp_path / "results.db")]) == 0
    header = next(line for line in capsys.readouterr().out.splitlines() if "method" in line)
    shown = {name for name in columns if name in header}
    assert shown == columns
    assert header.count("token_perplexity") == len(columns) == len(dashboard)


def test_the_perplexity_of_targets_has_another_name_than_that_of_tokens():
    assert record_name("perplexity", "none") == "target_perplexity"
    assert record_name("word_perplexity", "none") == "word_perplexity"
