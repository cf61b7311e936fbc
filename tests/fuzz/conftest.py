"""Fuzzing happens in an empty folder with a cache of its own, and starts no server and no worker."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HARNESS_DB", raising=False)
    monkeypatch.setattr("harness.executors.server.start_fork_server", lambda *_a, **_k: None)
