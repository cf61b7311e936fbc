"""Sweeps, stores and files side by side: what is matched, what is missing, and what gates make of it."""

from __future__ import annotations

import hashlib
import json

import pytest

from harness.cli.app import run
from harness.comparing import Stores, parse_side, parse_sides
from harness.comparing.quality import outcome_of
from harness.errors import ConfigError
from harness.evaluate.paired import benjamini_hochberg, mcnemar
from harness.records import CellKind, CellResult, Item, Record, Status
from harness.store.store import Store
from tests.core.stores import add_cell, add_sweep, around, cell_key, items, timed, variant_key

SHAPE = "b1-p8-g2"
RIGHT = [1] * 60 + [0] * 40
WORSE = [1] * 35 + [0] * 60 + [1] * 5


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HARNESS_DB", raising=False)

    def run_it(*arguments):
        capsys.readouterr()
        code = run(["compare", *arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return run_it


def fill(store, seconds=0.01, outcomes=RIGHT, methods=("baseline", "new"), sweep=None, **changes):
    """A sweep in which every method has a time and a score; `new` has the ones that are given."""
    sweep = add_sweep(store) if sweep is None else sweep
    for method in methods:
        is_new = method == "new"
        latency = timed("decode_latency", around(seconds if is_new else 0.02))
        weight = Record("weight_bytes", 25.0 if is_new else 100.0, "B")
        add_cell(store, sweep, method, latency, weight, scenario=SHAPE, **changes)
        answers = outcomes if is_new else RIGHT
        acc = Record("acc", sum(answers) / len(answers), "fraction", n=len(answers))
        add_cell(store, sweep, method, acc, task="grammar", items=items(answers), **changes)
    return sweep


def fails(store, sweep, method, reason="killed by signal 9", **names):
    """A cell of a variant that is stored already ends anew, without an answer."""
    variant = variant_key(method)
    kind = CellKind.TASK if "task" in names else CellKind.SCENARIO
    result = CellResult(cell_key(variant, sweep, **names), variant, Status.CRASHED, reason=reason)
    cell = {"task": None, "scenario": None, **names}
    store.write_cell(sweep, result, kind=kind, **cell)


@pytest.fixture
def two_stores(tmp_path):
    """The results of main and those of a branch on which `new` is slower and worse."""
    for name, seconds, outcomes in (("main.db", 0.01, RIGHT), ("branch.db", 0.013, WORSE)):
        with Store.open(tmp_path / name) as store:
            fill(store, seconds, outcomes)


def by_metric(out, method="new"):
    return {row["metric"]: row for row in json.loads(out) if row["method_b"] == method}


# --- how sides are written ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("gptq:bits=3:group_size=64", (None, None, 0, "gptq:bits=3:group_size=64", None)),
        ("variant:12", (None, None, 0, None, 12)),
        ("sweep:3", (None, 3, 0, None, None)),
        ("sweep:last", (None, "last", 0, None, None)),
        ("sweep:last~2", (None, "last", 2, None, None)),
        ("out/main.db", ("out/main.db", None, 0, None, None)),
        ("postgresql://me@host/results", ("postgresql://me@host/results", None, 0, None, None)),
        ("main.jsonl.gz#sweep:2", ("main.jsonl.gz", 2, 0, None, None)),
        ("main.db#sweep:last#a+b", ("main.db", "last", 0, "a+b", None)),
        ("sweep:2#variant:4", (None, 2, 0, None, 4)),
    ],
)
def test_a_side_is_written_from_the_store_to_the_method(text, means):
    side = parse_side(text)
    assert (side.store, side.sweep, side.before, side.method, side.variant) == means


@pytest.mark.parametrize(
    "text",
    ["", "sweep:", "sweep:first", "sweep:last~", "variant:x", "variant:", "main.db#", "gptq#sweep:2",
     "sweep:1#sweep:2", "a#b", "variant:1#gptq"],
)  # fmt: skip
def test_what_is_no_side_is_refused(text):
    with pytest.raises(ConfigError, match="write"):
        parse_side(text)


