"""Data sets on the hub: the commit that a task's data are of, looked up once and then held to.

A data set's ``main`` moves like a model's. The commit is looked up when a sweep is planned and is part of the
cell's key; the worker loads that commit and no other, also where `datasets` would quietly take what its cache
has.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.errors import ConfigError
from harness.evaluate.yaml_files import FunctionRef
from harness.models.hub import HubLookup, NotOnHub, remember

__all__ = ["DataCommit", "DataCommits", "hub_datasets", "pinned"]

# What `datasets` reads by itself, without the hub; importing it to ask costs a second.
_BUILDERS = frozenset(
    {
        "arrow", "audiofolder", "cache", "csv", "eval", "generator", "hdf5", "imagefolder", "json", "lance",
        "niftifolder", "pandas", "parquet", "pdffolder", "spark", "sql", "text", "videofolder", "webdataset",
        "xml",
    }
)  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)?", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._/-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class DataCommit:
    """A data set of a task: the revision asked for, and the commit it stands for or why that is not known."""

    name: str
    revision: str | None
    commit: str | None
    problem: str | None = None


@dataclass
class DataCommits:
    """Looks data sets up, each once; after the first silence of the hub only in the cache."""

    _lookup: HubLookup = field(default_factory=HubLookup)
    _known: dict[tuple[str, str | None], DataCommit] = field(default_factory=dict)

    def of(self, content: Mapping[str, Any]) -> tuple[DataCommit, ...]:
        """The data sets that a task file reads from the hub.

        Raises:
            ConfigError: a name or a revision that cannot be one.
        """
        return tuple(self._find(name, revision) for name, revision in hub_datasets(content))

    def _find(self, name: str, revision: str | None) -> DataCommit:
        key = (name, revision)
        if key not in self._known:
            try:
                found = DataCommit(name, revision, self._lookup.commit(name, revision, "dataset"))
            except NotOnHub as error:
                # Its cells will fail with this; other tasks are measured all the same.
                found = DataCommit(name, revision, None, str(error))
            self._known[key] = found
        return self._known[key]


def hub_datasets(content: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    """Names and revisions of the data sets that a task file, or a task defined in it, reads from the hub.

    Raises:
        ConfigError: a name or a revision that cannot be one.
    """
    found: dict[tuple[str, str | None], None] = {}
    for task in _tasks(content):
        name, options = task["dataset_path"], task.get("dataset_kwargs") or {}
        if not isinstance(name, str) or isinstance(task.get("custom_dataset"), FunctionRef):
            continue
        if name in _BUILDERS or os.path.isdir(name):
            continue
        if not _NAME.fullmatch(name) or ".." in name:
            raise ConfigError(f"dataset_path {name!r} is neither a directory nor a data set of the hub")
        revision = options.get("revision") if isinstance(options, Mapping) else None
        if revision is not None and not (isinstance(revision, str) and _REVISION.fullmatch(revision)):
            raise ConfigError(f"data set {name!r}: the revision {revision!r} is no branch, tag or commit")
        found[(name, revision)] = None
    return list(found)


def _tasks(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, Mapping):
        if value.get("dataset_path") is not None:
            yield value
        for inner in value.values():
            yield from _tasks(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _tasks(inner)


@contextmanager
def pinned(data: Sequence[DataCommit]) -> Iterator[None]:
    """Let `datasets` load these data sets at their commits.

    Raises:
        ConfigError: the commit of one is not known, or what was loaded is of another.
    """
    import datasets

    from harness.models.hub_client import use_bounded_client

    if unknown := next((each for each in data if each.commit is None), None):
        raise ConfigError(unknown.problem or f"data set {unknown.name!r}: its commit is not known")
    use_bounded_client()
    commits = {(each.name, each.revision): each.commit for each in data}
    load = datasets.load_dataset

    def load_pinned(path: str, *arguments: Any, **options: Any) -> Any:
        commit = commits.get((path, options.get("revision")))
        if commit is None:
            return load(path, *arguments, **options)
        loaded = load(path, *arguments, **{**options, "revision": commit})
        _check(path, commit, loaded)
        remember(path, options.get("revision"), "dataset", commit)
        return loaded

    datasets.load_dataset = load_pinned
    try:
        yield
    finally:
        datasets.load_dataset = load


def _check(name: str, commit: str, loaded: Any) -> None:
    """Where the hub is silent, `datasets` takes what it has; the folder of its files names the commit."""
    for split in loaded.values() if isinstance(loaded, Mapping) else [loaded]:
        for file in getattr(split, "cache_files", None) or ():
            if commit not in Path(file["filename"]).parts:
                raise ConfigError(
                    f"data set {name!r} at commit {commit[:12]} is not in the local cache, which holds "
                    "another commit, and the hub cannot be asked"
                )
