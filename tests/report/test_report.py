"""A report shows what is stored, draws nothing that was stored as text, and stays one small file."""

from __future__ import annotations

import dataclasses
import html
import math
import re
from html.parser import HTMLParser

import pytest

from harness.cli.app import run as run_harness
from harness.errors import ConfigError
from harness.pareto import on_front
from harness.records import CellKind, CellResult, Record, Status
from harness.report import page
from harness.report.content import make_report
from harness.report.markdown import to_markdown
from harness.report.page import to_html
from harness.report.scatter import scatter, ticks
from harness.store.store import Store
from tests.core.stores import add_cell, add_sweep
from tests.dashboard.filling import HOSTILE, MODEL, SHAPE, fill, variant_row

VOID = {"meta", "br"}


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "results.db"
    with Store.open(path) as store:
        fill(store)
        manifest = {
            "hostname": "gpu-box-seven",
            "device_name": "NVIDIA H100 80GB HBM3",
            "command": ["/home/me/bin/harness", "sweep", "--models", "/home/me/secret-models/x"],
            "versions": {"torch": "2.11.0"},
            "measuring_version": 2,
        }
        sweep = store.open_sweep(command="harness sweep", config={}, manifest=manifest, cells_planned=1)
        row = variant_row("rtn:bits=8", (("rtn", {"bits": 8}),), "quantization")
        store.write_variant(sweep, row)
        verdict = Record("verdict", 1.0, "1", note="slower at batch 1: unpacking costs more than it saves")
        result = CellResult(f"{row.key}/s", row.key, Status.OK, records=(verdict,))
        store.write_cell(sweep, result, kind=CellKind.SCENARIO, task=None, scenario="b1-p512-g64")
        failed = CellResult(
            f"{row.key}/t", row.key, Status.FAILED, "cannot read /home/me/secret-models/x.bin"
        )
        store.write_cell(sweep, failed, kind=CellKind.TASK, task="hellaswag", scenario=None)
        store.close_sweep(sweep, "finished")
    return path


@pytest.fixture(scope="module")
def report(database):
    with Store.open_readonly(str(database)) as store:
        return make_report(store)


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def _read(text):
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open, "every element is closed"
    return reader


def test_the_page_is_well_formed_and_loads_nothing(report):
    text = to_html(report)
    reader = _read(text)
    assert not {"script", "img", "link", "iframe", "a"} & set(reader.tags)
    assert not [name for name, _ in reader.attributes if name.startswith("on") or name in ("src", "href")]
    assert "http" not in text.replace("http-equiv", "")
    assert len(text.encode()) < 200_000
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in reader.attributes


def test_stored_texts_are_shown_as_they_are(report):
    reader = _read(to_html(report))
    cells = "\n".join(reader.texts)
    assert HOSTILE in cells
    assert HOSTILE not in to_html(report)
    assert html.escape(HOSTILE) in to_html(report)


def test_every_variant_every_verdict_and_every_failure_is_there(report):
    texts = "\n".join(_read(to_html(report)).texts)
    for expected in (
        "gptq:bits=3", "window-attention", SHAPE, "CUDA out of memory", "fp8: needs compute capability 8.9",
        "slower at batch 1: unpacking costs more than it saves", "not applicable",
    ):  # fmt: skip
        assert expected in texts
    assert len(report.verdicts) == 1
    assert {problem[3] for problem in report.problems} >= {"oom", "crashed", "not applicable", "failed"}


@pytest.mark.parametrize("render", [to_html, to_markdown])
def test_hosts_paths_and_processes_stay_behind(report, render):
    text = render(report)
    assert "gpu-box-seven" not in text
    assert "/home" not in text
    assert "secret-models/x" not in text.replace("<path>/x", "").replace("&lt;path&gt;/x", "")


def test_fronts_hold_what_nothing_beats(report):
    found = {(front.model, front.x, front.y): front for front in report.fronts}
    front = found[MODEL, "decode_latency · b1-p512-g64", "token_perplexity · wikitext"]
    assert (front.x_better, front.y_better) == ("lower", "lower")
    best = {point.method for point in front.points if point.on_front}
    for point in front.points:
        beaten = any(
            other.x <= point.x and other.y <= point.y and (other.x, other.y) != (point.x, point.y)
            for other in front.points
        )
        assert (point.method in best) != beaten
    assert "baseline" in best
    assert not any(front.model == SHAPE for front in report.fronts), "nothing was scored there"
    simulated = next(point for point in front.points if point.method == "wanda:sparsity=0.5")
    assert simulated.hollow
    text = to_markdown(report)
    assert f"- {MODEL} on {front.device}, token\\_perplexity · wikitext against" in text
    assert "wanda:sparsity=0.5 (simulated)" in scatter(front)