def test_methods_may_share_a_text_and_stores_may_hold_commas():
    assert [side.text for side in parse_sides(["a,b:x=1", "b:x=1", "u,v.db"])] == ["a", "b:x=1", "u,v.db"]


def test_a_sqlite_file_is_a_store_whatever_it_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Store.open("results").close()
    (tmp_path / "gptq").write_text("no store")
    assert parse_side("results").store == "results"
    assert parse_side("gptq").method == "gptq"


def test_every_store_is_opened_read_only_and_once(two_stores, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Stores("main.db") as stores:
        first, second = stores.of(parse_side("main.db")), stores.of(parse_side("sweep:1"))
        assert first is second
        assert first.read_only
        assert stores.of(parse_side("branch.db")).read_only


# --- what is matched ----------------------------------------------------------------------------------


def test_two_stores_meet_variant_by_variant(compare, two_stores):
    code, out, err = compare("main.db", "branch.db", "--format", "json")
    assert (code, err) == (0, "")
    rows = by_metric(out)
    assert set(rows) == {"decode_latency", "weight_bytes", "acc"}
    latency = rows["decode_latency"]
    assert (latency["method_a"], latency["basis"]) == ("new", "unpaired")
    assert latency["ratio"] == pytest.approx(1.3)
    assert latency["lower"] < 1.3 < latency["upper"]
    assert (latency["side_a"], latency["side_b"]) == ("main.db", "branch.db")
    assert by_metric(out, "baseline")["decode_latency"]["ratio"] == 1


def test_items_are_paired_across_stores(compare, two_stores):
    rows = json.loads(compare("main.db", "branch.db", "--format", "json")[1])
    score = next(row for row in rows if row["metric"] == "acc" and row["method_b"] == "new")
    assert (score["basis"], score["n"], score["tests"]) == ("items", 100, 2)
    assert score["p_raw"] == pytest.approx(mcnemar(25, 5))
    assert score["p"] == pytest.approx(benjamini_hochberg([1.0, mcnemar(25, 5)])[1])
    assert score["difference"] == pytest.approx(-0.2)


def test_two_sweeps_of_one_store_take_the_same_path(compare, tmp_path):
    with Store.open(tmp_path / "results.db") as store:
        fill(store)
        fill(store, 0.013, WORSE)
    for a, b in (("sweep:1", "sweep:2"), ("sweep:last~1", "sweep:last"), ("results.db#sweep:1", "sweep:2")):
        code, out, _ = compare(a, b, "--format", "json", "--fail-on", "decode_latency>1.05x!")
        assert code == 3
        rows = by_metric(out)
        assert rows["decode_latency"]["ratio"] == pytest.approx(1.3)
        assert (rows["acc"]["sweep_a"], rows["acc"]["sweep_b"]) == (1, 2)


def test_an_exported_file_is_a_side_as_its_store_is(compare, two_stores, tmp_path):
    expected = json.loads(compare("main.db", "branch.db", "--format", "json")[1])
    assert run(["results", "export", "main.jsonl.gz", "--db", "main.db"]) == 0
    before = sorted(file.name for file in tmp_path.iterdir())
    code, out, _ = compare("main.jsonl.gz", "branch.db", "--format", "json")
    assert code == 0
    assert [{**row, "side_a": "main.db"} for row in json.loads(out)] == expected
    assert sorted(file.name for file in tmp_path.iterdir()) == before


def test_one_method_of_two_stores_and_two_variants_by_number(compare, two_stores):
    code, out, _ = compare("main.db#new", "branch.db#new", "--format", "json")
    assert code == 0
    assert by_metric(out)["decode_latency"]["ratio"] == pytest.approx(1.3)
    code, out, _ = compare("variant:1", "variant:2", "--db", "main.db", "--format", "json")
    assert code == 0
    assert by_metric(out)["decode_latency"]["ratio"] == pytest.approx(0.5)
    code, _, err = compare("variant:1", "variant:12", "--db", "main.db")
    assert code == 2
    assert "unknown variant 'variant:12'" in err


def test_rounds_against_the_baseline_stay_within_one_store(compare, tmp_path):
    """Baseline and method are both half as fast on the branch: the speed-up alone would hide it."""
    for name, factor in (("main.db", 1), ("branch.db", 2)):
        with Store.open(tmp_path / name) as store:
            sweep = add_sweep(store)
            for method, seconds in (("baseline", 0.02), ("new", 0.01)):
                records = [timed("decode_latency", around(seconds * factor))]
                if method == "new":
                    records.append(timed("decode_speedup", around(2.0), "x", "graph, paired"))
                add_cell(store, sweep, method, *records, scenario=SHAPE)
    rows = by_metric(compare("main.db", "branch.db", "--format", "json")[1])
    assert rows["decode_latency"]["ratio"] == pytest.approx(2)
    assert rows["decode_latency"]["basis"] == "unpaired"
    assert (rows["decode_speedup"]["ratio"], rows["decode_speedup"]["basis"]) == (1, "speed-ups")
    rows = by_metric(compare("baseline", "new", "--db", "branch.db", "--format", "json")[1])
    assert (rows["decode_latency"]["basis"], "decode_speedup" in rows) == ("paired", False)


def test_the_guard_holds_between_stores(compare, tmp_path):
    for name, driver in (("main.db", "580.1"), ("branch.db", "590")):
        with Store.open(tmp_path / name) as store:
            fill(store, sweep=add_sweep(store, gpu={"driver": driver}))
    code, out, err = compare("main.db", "branch.db", "--fail-on", "decode_latency>1.05x", "--allow-missing")
    assert code == 2
    assert "decode_latency" not in out
    assert "not compared: new of main.db and new of branch.db differ in driver: 580.1 and 590" in err
    code, out, _ = compare("main.db", "branch.db", "--fail-on", "decode_latency>1.05x", "--allow-different")
    assert code == 0
    assert "DIFFERENT driver: 580.1 and 590" in out


def test_a_trip_counts_though_other_rows_are_refused(compare, tmp_path):
    for name, driver, outcomes in (("main.db", "580.1", RIGHT), ("branch.db", "590", WORSE)):
        with Store.open(tmp_path / name) as store:
            fill(store, outcomes=outcomes, sweep=add_sweep(store, gpu={"driver": driver}))
    assert compare("main.db", "branch.db", "--fail-on", "acc<-0.01")[0] == 3


def test_a_changed_default_meets_its_old_self_and_is_named(compare, tmp_path):
    for name, bits in (("main.db", 4), ("branch.db", 3)):
        with Store.open(tmp_path / name) as store:
            fill(store, chain=[{"name": "new", "options": {"bits": bits, "sym": True}}], methods=("new",))
    code, out, err = compare("main.db", "branch.db", "--format", "json")
    assert (code, err) == (0, "")
    assert by_metric(out)["acc"]["flags"] == ["options: bits 4 and 3"]


def test_seed_and_dtype_are_the_variant(compare, tmp_path):
    for name, seed in (("main.db", 0), ("branch.db", 1)):
        with Store.open(tmp_path / name) as store:
            fill(store, seed=seed)
    code, out, err = compare("main.db", "branch.db", "--fail-on", "acc<-0.01")
    assert (code, "acc" in out) == (3, False)
    assert "missing in b: m new b1-p8-g2, grammar (not there)" in err
    assert "only in b: m new b1-p8-g2, grammar (not there)" in err


def test_a_method_is_not_compared_with_a_sweep(compare, two_stores):
    code, _, err = compare("new", "sweep:1", "--db", "main.db")
    assert code == 2
    assert "new is one variant and sweep:1 a whole sweep or store" in err
    assert "sweep:1#new" in err
    assert compare("main.db", "main.db")[0] == 2


def test_a_reused_cell_is_no_comparison_and_says_so(compare, tmp_path):
    with Store.open(tmp_path / "results.db") as store:
        fill(store)
        second = add_sweep(store)
        store.link_cells(second, [1, 2, 3, 4])
    code, out, err = compare("sweep:1", "sweep:2", "--format", "json", "--fail-on", "decode_latency>1.0x!")
    assert code == 0
    assert {(row["basis"], row["verdict"]) for row in json.loads(out)} == {("same measurement", "equal")}
    assert "rows are the same measurement on both sides" in err


def test_variants_named_by_number_meet_whatever_their_origin(compare, two_stores):
    """What a colleague measured of the same method beside what was measured here."""
    assert run(["results", "export", "theirs.jsonl", "--db", "branch.db"]) == 0
    assert run(["results", "import", "theirs.jsonl", "--db", "main.db"]) == 0
    code, out, _ = compare("variant:2", "variant:4", "--db", "main.db", "--format", "json")
    assert code == 0
    row = by_metric(out)["decode_latency"]
    assert (row["ratio"], row["flags"]) == (pytest.approx(1.3), ["imported from theirs.jsonl"])
    # As a whole the store is what it measured itself.
    code, out, _ = compare("main.db", "branch.db", "--format", "json")
    assert by_metric(out)["decode_latency"]["ratio"] == pytest.approx(1.3)


# --- what is missing ----------------------------------------------------------------------------------


def test_a_gate_whose_rows_are_missing_does_not_pass(compare, tmp_path):
    with Store.open(tmp_path / "main.db") as store:
        fill(store)
    with Store.open(tmp_path / "branch.db") as store:
        sweep = fill(store, methods=("baseline",))
        fill(store, methods=("new",), sweep=sweep)
        fails(store, sweep, "new", task="grammar")
    gate = ("--fail-on", "acc<-0.01")
    code, _, err = compare("main.db", "branch.db", *gate)
    assert code == 3
    assert "missing in b: m new grammar (crashed: killed by signal 9)" in err
    assert "gate acc<-0.01 cannot be judged (missing in b: m new grammar" in err
    assert compare("main.db", "branch.db", *gate, "--allow-missing")[0] == 0
    assert compare("main.db", "branch.db", "--fail-on", "decode_latency>1.5x")[0] == 0
    assert compare("main.db", "branch.db")[0] == 0
    # Two methods of one store as well: the cell was asked for and has no answer.
    assert compare("baseline", "new", "--db", "branch.db", *gate)[0] == 3


def test_an_older_answer_does_not_stand_in_for_a_newer_failure(compare, tmp_path):
    """The key of a cell changes with the method's source: the old one stays in the store."""
    with Store.open(tmp_path / "results.db") as store:
        fill(store)
        second = add_sweep(store)
        fails(store, second, "new", task="grammar")
    code, _, err = compare("baseline", "new", "--fail-on", "acc<-0.01")
    assert code == 3
    assert "(measured before, but the newest is crashed: killed by signal 9)" in err
    assert compare("baseline", "new", "--fail-on", "decode_latency>1.5x")[0] == 0


def test_a_gate_on_a_metric_that_only_a_has(compare, tmp_path):
    for name, records in (("main.db", 2), ("branch.db", 1)):
        with Store.open(tmp_path / name) as store:
            found = [timed("decode_latency", around(0.01)), Record("decode_energy", 1.0, "J")][:records]
            add_cell(store, add_sweep(store), "new", *found, scenario=SHAPE)
    code, _, err = compare("main.db", "branch.db", "--fail-on", "decode_energy>1.05x")
    assert code == 3
    assert "missing in b: m new decode_energy of b1-p8-g2 (not measured)" in err
    # Nobody has it: a gate that can never be judged is a mistake.
    assert compare("main.db", "branch.db", "--fail-on", "decode_enrgy>1.05x")[0] == 2


def test_a_value_that_is_no_number_is_missing(compare, tmp_path):
    with Store.open(tmp_path / "results.db") as store:
        sweep = add_sweep(store)
        for method, value in (("baseline", 2.0), ("new", float("nan"))):
            record = Record("nll", value, "nats/token", n=2)
            acc = Record("acc", 0.5, "fraction", n=2)
            add_cell(store, sweep, method, record, acc, task="grammar")
    code, _, err = compare("baseline", "new", "--fail-on", "nll>0.1")
    assert code == 3
    assert "cannot be judged (missing in b: m new nll of grammar (no number))" in err


def test_what_only_b_has_is_listed_and_fails_nothing(compare, tmp_path):
    with Store.open(tmp_path / "main.db") as store:
        fill(store, methods=("baseline",))
    with Store.open(tmp_path / "branch.db") as store:
        fill(store)
    code, _, err = compare("main.db", "branch.db", "--fail-on", "acc<-0.01")
    assert code == 0
    assert "only in b: m new b1-p8-g2, grammar (not there)" in err


def test_nothing_in_common_is_an_error(compare, tmp_path):
    with Store.open(tmp_path / "main.db") as store:
        fill(store, methods=("baseline",))
    with Store.open(tmp_path / "branch.db") as store:
        fill(store, methods=("new",))
    code, _, err = compare("main.db", "branch.db")
    assert code == 2
    assert "nothing could be compared" in err


# --- clear gates --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "outcomes", "gate", "code"),
    [
        (0.0106, RIGHT, "decode_latency>1.05x", 3),  # the estimate is beyond the bound ...
        (0.0106, RIGHT, "decode_latency>1.055x!", 0),  # ... and its interval holds the bound
        (0.013, RIGHT, "decode_latency>1.05x!", 3),
        (0.01, [0, *RIGHT[1:]], "acc<-0.005", 3),  # one item of a hundred
        (0.01, [0, *RIGHT[1:]], "acc<-0.005!", 0),
        (0.01, WORSE, "acc<-0.01!", 3),
        (0.01, RIGHT, "weight_bytes>0.9x!", 3),  # bytes have no spread
        (0.01, RIGHT, "weight_bytes>1.0x!", 0),
    ],
)
def test_a_clear_gate_looks_at_the_interval(compare, tmp_path, seconds, outcomes, gate, code):
    for name, *values in (("main.db", 0.01, RIGHT), ("branch.db", seconds, outcomes)):
        with Store.open(tmp_path / name) as store:
            spread = around(values[0], spread=0.02)
            sweep = fill(store, values[0], values[1], methods=("baseline",))
            add_cell(store, sweep, "new", timed("decode_latency", spread), Record("weight_bytes", 25.0, "B"),
                     scenario=SHAPE)  # fmt: skip
            acc = Record("acc", sum(values[1]) / 100, "fraction", n=100)
            add_cell(store, sweep, "new", acc, task="grammar", items=items(values[1]))
    assert compare("main.db", "branch.db", "--fail-on", gate)[0] == code


