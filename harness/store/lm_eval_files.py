"""Where lm-eval's output lies, and what its files are called.

::

    OUTPUT/<model>/results_2026-01-02T03-04-05.678901.json
    OUTPUT/<model>/samples_<task>_2026-01-02T03-04-05.678901.jsonl     one for each task, with --log_samples

Names of tasks come from files that anyone may have written: a name is never made into a path to read, it is
compared with the names that are there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path

from harness.errors import ConfigError

__all__ = ["holds_results", "results_files", "safe_name", "samples_files", "samples_name"]

_LONGEST = 120
_MOST_FILES = 1000


def results_files(place: Path) -> list[Path]:
    """The results files that a file or a folder means, sorted by name.

    Raises:
        ConfigError: there are none, or it is a file of samples.
    """
    if place.is_dir():
        found = sorted(_found(place))
        if not found:
            raise ConfigError(f"{place} holds no results_*.json of lm-eval")
        if len(found) > _MOST_FILES:
            raise ConfigError(f"{place} holds {len(found):,} results files; name a folder further down")
        return found
    if not place.exists():
        raise ConfigError(f"{place} does not exist")
    return [place]


def holds_results(place: Path) -> bool:
    """Whether it is a folder with output of lm-eval, at most two levels down."""
    return place.is_dir() and next(_found(place), None) is not None


def _found(place: Path) -> Iterator[Path]:
    levels = chain.from_iterable(place.glob(f"{above}results_*.json") for above in ("", "*/", "*/*/"))
    return (file for file in levels if file.is_file())


def samples_files(results: Path, tasks: Iterable[str]) -> Mapping[str, Path]:
    """The files of samples beside a results file, by task.

    Raises:
        ConfigError: a file of samples of the same moment that belongs to none of the tasks.
    """
    _, _, moment = results.stem.rpartition("_")
    # lm-eval takes a task's name as it is; only names are compared, so one with a slash finds nothing.
    names = {
        name: task
        for task in tasks
        for name in (f"samples_{task}_{moment}.jsonl", samples_name(task, moment))
    }
    found = {}
    for file in sorted(results.parent.glob(f"samples_*_{_literal(moment)}.jsonl")):
        if file.name not in names:
            raise ConfigError(f"{file} belongs to no task of {results.name}")
        found[names[file.name]] = file
    return found


def samples_name(task: str, moment: str) -> str:
    """What the file of a task's samples is called; lm-eval's own name wherever that is one."""
    return f"samples_{safe_name(task)}_{moment}.jsonl"


def safe_name(text: str) -> str:
    """A text as a part of a file's name; what had to be changed gets a hash, so that two stay two.

    >>> safe_name("arc_easy"), safe_name("../x")
    ('arc_easy', '..__x-d6b96a97')
    """
    kept = re.sub(r"[^\w.+=,@ -]+", "__", text, flags=re.ASCII)[:_LONGEST]
    if kept == text and kept.strip(". "):
        return text
    return f"{kept}-{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:8]}"


def _literal(text: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", text)
