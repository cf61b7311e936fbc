"""lm-eval's tasks from their requests to their samples, with the requests of several scored at once.

lm-eval's own `evaluate` builds, scores and judges in one call. Here these are three steps, so that the
log-likelihood requests of all tasks of a variant meet in one pass over the model. What a task asks and
how it judges the answers stays lm-eval's: `build_all_requests`, `apply_filters`, `process_results`.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lm_eval import utils

from harness.errors import NumericalFailure
from harness.evaluate.index import ResolvedTask
from harness.evaluate.lm import InMemoryLM
from harness.evaluate.lm_tasks import LoadedTask, load_task
from harness.evaluate.plan import Query

__all__ = ["PreparedTask", "prepare_task", "samples_of", "score_together"]

_SCORED = ("loglikelihood", "loglikelihood_rolling")


@dataclass
class PreparedTask:
    """A task with its requests, and their answers once they are scored.

    `requests` holds lm-eval's instances by their type, repeated ones repeated; `queries` those of the
    types that the engine scores, as tokens; `answers` is filled by `score_together`.
    """

    name: str
    loaded: LoadedTask
    requests: dict[str, list[Any]]
    queries: dict[str, list[list[Query]]]
    answers: dict[str, list[Any]] = field(default_factory=dict)
    note: str | None = None

    @property
    def is_scored(self) -> bool:
        """Whether every log-likelihood is answered; tasks that only generate have none."""
        return self.answers.keys() == self.queries.keys()

    @property
    def tokens(self) -> int:
        """How many tokens its queries have, as a measure of their cost."""
        return sum(len(query.tokens) for query in self._all())

    def _all(self) -> list[Query]:
        return [query for groups in self.queries.values() for group in groups for query in group]


def prepare_task(task: ResolvedTask, lm: InMemoryLM, *, limit: int | None, seed: int) -> PreparedTask:
    """Load a task, build its requests and tokenise those that the engine scores.

    Raises:
        ConfigError: the data cannot be loaded, or a request cannot be scored.
        NotApplicable: a task that the harness cannot do.
    """
    requests: dict[str, list[Any]] = defaultdict(list)
    queries: dict[str, list[list[Query]]] = {}
    with _compiled_templates():
        loaded = load_task(task, seed=seed)
        for leaf in loaded.tasks.values():
            leaf.build_all_requests(limit=limit, rank=0, world_size=1)
            for instance in leaf.instances:
                requests[instance.request_type] += [instance] * instance.repeats
    for kind in _SCORED:
        if kind in requests:
            queries[kind] = lm.encode(kind, requests[kind])
    return PreparedTask(task.name, loaded, dict(requests), queries)


def score_together(tasks: Sequence[PreparedTask], lm: InMemoryLM) -> None:
    """Answer the log-likelihood requests of all tasks by one pass over the model."""
    queries = [query for task in tasks for query in task._all()]
    if not queries:
        return
    scores = lm.score(queries)
    values = zip(scores.log_likelihoods.tolist(), scores.greedy.tolist(), strict=True)
    for task in tasks:
        for kind, groups in task.queries.items():
            found = [[next(values) for _ in group] for group in groups]
            if kind == "loglikelihood_rolling":
                task.answers[kind] = [sum(score for score, _ in windows) for windows in found]
            else:
                task.answers[kind] = [answer for (answer,) in found]
            task.note = scores.note


def samples_of(task: PreparedTask, lm: InMemoryLM, limit: int | None) -> dict[str, list[dict[str, Any]]]:
    """What lm-eval logs of every document, by task, with generated texts made here.

    Raises:
        NumericalFailure: a NaN among the answers. lm-eval takes the largest log-likelihood by `argmax`,
            which answers 0 for NaN: a broken model would score 100 % wherever the right choice comes first.
    """
    for kind, requests in task.requests.items():
        answers = task.answers.get(kind)
        if answers is None:
            answers = getattr(lm, kind)(requests)
        else:
            _check_numbers(answers)
        for request, answer in zip(requests, answers, strict=True):
            request.resps.append(answer)
    with _compiled_templates():
        return {name: _samples_of(leaf, limit) for name, leaf in task.loaded.tasks.items()}


def _check_numbers(answers: Sequence[Any]) -> None:
    scores = np.array([answer[0] if isinstance(answer, tuple) else answer for answer in answers])
    if broken := int(np.isnan(scores).sum()):
        raise NumericalFailure(f"{broken} of {len(answers)} log-likelihoods are NaN")


def _samples_of(leaf: Any, limit: int | None) -> list[dict[str, Any]]:
    leaf.apply_filters()
    of_document = defaultdict(list)
    for instance in leaf.instances:
        of_document[instance.doc_id].append(instance)
    for instances in of_document.values():
        instances.sort(key=lambda instance: instance.idx)
    samples = []
    for filter_name in leaf.instances[0].filtered_resps:
        for number, document in leaf.doc_iterator(rank=0, limit=limit, world_size=1):
            answers = [instance.filtered_resps[filter_name] for instance in of_document[number]]
            metrics: Mapping[str, Any] = leaf.process_results(document, answers)
            samples.append(
                {
                    **metrics,
                    "doc_id": number,
                    "doc": document,
                    "target": leaf.doc_to_target(document),
                    "filtered_resps": answers,
                    "filter": filter_name,
                    "metrics": list(metrics),
                }
            )
    return samples


@contextmanager
def _compiled_templates() -> Iterator[None]:
    """lm-eval compiles a task's Jinja templates again for every document; here, once."""
    compile_template = utils.env.from_string
    utils.env.from_string = functools.lru_cache(maxsize=256)(compile_template)
    try:
        yield
    finally:
        utils.env.from_string = compile_template
