"""The Sweep page: progress, statuses, failures, and when it goes on being drawn."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

pytest.importorskip("streamlit")

from harness_dashboard import sweep_data
from harness_dashboard.views import sweep as view

from harness.records import CellKind, CellResult, Record, Status
from harness.store.liveness import this_process
from harness.store.store import Store
from harness.store.tables import sweeps
from tests.core.stores import MANIFEST, add_cell
from tests.dashboard.filling import HOSTILE
from tests.dashboard.pages import add_failures, draw, texts

COMMAND = "harness sweep --methods gptq --models m"
SCORE = Record("acc", 0.5, "fraction")


def open_sweep(store, *, process=None, planned=10, command=COMMAND):
    manifest = {**MANIFEST, "process": process}
    return store.open_sweep(command=command, config={}, manifest=manifest, cells_planned=planned)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.db"


@pytest.fixture
def store(path):
    with Store.open(path) as store:
        yield store


def started(store, sweep):
    with store.reading() as connection:
        text = connection.execute(sweeps.select().where(sweeps.c.id == sweep)).one().started_at
    return datetime.fromisoformat(text)


# --- progress ---------------------------------------------------------------------------------


def test_pace_and_time_left_come_from_what_was_measured_here(store):
    first = open_sweep(store)
    reused = add_cell(store, first, "old", SCORE, task="a", key="old")
    store.close_sweep(first, "finished")
    second = open_sweep(store, process=this_process())
    store.link_cells(second, [reused])
    for number in range(3):
        add_cell(store, second, f"new{number}", SCORE, task="a", key=f"new{number}")
    now = started(store, second) + timedelta(seconds=60)
    found = sweep_data.progress(store, second, now)
    assert (found.done, found.reused, found.measured, found.ok, found.failed) == (4, 1, 3, 4, 0)
    assert found.share == 0.4
    assert found.cells_per_minute == pytest.approx(3)
    assert found.left_s == pytest.approx(6 * 20)  # six cells, twenty seconds each
    assert found.is_alive
    assert 0 <= found.quiet_s <= 61


def test_nothing_measured_yet_has_no_pace(store):
    found = sweep_data.progress(store, open_sweep(store, process=this_process()))
    assert (found.done, found.cells_per_minute, found.left_s, found.quiet_s) == (0, None, None, None)
    assert found.is_alive


def test_a_killed_sweep_is_interrupted_and_ends_with_its_last_cell(store):
    here = this_process()
    sweep = open_sweep(store, process={**here, "pid": 2**22 + 1, "started": 1})
    add_cell(store, sweep, "x", SCORE, task="a", key="x")
    much_later = datetime.now(UTC) + timedelta(days=1)
    found = sweep_data.progress(store, sweep, much_later)
    assert found.state == "interrupted"
    assert found.elapsed_s < 60
    assert found.left_s is None
    assert sweep_data.resume_command(found) == COMMAND


def test_a_state_that_is_none_is_not_repeated(store):
    sweep = open_sweep(store)
    with store.writing() as connection:
        connection.execute(sweeps.update().values(status=HOSTILE))
    found = sweep_data.progress(store, sweep)
    assert found.state == "of unknown state"
    assert not found.is_alive


def test_the_commands_that_go_on(store):
    finished = open_sweep(store)
    add_failures(store, finished)
    store.close_sweep(finished, "finished")
    found = sweep_data.progress(store, finished)
    assert sweep_data.resume_command(found) is None
    assert sweep_data.retry_command(found) == f"{COMMAND} --retry-failed"
    again = open_sweep(store, command=f"{COMMAND} --retry-failed")
    add_failures(store, again)
    store.close_sweep(again, "interrupted")
    found = sweep_data.progress(store, again)
    assert sweep_data.resume_command(found) == sweep_data.retry_command(found) == f"{COMMAND} --retry-failed"
    alive = sweep_data.progress(store, open_sweep(store, process=this_process()))
    assert sweep_data.resume_command(alive) is None
    assert sweep_data.retry_command(alive) is None


# --- statuses ---------------------------------------------------------------------------------


def test_statuses_are_counted_with_their_most_frequent_reason(store):
    sweep = open_sweep(store)
    add_failures(store, sweep)
    add_cell(store, sweep, "x", SCORE, task="a", key="x")
    found = sweep_data.status_counts(store, sweep).set_index("status")
    assert found["cells"].to_dict() == {**{str(each): 1 for each in Status}, "ok": 2}
    assert found.index[0] == "ok"
    assert found.at["oom", "reason"] == f"oom: {HOSTILE}"


def test_the_grid_has_failing_variants_first_and_says_what_waits(store):
    sweep = open_sweep(store)
    add_cell(store, sweep, "good", SCORE, scenario="b64-p8-g2", key="good")
    add_cell(store, sweep, "good", SCORE, scenario="b8-p8-g2", key="good")
    add_cell(store, sweep, "bad", SCORE, scenario="b8-p8-g2", key="bad")
    result = CellResult("bad/t", "bad", Status.OOM, "no room")
    store.write_cell(sweep, result, kind=CellKind.TASK, task="grammar", scenario=None)
    grid, total = sweep_data.status_grid(store, sweep)
    assert total == 2
    assert grid.columns.tolist() == ["variant", "b8-p8-g2", "b64-p8-g2", "grammar"]
    assert grid.values.tolist() == [
        ["bad", "✓ ok", "… waiting", "✕ oom"],
        ["good", "✓ ok", "✓ ok", "… waiting"],
    ]
    only, total = sweep_data.status_grid(store, sweep, only_failing=True)
    assert (only["variant"].tolist(), total) == (["bad"], 1)
    few, total = sweep_data.status_grid(store, sweep, most=1)
    assert (len(few), total) == (1, 2)


def test_what_a_sweep_made_waits_before_its_first_cell(store):
    from tests.dashboard.filling import variant_row

    sweep = open_sweep(store)
    store.write_variant(sweep, variant_row("new", (("new", {}),), "other", key="new"))
    grid, total = sweep_data.status_grid(store, sweep)
    assert (grid.columns.tolist(), total) == (["variant"], 1)


# --- failures ---------------------------------------------------------------------------------


def test_what_should_have_worked_comes_first(store):
    sweep = open_sweep(store)
    add_failures(store, sweep)
    found, total = sweep_data.failures(store, sweep)
    assert total == len(found) == 7
    expected = {"failed", "oom", "timeout", "crashed"}
    assert set(found["status"][:4]) == expected
    assert "ok" not in set(found["status"])
    few, total = sweep_data.failures(store, None, ["oom", "timeout"], most=1)
    assert (few["status"].tolist(), total) == (["timeout"], 2)
    about = sweep_data.failure(store, int(few["cell"].iloc[0]))
    assert (about.reason, about.log_tail) == (f"timeout: {HOSTILE}", HOSTILE)
    assert about.traceback.startswith("Traceback")


def test_a_retry_takes_the_place_of_a_failure(store):
    first = open_sweep(store)
    add_failures(store, first)
    second = open_sweep(store)
    key = f"oom-{list(Status).index(Status.OOM)}"
    result = CellResult(f"{key}/c", key, Status.OK, records=(SCORE,))
    store.write_cell(second, result, kind=CellKind.TASK, task="grammar", scenario=None)
    assert "oom" not in set(sweep_data.failures(store, None)[0]["status"])
    assert "oom" in set(sweep_data.failures(store, first)[0]["status"])


# --- the page ---------------------------------------------------------------------------------


def test_a_finished_sweep_is_drawn_once(store, path, monkeypatch):
    sweep = open_sweep(store)
    add_failures(store, sweep)
    store.close_sweep(sweep, "finished")
    monkeypatch.setattr(view.st, "fragment", lambda *_, **__: pytest.fail("it refreshes itself"))
    app = draw("sweep", path, monkeypatch)
    assert app.subheader[0].value == "Sweep 1: finished"
    assert app.metric[0].value == "8 / 10"
    assert [each.value for each in app.code] == [
        f"{COMMAND} --retry-failed", f"Traceback\n{HOSTILE}", HOSTILE,
    ]  # fmt: skip
    assert any(HOSTILE in each.value for each in app.text)
    assert len(app.dataframe) == 3
    for each in texts(app):
        assert "<img" not in each


def test_statuses_come_from_the_address(store, path, monkeypatch):
    sweep = open_sweep(store)
    add_failures(store, sweep)
    store.close_sweep(sweep, "finished")
    app = draw("sweep", path, monkeypatch, status="oom")
    assert app.dataframe[2].value["status"].tolist() == ["✕ oom"]
    assert app.text[-1].value == f"oom: {HOSTILE}"


def test_a_running_sweep_is_drawn_again_and_again(store, path, monkeypatch):
    sweep = open_sweep(store, process=this_process())
    add_cell(store, sweep, "x", SCORE, task="a", key="x")
    asked = []

    def fragment(function, run_every=None):
        asked.append(run_every)
        return function

    monkeypatch.setattr(view.st, "fragment", fragment)
    app = draw("sweep", path, monkeypatch)
    assert asked == [2]
    assert app.subheader[0].value == "Sweep 1: running"
    assert [each.label for each in app.metric][-1] == "Left, about"
    store.close_sweep(sweep, "finished")
    app.run()
    assert asked == [2]  # not asked for again
    assert app.subheader[0].value == "Sweep 1: finished"


def test_an_interrupted_sweep_shows_how_to_go_on(store, path, monkeypatch):
    sweep = open_sweep(store)
    add_cell(store, sweep, "x", SCORE, task="a", key="x")
    store.close_sweep(sweep, "interrupted")
    app = draw("sweep", path, monkeypatch)
    assert app.code[0].value == COMMAND
    assert app.success[0].value == "Every cell is ok."


def test_another_sweep_and_all_failures(store, path, monkeypatch):
    first = open_sweep(store)
    add_failures(store, first)
    store.close_sweep(first, "finished")
    second = open_sweep(store)
    add_cell(store, second, "x", SCORE, task="a", key="x")
    store.close_sweep(second, "finished")
    app = draw("sweep", path, monkeypatch)
    assert app.subheader[0].value == "Sweep 2: finished"
    assert app.success[0].value == "Every cell is ok."
    app = draw("sweep", path, monkeypatch, among="the newest of each cell")
    assert len(app.dataframe[-1].value) == 7
    app = draw("sweep", path, monkeypatch, sweep="1")
    assert app.subheader[0].value == "Sweep 1: finished"


@pytest.mark.parametrize("seconds", [0, 3.4, 75, 7322])
def test_durations(seconds):
    expected = {0: "0 s", 3.4: "3 s", 75: "1 min 15 s", 7322: "2 h 2 min"}
    assert view._duration(seconds) == expected[seconds]


def test_headings_explain_a_status_behind_its_sign():
    from harness.glossary import explain

    assert "*oom*: it ran out of memory" in explain("status", ["✕ oom", HOSTILE])
    assert "<img" not in explain("status", [HOSTILE])


@pytest.mark.parametrize("heading", ["difference ↑ [points]", "exponent", "at the end", "matters for"])
def test_headings_of_these_pages_are_explained(heading):
    from harness.glossary import explain

    assert explain(heading)


def test_tasks_may_be_named_with_digits_that_are_no_number(store):
    sweep = open_sweep(store)
    for task in ("x²", "a10", "a9", "①"):
        add_cell(store, sweep, "new", SCORE, task=task)
    grid, _ = sweep_data.status_grid(store, sweep)
    assert list(grid.columns[1:]) == ["a9", "a10", "x²", "①"]