def test_a_clear_gate_without_an_interval_cannot_be_judged(compare, tmp_path):
    with Store.open(tmp_path / "results.db") as store:
        sweep = add_sweep(store)
        for method in ("baseline", "new"):
            add_cell(store, sweep, method, Record("decode_latency", 0.01, "s"), scenario=SHAPE)
            add_cell(store, sweep, method, Record("acc", 0.5, "fraction"), task="grammar")
    code, _, err = compare("baseline", "new", "--fail-on", "decode_latency>1.05x!")
    assert code == 3
    assert "cannot be judged (no interval: m new b1-p8-g2)" in err
    assert compare("baseline", "new", "--fail-on", "decode_latency>1.05x")[0] == 0
    for gate in ("acc<0.9x!", "decode_latency>0.001!"):
        code, _, err = compare("baseline", "new", "--fail-on", gate)
        assert code == 2
        assert "the interval of" in err


def test_gates_may_stand_in_a_file(compare, two_stores, tmp_path):
    file = tmp_path / "gates.yaml"
    file.write_text("fail_on:\n- decode_latency>1.5x\n- 'acc<-0.01!'\n")
    code, _, err = compare("main.db", "branch.db", "--gates", "gates.yaml")
    assert code == 3
    assert "gate acc<-0.01! trips on m new grammar: 0.6 -> 0.4 (-0.2, " in err
    assert "gate decode_latency>1.5x passes on 2 rows, nearest m new b1-p8-g2: 0.01 -> 0.013 (1.3x, " in err
    for text in ("", "- acc<1\n", "fail_on: acc<1\n", "fail_on: [1]\n", "fail_on: []\n", "fail_on: [x]\n"):
        file.write_text(text)
        code, _, err = compare("main.db", "branch.db", "--gates", "gates.yaml")
        assert (code, err.count("\n")) == (2, 1)
    assert compare("main.db", "branch.db", "--gates", "none.yaml")[0] == 2
    assert compare("main.db", "branch.db", "--allow-missing")[0] == 2


