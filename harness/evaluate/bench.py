"""How fast tasks are scored here, against lm-eval's own `HFLM` at its best batch size, in one run.

    python -m harness.evaluate.bench --tasks hellaswag,piqa --items 1000 --model zoo:llama-6m

Both answer the same `loglikelihood` requests of lm-eval, tokenising included; loading tasks and judging
answers is left out for both. The batch size of `HFLM` is searched on a part of the items; then both run in
turns on all of them, and the ratio of each pair of runs is what counts. The answers are compared too. A
model without a tokenizer (`shape:`) borrows the zoo's: its answers mean nothing, its speed does.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM

from harness.cache import ContentCache
from harness.evaluate.index import resolve_tasks
from harness.evaluate.intervals import Floats
from harness.evaluate.lm import InMemoryLM, evaluating, quiet
from harness.evaluate.lm_tasks import load_task
from harness.models.loading import ZOO_DIR, LoadedModel, describe, load, zoo_names
from harness.models.spec import parse_model

__all__ = ["Report", "compare", "main"]

Answers = list[tuple[float, bool]]


@dataclass(frozen=True)
class Report:
    """What a run found. Times in seconds; `searched` is items per second of `HFLM` by batch size.

    `pairs` are (HFLM at `batch_size`, the engine) on all items, run in turns; `cached_s` is the engine
    with its tokenised requests on disk, as every further variant of a sweep finds them. `largest_error`
    is the largest difference of a log-likelihood in nats, `largest_steps` in steps of the model's type there:
    `HFLM` adds up in that type, where the sum of a long text in bfloat16 moves by eight at a time.
    `greedy_differences` is the number of answers that differ in whether they are what greedy decoding finds.
    """

    items: int
    requests: int
    searched: dict[int, float]
    batch_size: int
    pairs: tuple[tuple[float, float], ...]
    cached_s: float
    dtype: torch.dtype
    largest_error: float
    largest_steps: float
    greedy_differences: int

    @property
    def ratio(self) -> float:
        """How many times the items per second, the median over the pairs."""
        return statistics.median(theirs / ours for theirs, ours in self.pairs)

    def text(self) -> str:
        """What came of it, in three lines."""
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"with requests tokenised before: {self.cached_s:.2f} s\n"
            f"items per second: {self.ratio:.2f} times those of HFLM at its best batch size\n"
            f"largest difference of a log-likelihood: {self.largest_error:.2g} nats, "
            f"{self.largest_steps:.2g} steps of the {dtype} that HFLM adds up in; "
            f"greedy flags that differ: {self.greedy_differences} of {self.requests}"
        )


def compare(
    loaded: LoadedModel,
    requests: Sequence[Any],
    items: int,
    *,
    batch_sizes: Sequence[int],
    search_share: float,
    repeats: int,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Time both on lm-eval's `loglikelihood` instances and compare their answers.

    Args:
        search_share: the share of the requests that the batch size is searched with.
        say: is told each time when it is known.
    """

    def theirs(batch_size: int) -> HFLM:
        tokenizer = copy.deepcopy(loaded.tokenizer)
        return HFLM(pretrained=loaded.model, tokenizer=tokenizer, batch_size=batch_size)

    def engine(cache: ContentCache | None) -> InMemoryLM:
        return InMemoryLM(loaded.model, loaded.tokenizer, loaded.info, batch_size=16, cache=cache)

    step = max(1, round(1 / search_share))
    documents = sorted({(request.task_name, request.doc_id) for request in requests})[::step]
    chosen = set(documents)
    part = [request for request in requests if (request.task_name, request.doc_id) in chosen]
    searched = {}
    with quiet(), evaluating(loaded.model), tempfile.TemporaryDirectory() as folder:
        _timed(theirs(1), part[:64])  # kernels are chosen and memory is claimed
        for size in batch_sizes:
            try:
                searched[size] = len(documents) / _timed(theirs(size), part)[0]
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                break
            say(f"HFLM, batch {size:>4}: {searched[size]:9.1f} items/s on {len(documents)} items")
        best = max(searched, key=lambda size: searched[size])
        pairs = []
        for _ in range(repeats):
            their_s, their_answers = _timed(theirs(best), requests)
            own_s, own_answers = _timed(engine(None), requests)
            pairs.append((their_s, own_s))
            say(
                f"HFLM, batch {best}: {their_s:8.2f} s, {items / their_s:9.1f} items/s | engine: "
                f"{own_s:8.2f} s, {items / own_s:9.1f} items/s | {their_s / own_s:.2f}x"
            )
        cache = ContentCache(Path(folder))
        engine(cache).encode("loglikelihood", requests)
        cached_s, _ = _timed(engine(cache), requests)
    values = np.array([(a, b) for (a, _), (b, _) in zip(their_answers, own_answers, strict=True)])
    errors = np.abs(values[:, 0] - values[:, 1])
    dtype = next(loaded.model.parameters()).dtype
    differences = sum(a != b for (_, a), (_, b) in zip(their_answers, own_answers, strict=True))
    return Report(
        items=items,
        requests=len(requests),
        searched=searched,
        batch_size=best,
        pairs=tuple(pairs),
        cached_s=cached_s,
        dtype=dtype,
        largest_error=float(np.max(errors)),
        largest_steps=float(np.max(errors / _step(values[:, 0], dtype))),
        greedy_differences=differences,
    )


