"""Whatever a store, a plugin or an argument holds, a terminal is given nothing to obey."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest

from harness.cli.app import app
from harness.cli.output import Format, print_rows, say
from harness.errors import ConfigError
from harness.progress import LiveReporter, PlainReporter, highlights
from harness.records import CellKind, CellResult, KernelUse, ModuleEffect, Record, Status, VariantReport
from harness.store.store import Store, VariantRow
from tests.core.stores import MANIFEST

# Sets the title of the window, clears the screen, colours, turns the writing round, overwrites the line.
CODES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eowned\r\x08\u2028<img src=x>"
SHAPES = ("b1-p64-g8", "b1-p128-g8", "b1-p256-g8")
OBEYED = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def check(text):
    found = OBEYED.search(text)
    assert found is None, repr(text[max(0, found.start() - 60) : found.start() + 20])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A store whose every text tries to take over the terminal."""
    path = tmp_path_factory.mktemp("hostile") / "results.db"
    manifest = {**MANIFEST, "cpu": CODES, "device_name": CODES, "kernel": CODES}
    with Store.open(path) as store:
        sweep = store.open_sweep(command=CODES, config={"x": CODES}, manifest=manifest, cells_planned=9)
        for method in ("baseline", CODES, f"{CODES}+x"):
            fill(store, sweep, method)
        store.close_sweep(sweep, "finished", {"gpu": {"throttle_reasons": [CODES]}})
        other = {**manifest, "device_name": f"{CODES} 2", "versions": {"torch": CODES}}
        sweep = store.open_sweep(command=CODES, config={}, manifest=other, cells_planned=9)
        fill(store, sweep, f"late{CODES}", device_name=f"{CODES} 2")
    return path


def fill(store, sweep, method, **changes):
    row = VariantRow(
        **{
            "key": f"{method}-{sweep}", "model": f"m{CODES}", "model_identity": CODES, "method": method,
            "chain": [{"name": method, "options": {CODES: CODES}}], "seed": 0, "dtype": "bfloat16",
            "family": "baseline" if method == "baseline" else "other", "device": "cuda",
            "device_name": CODES, "synthetic": False, "model_info": {"label": CODES}, **changes,
        }
    )  # fmt: skip
    store.write_variant(sweep, row)
    effect = ModuleEffect(CODES, CODES, True, CODES, 10, 20, 10, 8.0, simulated=True)
    store.write_effects(row.key, VariantReport(row.key, (effect,), True))

    def write(name, kind, records=(), status=Status.OK, **more):
        place = {"task": None, "scenario": None}
        if kind is not CellKind.TRANSFORM:
            place[str(kind)] = name
        result = CellResult(f"{row.key}/{name}", row.key, status, records=records, **more)
        store.write_cell(sweep, result, kind=kind, **place)

    def timed(metric, value, unit="s"):
        samples = tuple(value * factor for factor in (0.99, 1.0, 1.01))
        return Record(metric, value, unit, value * 0.9, value * 1.1, 3, samples, CODES, CODES)

    write("transform", CellKind.TRANSFORM, (timed("transform_s", 1.0), Record(CODES, 1.0, CODES, note=CODES)))
    for factor, shape in enumerate(SHAPES, 1):
        kernels = tuple(KernelUse(phase, CODES, CODES, 3, 0.1, 1.0) for phase in ("prefill", "decode"))
        records = (
            timed("prefill_latency", 0.1 * factor),
            timed("decode_latency", 0.01 * factor),
            timed("decode_peak_bytes", 1e6 * factor, "B"),
            Record("verdict", 1.0, "1", note=CODES),
            Record(f"x{CODES}", float(factor), CODES, note=CODES),
        )
        write(shape, CellKind.SCENARIO, records, kernels=kernels)
    write(f"task{CODES}", CellKind.TASK, (Record("acc", 0.5, "fraction", 0.4, 0.6, 20, note=CODES),))
    write(
        f"broken{CODES}", CellKind.TASK, status=Status.FAILED,
        reason=CODES, traceback=CODES, log_tail=CODES,
    )  # fmt: skip


READING = {
    "results": (
        ("results",),
        ("results", "--records", "--percentiles", "--sweep", "1"),
    ),
    "choose": (("choose", "--for", "prefill"), ("choose", "--for", "prefill", "--format", "markdown")),
    "compare": (
        ("compare", "baseline", "--all", "--allow-different"),
        ("compare", "baseline", "--all", "--break-even"),
        ("compare", "baseline", CODES, "--fail-on", "prefill_latency<2x"),
    ),
    "scaling": (("scaling",),),
    "why": (("why",),),
}


def test_every_verb_that_reads_a_store_is_here():
    options = {command.name: command.callback.__annotations__ for command in app.registered_commands}
    formatted = {name for name, annotations in options.items() if {"db", "output"} <= set(annotations)}
    # Those two print what plugins and this machine say, and nothing that a store brings.
    assert formatted | {"results"} == {*READING, "doctor", "reproduce"}


@pytest.mark.parametrize("output", list(Format))
@pytest.mark.parametrize("line", [line for lines in READING.values() for line in lines], ids=" ".join)
def test_a_hostile_store_is_only_text(harness, path, line, output):
    ran = harness(*line, "--db", path, "--format", output)
    check(ran.out)
    check(ran.err)
    assert "owned" in ran.out + ran.err
    assert "Traceback" not in ran.err
    if output is Format.JSON and ran.out:
        json.loads(ran.out)
    if output is Format.CSV:
        for row in csv.reader(io.StringIO(ran.out)):
            assert not any(cell[:1] in "=@" for cell in row if cell)


