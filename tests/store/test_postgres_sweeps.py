"""Whole sweeps into a PostgreSQL server: two at once, one killed, the server restarted in the middle."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from sqlalchemy import text

from harness.cli.app import run
from harness.store import queries
from harness.store.store import Store
from harness.store.tables import metadata
from tests.store.server import PostgresServer

PLUGIN = str(Path(__file__).parents[1] / "cli" / "failing_methods.py")
FAST = ("--tasks", "none", "--prompt-lens", "8", "--new-tokens", "2", "--device", "cpu")
SECRET = "s3cret"

pytestmark = pytest.mark.postgres


@pytest.fixture
def harness(tmp_path, monkeypatch, capsys, tiny_llama):
    """Run ``harness ...`` in a folder with a model; returns the exit code and all that was said."""
    tiny_llama.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HARNESS_DB", raising=False)

    def harness(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["harness", *arguments])
        code = run(list(arguments))
        said = capsys.readouterr()
        return code, said.out, said.err

    return harness


def test_a_sweep_its_results_and_no_password_anywhere(harness, url, tmp_path):
    address = url.replace("harness@", f"harness:{SECRET}@")
    sweep = ("sweep", "--plugin", PLUGIN, "--methods", "scale", "--models", "./model", *FAST, "--db", address)
    said = [harness(*sweep), harness(*sweep)]
    assert [code for code, _, _ in said] == [0, 0], said
    assert "4 of them already measured" in said[1][2]
    for command in (
        ("results", "--format", "json"),
        ("compare", "baseline", "scale"),
        ("doctor",),
        (*sweep[:-2], "--dry-run"),
        ("results", "export", "rows.jsonl", "--with-host"),
    ):
        said.append(harness(*command, "--db", address))
        assert said[-1][0] in (0, 1), said[-1]
    said.append(harness("results", "import", "rows.jsonl", "--db", "file.db"))
    assert said[-1][:2] == (0, "rows.jsonl: 4 cells imported, 1 new sweep\n")
    rows = json.loads(said[2][1])
    assert {(row["method"], row["status"]) for row in rows} == {("baseline", "ok"), ("scale", "ok")}
    assert SECRET not in "".join(out + err for _, out, err in said)
    assert SECRET not in (tmp_path / "rows.jsonl").read_text()
    with Store.open_readonly(url) as store, store.reading() as connection:
        stored = [
            str(row)
            for table in metadata.tables
            for row in connection.execute(text(f"SELECT * FROM {table}"))
        ]
    assert any("harness:***@" in row for row in stored), "the command is stored"
    assert not any(SECRET in row for row in stored)


def test_the_dashboard_reads_a_server(harness, url, monkeypatch):
    pytest.importorskip("streamlit")
    from streamlit.testing.v1 import AppTest

    from tests.dashboard.filling import fill

    with Store.open(url) as store:
        fill(store)
    monkeypatch.setenv("HARNESS_DB", url)
    for view in ("overview", "pareto", "compare", "scaling", "sweep", "environment"):
        script = f"from harness_dashboard.views import {view}\n{view}.render()"
        page = AppTest.from_string(script, default_timeout=30)
        page.query_params["sweep"] = "1"
        page.run()
        assert not page.exception, view
        assert not page.error, view
        assert len(page.dataframe[0].value), view


# --- processes of their own -----------------------------------------------------------------------------


def start(folder, url, methods, *more):
    command = [sys.executable, "-m", "harness", "sweep", "--plugin", PLUGIN, "--methods", methods]
    command += ["--models", "./model", *FAST, "--db", url, *more]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for(process, line):
    seen = ""
    while line not in seen:
        news = process.stderr.readline()
        assert news, seen
        seen += news


def assert_whole(url):
    """No cell without its records, none twice in a sweep; returns the methods that are ok."""
    with Store.open_readonly(url) as store:
        with store.reading() as connection:
            doubled = "SELECT key FROM cells GROUP BY sweep_id, key HAVING count(*) > 1"
            assert connection.execute(text(doubled)).all() == []
            metrics = "SELECT metric FROM records GROUP BY cell_id, metric HAVING count(*) > 1"
            assert connection.execute(text(metrics)).all() == []
        frame = queries.results(store, statuses=["ok"])
        assert frame["metric"].notna().all()
        return {(row.method, row.scenario) for row in frame.itertuples()}


EVERYTHING = {(method, cell) for method in ("baseline", "scale") for cell in ("transform", "b1-p8-g2")}


@pytest.mark.slow
def test_two_sweeps_at_once_of_which_one_is_killed(harness, url, tmp_path):
    left = start(tmp_path, url, "scale")
    right = start(tmp_path, url, "scale,hangs")  # the hanging method keeps it alive until it is killed
    wait_for(right, "scale · b1-p8-g2: ok")
    right.kill()
    right.communicate(timeout=60)
    _, said = left.communicate(timeout=120)
    assert left.returncode == 0, said
    assert assert_whole(url) == EVERYTHING
    code, _, said = harness(
        "sweep", "--plugin", PLUGIN, "--methods", "scale,hangs", "--models", "./model", *FAST,
        "--timeout", "5", "--db", url,
    )  # fmt: skip
    assert code == 1
    assert "4 of them already measured" in said
    assert assert_whole(url) == EVERYTHING


@pytest.mark.slow
def test_a_server_that_restarts_in_the_middle_of_a_sweep(harness, tmp_path, postgres_programs_folder):
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:
        server = PostgresServer(postgres_programs_folder, folder)
        server.start()
        try:
            url = server.url(server.new_database(empty=True))
            process = start(tmp_path, url, "scale")
            wait_for(process, "baseline · transform: ok")
            server.stop("fast")
            server.start()
            _, said = process.communicate(timeout=120)
            # Between two cells the restart is not noticed; inside one it ends the sweep in one line.
            assert process.returncode == 0 or (process.returncode == 2 and "connection to the server" in said)
            assert "Traceback" not in said
            code, _, said = harness(
                "sweep", "--plugin", PLUGIN, "--methods", "scale", "--models", "./model", *FAST, "--db", url
            )
            assert code == 0, said
            assert assert_whole(url) == EVERYTHING
        finally:
            server.stop()
