"""What runs in workers of executor tests: no model, only a process that ends in some way."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from harness.job import Budget, CellJob, Phase, VariantJob
from harness.records import CellKind, CellResult, Item, Status

HERE = "tests.robustness.jobs"


def make_job(name, cells=3):
    """A job of cells without content; `label` says how its worker behaves."""
    return VariantJob(
        variant_key=f"variant-{name}",
        label=name,
        chain=(),
        model=None,
        seed=0,
        dtype="float32",
        device="cpu",
        cells=tuple(CellJob(f"{name}-{i}", CellKind.TRANSFORM, None, None) for i in range(cells)),
        plugins=(),
        budget=Budget(1, 1, 1, 1, 2, None, ""),
        limit=None,
        eval_batch_size=1,
        cache_dir=Path("."),
        threads=1,
        environment={},
    )


def works(job, send):
    send(Phase("transform"))
    for cell in job.cells:
        send(Phase(cell.key))
        send(CellResult(cell.key, job.variant_key, Status.OK))
    return 0


def gives_megabytes(job, send):
    """At once; of the variant "late" half a second later."""
    items = tuple(Item(i, "acc", 1.0, {"text": "x" * 200}) for i in range(10_000))
    send(Phase("transform"))
    for cell in job.cells:
        send(Phase(cell.key))
        time.sleep(0.5 if job.label == "late" else 0.0)
        send(CellResult(cell.key, job.variant_key, Status.OK, items=items))
    return 0


def scores_together(job, send):
    send(Phase("transform"))
    send(Phase(job.cells[0].key, cells=len(job.cells)))
    time.sleep(0.1)
    return works(job, send)


def never_begins(job, send):
    raise RuntimeError("no such device")


def is_killed_in_the_second_cell(job, send):
    send(Phase("transform"))
    for cell in job.cells:
        send(Phase(cell.key))
        if cell.key.endswith("-1"):
            os.kill(os.getpid(), signal.SIGKILL)
        send(CellResult(cell.key, job.variant_key, Status.OK))
    return 0


def aborts_without_memory(job, send):
    send(Phase("transform"))
    print("terminate called after throwing an instance of 'std::bad_alloc'", file=sys.stderr, flush=True)
    os.abort()


def asks_for_a_new_process_for_ever(job, send):
    """Says that its device is lost, and has not measured anything."""
    from harness.worker import EXIT_CONTEXT_BROKEN

    send(Phase("transform"))
    send(Phase(job.cells[0].key))
    return EXIT_CONTEXT_BROKEN


def waits_for_its_end(job, send):
    send(Phase("transform"))
    signal.pause()
    return 0


def writes_a_temporary_file(job, send):
    with tempfile.NamedTemporaryFile(delete=False) as file:
        print(file.name, flush=True)
    send(Phase("transform"))
    signal.pause()
    return 0