def test_a_report_of_a_hostile_store(harness, path):
    ran = harness("report", "--db", path, "--markdown", "-")
    assert ran.code == 0, ran.err
    check(ran.out)
    assert "owned" in ran.out
    assert re.search(r"(?<!\\)<img", ran.out) is None


def test_markdown_tables_hold_no_markup(harness, path):
    for line in READING["results"]:
        ran = harness(*line, "--db", path, "--format", "markdown")
        assert re.search(r"(?<!\\)<img", ran.out) is None


def test_exporting_and_importing_a_hostile_store(harness, path, tmp_path):
    ran = harness("results", "export", tmp_path / "out.jsonl", "--db", path, "--with-host")
    assert ran.code == 0, ran.err
    check(ran.out + ran.err + (tmp_path / "out.jsonl").read_text())
    ran = harness("results", "import", tmp_path / "out.jsonl", "--db", tmp_path / "new.db", "--origin", CODES)
    check(ran.out + ran.err)


ARE_FILTERS = {("why", CODES)}  # no error: a stored method has that name


@pytest.mark.parametrize(
    "line",
    [
        ("results", "--db", f"no{CODES}.db"),
        ("results", "--sweep", CODES),
        ("results", "--status", CODES),
        ("compare", CODES, "y"),
        ("compare", "baseline", "--all", "--fail-on", CODES),
        ("why", CODES),
        ("methods", CODES),
        ("sweep", "--methods", CODES),
        ("sweep", "--methods", f"rtn:{CODES}=1"),
        ("sweep", "--models", CODES, "--dry-run"),
        ("sweep", "--tasks", CODES, "--dry-run"),
        ("sweep", "--config", f"{CODES}.yaml"),
        ("sweep", f"--{CODES}"),
        ("report", "--markdown", f"/nowhere/{CODES}.md"),
        ("results", "import", f"{CODES}.jsonl"),
        ("dashboard", "--host", CODES),
        ("dashboard", "--token", CODES),
        ("new", CODES),
        (CODES,),
    ],
    ids=lambda line: " ".join(line[:2]).encode("unicode_escape").decode(),
)
def test_errors_about_hostile_arguments(harness, path, line):
    database = (
        [] if "--db" in line or line[0] not in ("results", "compare", "why", "report") else ["--db", path]
    )
    ran = harness(*line, *database)
    assert ran.code in (0, 2)
    assert ran.err or line in ARE_FILTERS
    check(ran.out + ran.err)


def test_a_hostile_plugin(harness, tmp_path):
    (tmp_path / "broken.py").write_text(f"raise RuntimeError({CODES!r})\n")
    for output in Format:
        ran = harness("plugins", "--plugin", "broken.py", "--format", output)
        check(ran.out + ran.err)
        assert "owned" in ran.out + ran.err


# --- pieces -------------------------------------------------------------------------------------------


def test_headings_and_titles_are_text_too(capsys):
    for output in Format:
        print_rows([{CODES: 1, "=cmd|x": "[red]x[/red]"}], [CODES, "=cmd|x"], output, title=f"[red]{CODES}")
        out = capsys.readouterr().out
        check(out)
        if output is Format.TABLE:
            assert "[red]x[/red]" in out
            assert "[red]�" in out
        if output is Format.CSV:
            assert "'=cmd|x" in out


def test_numbers_stay_numbers_in_csv(capsys):
    print_rows([{"a": -1.5, "b": "-1.5", "c": "-x", "d": "+3%"}], ["a", "b", "c", "d"], Format.CSV)
    assert capsys.readouterr().out == "a,b,c,d\n-1.5,-1.5,'-x,+3%\n"


def test_a_line_is_one_line(capsys):
    say(f"a\n{CODES}", err=True)
    err = capsys.readouterr().err
    check(err)
    assert err.count("\n") == 1


class Plan:
    """As much of a plan as reporters read."""

    label = kind = device_name = CODES
    variants = cells = ()

    @property
    def grid(self):
        return self


def test_progress_of_a_hostile_sweep(capsys):
    import rich.console

    plan = cell = Plan()
    results = [
        CellResult("k", "v", Status.FAILED, CODES),
        CellResult("k", "v", Status.OK, records=(Record(CODES, 1.0, CODES),)),
    ]
    cell.kind = CellKind.TASK
    plain = PlainReporter()
    screen = io.StringIO()
    live = LiveReporter(rich.console.Console(file=screen, width=200))
    for reporter in (plain, live):
        with reporter:
            reporter.started(plan, 0)
            reporter.phase(plan, cell)
            for result in results:
                check(highlights(cell, result))
                reporter.finished(plan, cell, result)
    check(capsys.readouterr().err)
    check(screen.getvalue())
    assert screen.getvalue().count("owned") >= 4


def test_the_border_cleans_what_an_error_says(harness, monkeypatch):
    def fail(*_):
        raise ConfigError(f"about\n{CODES}")

    monkeypatch.setattr("harness.cli.sweep.database", fail)
    ran = harness("results")
    assert ran.code == 2
    check(ran.err)
    assert ran.err.count("\n") == 1
