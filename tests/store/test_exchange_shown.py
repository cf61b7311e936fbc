"""Imported rows where people see them: the commands, comparisons and the dashboard."""

from __future__ import annotations

import pytest

from harness.cli.app import run
from harness.comparing import compare_methods
from harness.records import CellKind, Record
from harness.store import queries
from harness.store.store import Store
from tests.store.rows import begin_sweep, make_result, make_variant
from tests.store.test_exchange import fill

SHAPE = "b1-p8-g4"


@pytest.fixture
def harness(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.delenv("HARNESS_DB", raising=False)

    def harness(*arguments):
        capsys.readouterr()
        code = run(list(arguments))
        said = capsys.readouterr()
        return code, said.out, said.err

    return harness


def measure(path, baseline_s, gptq_s):
    """A store in which a baseline and a method were timed once."""
    with Store.open(path) as store:
        base = make_variant(
            "base", method="baseline", family="baseline", chain=[{"name": "baseline", "options": {}}]
        )
        sweep = begin_sweep(store, base, make_variant(method="gptq"), manifest={"sweep_uid": str(path)})
        for key, seconds in (("base", baseline_s), ("variant-a", gptq_s)):
            latency = Record("decode_latency", seconds, "s", seconds * 0.99, seconds * 1.01, n=9, mode="cpu")
            result = make_result(f"{key}-speed", key, records=(latency,), items=())
            store.write_cell(sweep, result, kind=CellKind.SCENARIO, task=None, scenario=SHAPE)


@pytest.fixture
def both(tmp_path, harness):
    """A store with rows measured here (half as fast) and rows from a colleague (twice as fast)."""
    measure(tmp_path / "theirs.db", 4.0, 2.0)
    measure(tmp_path / "results.db", 1.0, 2.0)
    assert harness("results", "export", "theirs.jsonl", "--db", "theirs.db")[0] == 0
    assert harness("results", "import", "theirs.jsonl")[0] == 0
    return tmp_path / "results.db"


@pytest.mark.parametrize(
    ("option", "name", "near"),
    [
        ("--models", "zoo:nobody", "unknown model in this store: 'zoo:nobody'"),
        ("--methods", "baseline,gptqq", "unknown method in this store: 'gptqq'; did you mean 'gptq'?"),
        ("--tasks", "kvj", "unknown task in this store: 'kvj'"),
        ("--metrics", "decode_latenzy", "in this store: 'decode_latenzy'; did you mean 'decode_latency'?"),
    ],
)
def test_a_name_that_a_store_has_nothing_of_is_refused(harness, tmp_path, option, name, near):
    measure(tmp_path / "results.db", 1.0, 2.0)
    for command in (("results",), ("results", "--format", "json"), ("results", "export", "out.jsonl")):
        if option == "--metrics" and "export" in command:
            continue
        code, out, err = harness(*command, option, name)
        assert (code, out) == (2, "")
        assert near in err
    assert not (tmp_path / "out.jsonl").exists()
    assert harness("results", "--methods", "gptq", "--status", "oom", "--format", "json")[1] == "[]\n"


def test_what_the_commands_say(harness, tmp_path):
    with Store.open(tmp_path / "measured.db") as store:
        fill(store)
    code, out, err = harness("results", "export", "rows.jsonl", "--db", "measured.db", "--no-samples")
    assert (code, err) == (0, "")
    assert out.startswith("rows.jsonl: 2 sweeps, 2 variants, 5 cells, 8 records (")
    code, out, err = harness("results", "import", "rows.jsonl")
    assert (code, out) == (0, "rows.jsonl: 5 cells imported, 2 new sweeps\n")
    assert (
        harness("results", "import", "rows.jsonl")[1] == "rows.jsonl: nothing new, 5 cells imported before\n"
    )
    assert harness("results", "import", "rows.jsonl", "--db", "measured.db")[1] == (
        "rows.jsonl: nothing new, 2 sweeps left out that this store measured itself\n"
    )


def test_rows_of_another_measuring_version_are_told(harness, tmp_path, monkeypatch):
    with Store.open(tmp_path / "measured.db") as store:
        fill(store)
    assert harness("results", "export", "rows.jsonl", "--db", "measured.db")[0] == 0
    monkeypatch.setattr("harness.measure.MEASURING_VERSION", 3)
    code, _, err = harness("results", "import", "rows.jsonl")
    assert code == 0
    assert "was measured with measuring version 2, this harness measures with 3: do not compare" in err


def test_bad_calls_are_one_line_and_make_no_store(harness, tmp_path):
    (tmp_path / "notes.txt").write_text("hello\n")
    for arguments, said in (
        (("import", "notes.txt"), "notes.txt, line 1: not JSON"),
        (("import", "missing.jsonl"), "missing.jsonl does not exist"),
        (("import",), "Missing argument"),
        (("export",), "Missing argument"),
        (("export", "rows.jsonl"), "no results store at"),
        (("imprt", "rows.jsonl"), "No such command 'imprt'"),
        (("--db", "x.db", "export", "rows.jsonl"), "--db stands before export: options go behind it"),
        (("--format", "json", "import", "rows.jsonl"), "--format stands before import"),
    ):
        code, out, err = harness("results", *arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert said in err
        assert "Traceback" not in err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notes.txt"]


def test_the_table_and_the_json_say_where_rows_come_from(harness, both):
    _, table, _ = harness("results")
    lines = [line for line in table.splitlines() if "gptq" in line]
    assert len(lines) == 2
    assert ["imported: theirs.jsonl" in line for line in lines].count(True) == 1
    _, json, _ = harness("results", "--format", "json")
    assert json.count('"origin": "theirs.jsonl"') == json.count('"origin": null') == 2


def test_rows_are_compared_with_rows_of_the_same_origin(both):
    with Store.open_readonly(both) as store:
        found = compare_methods(store, "baseline", "gptq")
    assert {(row.ratio, "imported from theirs.jsonl" in row.flags) for row in found} == {
        (2.0, False),
        (0.5, True),
    }


def test_the_dashboard_pairs_rows_of_the_same_origin_and_marks_them(both):
    pytest.importorskip("streamlit")
    from harness_dashboard import queries as shown

    with Store.open_readonly(both) as store:
        about = shown.described(store, shown.matching(store, shown.Filters(), None))
        columns = shown.columns(store, None)
        values = shown.values(store, columns, None, about["variant"].tolist())
        pairs = shown.baselines(store, about, None)
        found = shown.differences(store, columns, values, pairs, about)
    marks = about.set_index("variant")["marks"]
    assert sorted(zip(found["ratio"], found["variant"].map(marks), strict=True)) == [
        (0.5, "imported"),
        (2.0, ""),
    ]
    assert queries.RESULT_COLUMNS[-1] == "origin"
