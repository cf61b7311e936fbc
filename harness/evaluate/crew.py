"""Working on many batches at once: on a CPU, one thread a core, each with a batch of its own.

torch splits every operation among its threads and waits for the slowest. A small model has thousands of
short operations, so that costs more than it gives, and very much more where the cores are shared with
other programs. Batches are independent, so each thread takes one from end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch

__all__ = ["ALONE", "Crew", "crew_for"]

T = TypeVar("T")


class Crew:
    """Runs functions in `workers` threads, or where there is one worker in the caller's own, when asked."""

    def __init__(self, pool: ThreadPoolExecutor | None, workers: int) -> None:
        self._pool, self.workers = pool, workers

    def submit(self, function: Callable[..., T], *arguments: object) -> Callable[[], T]:
        """Begin; the result (or exception) is what the returned function gives."""
        if self._pool is None:
            return partial(function, *arguments)
        return self._pool.submit(function, *arguments).result

    @property
    def under_way(self) -> int:
        """How many calls to have begun: one more than there are workers, so that none waits for the next."""
        return self.workers + (self._pool is not None)

    def all(self, function: Callable[..., T], each: Sequence[tuple[object, ...]]) -> list[T]:
        """The results for all arguments, in order; the first exception only when every call has ended."""
        if self._pool is None:
            return [function(*arguments) for arguments in each]
        begun = [self._pool.submit(function, *arguments) for arguments in each]
        wait(begun)
        return [future.result() for future in begun]


ALONE = Crew(None, 1)


@contextmanager
def crew_for(device: torch.device) -> Iterator[Crew]:
    """As many workers as torch has threads on a CPU; one for a GPU, which is kept busy by one.

    Inside, torch itself uses one thread where there are several workers.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield ALONE
        return
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads, "scoring", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield Crew(pool, threads)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
