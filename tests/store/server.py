"""A PostgreSQL server of the tests' own, on a socket in a temporary folder."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
from pathlib import Path

from harness.store.store import Store

TEMPLATE = "filled_template"


def postgres_programs():
    """The folder of PostgreSQL's programs; None where it is not installed."""
    folders = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), None]
    for folder in folders:
        found = shutil.which("initdb", path=str(folder) if folder else None)
        if found:
            return Path(found).parent
    return None


class PostgresServer:
    """A server that can be stopped and started again, and that copies an empty store in milliseconds."""

    def __init__(self, programs, folder):
        # The server refuses to run as root.
        self.user = "postgres" if os.geteuid() == 0 else getpass.getuser()
        self.programs, self.folder, self.data = programs, folder, Path(folder, "data")
        self.databases = 0
        shutil.chown(folder, self.user)
        self._run("initdb", "-D", str(self.data), "-A", "trust", "-U", "harness", "--no-sync", "-E", "UTF8")

    def _run(self, *command):
        subprocess.run(
            [str(self.programs / command[0]), *command[1:]],
            user=self.user, check=True, stdout=subprocess.DEVNULL, cwd=self.folder,
            env={"PATH": str(self.programs), "LC_ALL": "C.UTF-8"},
        )  # fmt: skip

    def start(self):
        options = f"-k {self.folder} -c listen_addresses='' -c fsync=off -c max_connections=40"
        self._run(
            "pg_ctl", "-D", str(self.data), "-o", options, "-l", f"{self.folder}/log", "-w", "start"
        )  # fmt: skip

    def stop(self, mode="immediate"):
        self._run("pg_ctl", "-D", str(self.data), "-m", mode, "-w", "stop")

    def url(self, database):
        return f"postgresql+psycopg://harness@/{database}?host={self.folder}"

    def execute(self, statement):
        import psycopg

        with psycopg.connect(f"host={self.folder} user=harness dbname=postgres", autocommit=True) as session:
            session.execute(statement)

    def new_database(self, *, empty=False):
        """The name of a fresh database: empty, or with the tables of a store in it."""
        self.databases += 1
        name = f"store_{self.databases}"
        if empty:
            self.execute(f"CREATE DATABASE {name}")
            return name
        if self.databases == 1:
            self.execute(f"CREATE DATABASE {TEMPLATE}")
            Store.open(self.url(TEMPLATE)).close()
        self.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE} STRATEGY file_copy")
        return name

    def drop(self, name):
        self.execute(f"DROP DATABASE {name} WITH (FORCE)")