def test_scores_of_the_first_few_items_are_in_a_figure_of_their_own(tmp_path):
    with Store.open(tmp_path / "results.db") as store:
        for limit, acc in ((None, {"baseline": 0.6, "rtn": 0.5}), (10, {"baseline": 0.7, "rtn": 0.9})):
            sweep = store.open_sweep(command="c", config={"limit": limit}, manifest={}, cells_planned=4)
            for method, value in acc.items():
                row = variant_row(method, ((method, {}),), "quantization")
                store.write_variant(sweep, row)
                weights = Record("weight_bytes", 9.0 if method == "baseline" else 3.0, "B")
                for key, kind, task, record in (
                    ("t", CellKind.TRANSFORM, None, weights),
                    (f"q{limit}", CellKind.TASK, "grammar", Record("acc", value, "fraction", n=limit or 99)),
                ):
                    result = CellResult(f"{row.key}/{key}", row.key, Status.OK, records=(record,))
                    store.write_cell(sweep, result, kind=kind, task=task, scenario=None)
        fronts = make_report(store).fronts
    assert {front.y: {point.method: point.y for point in front.points} for front in fronts} == {
        "acc · grammar": {"baseline": 0.6, "rtn": 0.5},
        "acc · grammar (limit 10)": {"baseline": 0.7, "rtn": 0.9},
    }


def test_variants_that_are_called_alike_are_told_apart(tmp_path):
    with Store.open(tmp_path / "results.db") as store:
        sweep = store.open_sweep(command="c", config={}, manifest={}, cells_planned=9)
        for dtype, scale in (("float32", 1.0), ("bfloat16", 0.5)):
            for method, acc in (("baseline", 0.6), ("rtn", 0.5)):
                family = "baseline" if method == "baseline" else "quantization"
                row = variant_row(
                    method, ((method, {}),), family, dtype=dtype, key=f"{method} {dtype}",
                    simulated=method == "rtn",
                )  # fmt: skip
                store.write_variant(sweep, row)
                slow = Record("verdict", 1.0, "1", note=f"slower in {dtype}")
                size = Record("weight_bytes", scale * (4.0 if method == "rtn" else 8.0), "B")
                for kind, task, shape, record in (
                    (CellKind.TRANSFORM, None, None, size),
                    (CellKind.TASK, "grammar", None, Record("acc", acc, "fraction")),
                    (CellKind.SCENARIO, None, "b1-p8-g8", slow),
                ):
                    result = CellResult(f"{row.key}/{kind}", row.key, Status.OK, records=(record,))
                    store.write_cell(sweep, result, kind=kind, task=task, scenario=shape)
        report = make_report(store)
    names = {f"{method} · {dtype}" for method in ("baseline", "rtn") for dtype in ("float32", "bfloat16")}
    names = {f"{name} (simulated)" if name.startswith("rtn") else name for name in names}
    assert {point.name for point in report.fronts[0].points} == names
    assert {(method, words) for _, method, _, words in report.verdicts} == {
        (name, f"slower in {'bfloat16' if 'bfloat16' in name else 'float32'}") for name in names
    }
    assert report.table.columns[:4] == ["model", "method", "dtype", "scenario"]
    assert {row["dtype"] for row in report.table.rows} == {"float32", "bfloat16"}
    assert "rtn · bfloat16 (simulated), baseline" in to_markdown(report)


def test_values_that_lie_close_together_have_labels_of_their_own(report):
    front = report.fronts[0]
    close = [
        dataclasses.replace(point, x=float(number), y=5.4721 + number * 1e-5, x_bounds=None, y_bounds=None)
        for number, point in enumerate(front.points)
    ]
    drawn = scatter(dataclasses.replace(front, y_unit="ppl", points=tuple(close)))
    labels = re.findall(r'text-anchor="end">([\d.]+)</text>', drawn)
    assert len(set(labels)) == len(labels) >= 3


def test_a_figure_has_a_mark_for_every_point_inside_its_frame(report):
    for front in report.fronts:
        drawn = scatter(front)
        places = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)
        assert len(places) == len(front.points)
        assert all(70 <= float(x) <= 700 and 16 <= float(y) <= 372 for x, y in places)
        assert "NaN" not in drawn
        assert drawn.count("<title>") == len(front.points)


