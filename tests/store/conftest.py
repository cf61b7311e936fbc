"""Stores in SQLite files and in a throw-away PostgreSQL server."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from harness.store.store import Store


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.db"


@pytest.fixture
def store(path):
    with Store.open(path) as opened:
        yield opened


@pytest.fixture(scope="session")
def postgres_server():
    """The URL of a fresh server on a socket in a temporary directory."""
    programs = [*sorted(Path("/usr/lib/postgresql").glob("*/bin")), None]
    found = [shutil.which("initdb", path=str(folder) if folder else None) for folder in programs]
    pytest.importorskip("psycopg")
    if not any(found):
        pytest.skip("no PostgreSQL server is installed (initdb is not found)")
    binaries = Path(next(filter(None, found))).parent
    # The server refuses to run as root.
    user = "postgres" if os.geteuid() == 0 else getpass.getuser()
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:
        shutil.chown(folder, user)
        data = Path(folder, "data")

        def run(*command):
            subprocess.run(
                [str(binaries / command[0]), *command[1:]],
                user=user, check=True, stdout=subprocess.DEVNULL, cwd=folder,
                env={"PATH": str(binaries), "LC_ALL": "C.UTF-8"},
            )  # fmt: skip

        run("initdb", "-D", str(data), "-A", "trust", "-U", "harness", "--no-sync", "-E", "UTF8")
        options = f"-k {folder} -c listen_addresses='' -c fsync=off"
        run("pg_ctl", "-D", str(data), "-o", options, "-l", f"{folder}/log", "-w", "start")
        try:
            yield f"postgresql://harness@/postgres?host={folder}"
        finally:
            run("pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")
