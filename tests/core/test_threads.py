"""How many threads a worker gets."""

from __future__ import annotations

import os

import pytest

from harness.planning import threads_per_worker


@pytest.mark.parametrize(
    ("processors", "asked", "jobs", "threads"),
    [
        (8, None, 1, 8),
        (8, None, 3, 2),
        (2, None, 4, 1),
        (8, "3", 1, 3),
        (8, "3", 4, 2),
        (8, "x", 1, 8),
        (8, "0", 1, 8),
    ],
)
def test_a_share_of_the_processors_and_no_more_than_asked(monkeypatch, processors, asked, jobs, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(processors)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert threads_per_worker(jobs) == threads