def _step(values: Floats, dtype: torch.dtype) -> Floats:
    """How far apart numbers of a type lie at these, float64.

    >>> _step(np.array([-1.5, -1000.0]), torch.bfloat16).tolist()
    [0.0078125, 4.0]
    """
    exponents = np.frexp(np.where(values == 0, 1.0, values))[1] - 1
    step: Floats = torch.finfo(dtype).eps * 2.0**exponents
    return step


def _timed(lm: Any, requests: Sequence[Any]) -> tuple[float, Answers]:
    answer: Callable[..., Answers] = lm.loglikelihood
    start = time.perf_counter()
    answers = answer(list(requests), disable_tqdm=True)
    return time.perf_counter() - start, answers


def _requests(tasks: Sequence[str], folders: Sequence[Path], limit: int | None) -> tuple[list[Any], int]:
    """lm-eval's `loglikelihood` instances of tasks, and the number of their documents."""
    requests: list[Any] = []
    with quiet():
        for task in resolve_tasks(tasks, folders):
            for leaf in load_task(task, seed=0).tasks.values():
                leaf.build_all_requests(limit=limit, rank=0, world_size=1)
                requests += [each for each in leaf.instances if each.request_type == "loglikelihood"]
    return requests, len({(request.task_name, request.doc_id) for request in requests})


def _loaded(model: str, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    from transformers import AutoTokenizer

    loaded = load(describe(parse_model(model)), device, dtype, seed=0)
    if loaded.tokenizer is None:
        loaded = replace(loaded, tokenizer=AutoTokenizer.from_pretrained(ZOO_DIR / zoo_names()[0]))
    return loaded


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m harness.evaluate.bench", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--tasks", default="hellaswag,piqa", help="names, comma-separated")
    parser.add_argument("--include-path", type=Path, action="append", default=[], help="folders of tasks")
    parser.add_argument("--items", type=int, help="of each task at most")
    parser.add_argument("--model", default="zoo:llama-6m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-sizes", default="1,4,8,16,32,64,128", help="of HFLM")
    parser.add_argument("--search-share", type=float, default=0.2, help="of the items, for the search")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    loaded = _loaded(given.model, device, getattr(torch, given.dtype))
    requests, items = _requests(given.tasks.split(","), given.include_path, given.items)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{given.model} in {given.dtype} on {where}, {torch.get_num_threads()} threads; {given.tasks}")
    print(f"{items} items, {len(requests)} requests", flush=True)
    report = compare(
        loaded,
        requests,
        items,
        batch_sizes=[int(size) for size in given.batch_sizes.split(",")],
        search_share=given.search_share,
        repeats=given.repeats,
        say=lambda line: print(line, flush=True),
    )
    print(report.text())


if __name__ == "__main__":
    main()
