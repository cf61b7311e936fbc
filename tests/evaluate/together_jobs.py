"""What runs in workers of the tests of scoring together: processes that end in some way, and one real one."""

from __future__ import annotations

import os
import signal
import sys
import time

from harness.job import Phase
from harness.records import CellResult, Status, VariantReport


def dies_together(job, send):
    """Works on each cell by itself, and dies on all of them at once."""
    send(Phase("transform"))
    if job.together:
        send(Phase(job.cells[0].key, cells=len(job.cells)))
        os.kill(os.getpid(), signal.SIGKILL)
    return _gives_all(job, send)


def is_slow_together(job, send):
    """Takes longer for all cells than one may take."""
    send(Phase("transform"))
    send(Phase(job.cells[0].key, cells=len(job.cells)))
    time.sleep(1.5)
    return _gives_all(job, send)


def never_ends_together(job, send):
    send(Phase("transform"))
    if job.together:
        send(Phase(job.cells[0].key, cells=len(job.cells)))
        time.sleep(60)
    return _gives_all(job, send)


def _gives_all(job, send):
    for cell in job.cells:
        send(Phase(cell.key))
        send(CellResult(cell.key, job.variant_key, Status.OK))
    return 0


def costs_of_a_worker(job):
    """The fixed cost of a real worker, in seconds of processor time, and what it had to import."""
    from harness.worker import run_worker

    before = set(sys.modules)
    begun, fixed_s = time.process_time(), 0.0
    statuses = []

    def send(message):
        nonlocal begun, fixed_s
        spent = time.process_time() - begun
        if isinstance(message, VariantReport):
            fixed_s += spent  # loading and transforming are taken off below
        elif isinstance(message, CellResult):
            statuses.append(str(message.status))
            fixed_s -= sum(each.value for each in message.records if each.metric in ("load_s", "transform_s"))
        elif isinstance(message, Phase) and message.cells == 1:
            fixed_s += spent if len(statuses) > 1 else 0.0  # between two cells
        begun = time.process_time()

    assert run_worker(job, send) == 0
    return fixed_s, sorted(set(sys.modules) - before), statuses


def conversions_are_known():
    """Whether a worker begins with transformers' table of the weights that it renames."""
    from transformers import conversion_mapping

    return conversion_mapping._checkpoint_conversion_mapping_cache is not None