# --- tables -------------------------------------------------------------------------------------------


def test_a_table_holds_what_questions_are_about_and_says_what_it_leaves_out(compare, tmp_path):
    for name in ("main.db", "branch.db"):
        with Store.open(tmp_path / name) as store:
            sweep = fill(store)
            how = Record("load_read_bytes", 5.0, "B"), Record("load_written_bytes", 6.0, "B")
            add_cell(store, sweep, "new", *how)
    code, out, err = compare("main.db", "branch.db")
    assert code == 0
    assert "weight_bytes" in out
    assert "load_read_bytes" not in out
    assert "2 more rows of other metrics: --metrics all" in err
    for more in (("--metrics", "all"), ("--metrics", "load_read_bytes"), ("--format", "json")):
        _, out, err = compare("main.db", "branch.db", *more)
        assert "load_read_bytes" in out
        assert "more rows" not in err
    _, out, err = compare("main.db", "branch.db", "--fail-on", "load_read_bytes>1.0x")
    assert "load_read_bytes" in out  # a gate asks for it
    assert "1 more row of other metrics" in err


# --- markdown -----------------------------------------------------------------------------------------


def test_markdown_is_fit_for_a_comment(compare, two_stores):
    code, out, err = compare(
        "main.db", "branch.db", "--format", "markdown", "--fail-on", "acc<-0.01!", "--fail-on",
        "weight_bytes>1.0x",
    )  # fmt: skip
    assert code == 3
    gates, table, said = out.strip().split("\n\n")
    lines = gates.splitlines()
    assert lines[0] == "| gate | outcome | rows | where |"
    assert lines[2].startswith("| acc\\<-0.01! | trips | 2 | m new grammar: 0.6 -\\> 0.4 (-0.2, ")
    assert lines[3].startswith("| weight\\_bytes\\>1.0x | passes | 2 | nearest m")
    assert table.splitlines()[0].startswith("| model | method_b | cell | metric |")
    assert len(table.splitlines()) == 2 + 6
    assert said.startswith("a = main.db, b = branch.db; lower and upper bound the 95 % interval")
    assert "gate acc<-0.01! trips" in err