@pytest.mark.parametrize(
    ("points", "directions", "best"),
    [
        ([], ("lower", "lower"), []),
        ([(1, 1), (1, 1)], ("lower", "lower"), [True, True]),
        ([(1, 5), (1, 4)], ("lower", "lower"), [False, True]),
        ([(1, 5), (2, 5)], ("lower", "higher"), [True, False]),
        ([(1, 5), (2, 6), (3, 4)], ("higher", "higher"), [False, True, True]),
        ([(1, math.inf), (2, 5)], ("lower", "lower"), [True, True]),
        ([(1, -math.inf), (1, -math.inf)], ("lower", "higher"), [True, True]),
    ],
)
def test_the_front(points, directions, best):
    assert on_front(points, *directions) == best


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [
        (0.1, 0.11, False),
        (-3, 12345, False),
        (2.0, 2.4, True),
        (-3, 9, True),
        (1, 43, True),
        (-17, 318, True),
    ],
)
def test_ticks_are_few_and_inside(low, high, log):
    found = ticks(low, high, log=log)
    ends = (10.0**low, 10.0 ** min(high, 308)) if log else (low, high)
    assert 1 <= len(found) <= 13
    assert all(ends[0] * 0.999 - 1e-9 <= value <= ends[1] * 1.001 + 1e-9 for value in found)


def test_an_infinite_score_is_named_and_not_drawn(report):
    from dataclasses import replace

    front = next(each for each in report.fronts if each.model == MODEL)
    first, *others = front.points
    broken = replace(front, points=(replace(first, y=math.inf, y_bounds=None), *others))
    text = to_html(replace(report, fronts=(broken,)))
    assert f"Not drawn, because infinite: {html.escape(first.name)}." in text
    assert scatter(broken).count("<circle") == len(others)
    assert scatter(replace(front, points=(replace(first, y=math.inf),))) == ""
    unbounded = replace(front, points=(replace(first, y_bounds=(first.y, math.inf)), *others))
    assert scatter(unbounded).count("<circle") == len(front.points)
    assert "inf" not in scatter(unbounded)


def test_one_value_for_all_still_has_a_figure(report):
    from dataclasses import replace

    front = report.fronts[0]
    same = tuple(replace(point, x=0.0, y=0.5, x_bounds=None, y_bounds=None) for point in front.points)
    assert "NaN" not in scatter(replace(front, points=same))


def test_a_page_that_would_be_too_large_says_how_to_narrow_it(report, monkeypatch):
    monkeypatch.setattr(page, "LARGEST_BYTES", 10_000)
    with pytest.raises(ConfigError, match=r"narrow it with --sweep, --models, --methods or --tasks"):
        to_html(report)


# --- the command --------------------------------------------------------------------------------------


@pytest.fixture
def command(database, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capsys.readouterr()
        code = run_harness(["report", "--db", str(database), *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_both_files_are_written(command, tmp_path):
    code, out, err = command("--html", "r.html", "--markdown", tmp_path / "r.md")
    assert (code, out) == (0, "")
    assert "r.html: " in err
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "r.md").read_text().startswith("# What was measured")
    assert (tmp_path / "r.html").stat().st_mode & 0o777 == (tmp_path / "r.md").stat().st_mode & 0o777
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.md"]


def test_markdown_goes_to_standard_output(command):
    code, out, _ = command("--markdown", "-", "--methods", "gptq", "--tasks", "wikitext")
    assert code == 0
    assert "| gptq:bits=3 |" in out
    assert "wikitext token_perplexity" in out
    assert "hellaswag" not in out
    assert "| rtn" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "say what to write: --html FILE or --markdown FILE"),
        (("--html", "no/such/folder/r.html"), "cannot be written: No such file or directory"),
        (("--html", "."), "cannot be written"),
        (("--html", "r.html", "--models", "nobody"), "unknown model in this store: 'nobody'"),
        (("--html", "r.html", "--tasks", "wikitxt"), "'wikitxt'; did you mean 'wikitext'?"),
        (("--html", "r.html", "--sweep", "99"), "99"),
    ],
)
def test_one_clear_line(command, tmp_path, arguments, message):
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") <= 2
    assert not list(tmp_path.iterdir())


def test_a_report_never_replaces_a_store(command, database):
    before = database.read_bytes()
    code, out, err = command("--html", database)
    assert (code, out) == (2, "")
    assert "is a results store; name another file" in err
    assert database.read_bytes() == before


def test_which_of_several_seeds_failed_is_said(tmp_path, capsys):
    path = tmp_path / "results.db"
    with Store.open(path) as store:
        sweep = add_sweep(store)
        add_cell(store, sweep, "rtn", Record("acc", 0.5, "fraction"), task="t", seed=0)
        add_cell(store, sweep, "rtn", task="t", seed=1, status=Status.OOM, reason="no memory")
        verdict = Record("verdict", 1.0, "", note="Decode is slow.")
        add_cell(store, sweep, "rtn", verdict, scenario="b1-p8-g2", seed=1)
        report = make_report(store)
    assert report.problems == (("m", "rtn · seed 1", "t", "oom", "no memory"),)
    assert report.verdicts == (("m", "rtn · seed 1", "b1-p8-g2", "Decode is slow."),)
    assert run_harness(["results", "--db", str(path)]) == 0
    assert "rtn · seed 1" in capsys.readouterr().out.partition("Not measured")[2]