def test_stored_texts_draw_nothing_and_move_no_cursor(compare, tmp_path):
    odd = "<img src=x>\x1b[2J|`*"
    for name, methods in (("main.db", (odd, "gone\x1b[1m")), ("branch.db", (odd,))):
        with Store.open(tmp_path / name) as store:
            fill(store, methods=methods, model="[m](http://x)")
    code, out, err = compare("main.db", "branch.db", "--format", "markdown", "--fail-on", "acc<-0.5")
    assert code == 3
    assert "\x1b" not in out + err
    assert "<img" not in out.replace("\\<img", "")
    assert "[m](" not in out.replace("\\[m\\](", "")


# --- items by their documents -------------------------------------------------------------------------


def scored(outcomes, order, hashes=True):
    found = []
    for place, document in enumerate(order):
        name = hashlib.sha256(f"document {document}".encode()).hexdigest()
        found.append(Item(place, "acc", outcomes[document], {"doc_hash": name} if hashes else {}))
    return found


def test_documents_are_known_by_their_hash_where_the_data_are_not_known_to_be_the_same():
    a, b = [1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0]
    found = outcome_of(scored(a, [0, 1, 2, 3]), scored(b, [3, 2, 1, 0]), "acc", 0.75, 0.5, same_data=False)
    assert (found.n, found.flips) == (4, 0.25)  # by place it would be 0.75
    other = outcome_of(
        scored(a, [0, 1, 2, 3]), scored([*b, 1.0], [4, 2, 1, 0]), "acc", 0.75, 0.5, same_data=False
    )
    assert str(other) == "items: 4 and 4 with 3 in common"
    one = outcome_of(
        scored(a, range(4)), scored(b, range(4), hashes=False), "acc", 0.75, 0.5, same_data=False
    )
    assert str(one) == "items: known by their documents and known by place only"
    assert outcome_of(scored(a, range(4)), scored(b, range(4), hashes=False), "acc", 0.75, 0.5).n == 4
