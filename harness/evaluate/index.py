"""Names of tasks: what `--tasks` may say, found without importing lm-eval.

A name is looked for in the bundled tasks and in the folders that the user and the plugins name, and only
then among lm-eval's own. A group that lm-eval aggregates (``mmlu``), or that changes its members, is one
task; a tag and a plain group stand for their members.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from harness.errors import ConfigError, UnknownName
from harness.evaluate.catalog import (
    Catalog,
    Entry,
    folder_catalog,
    lm_eval_catalog,
    lm_eval_folder,
)
from harness.evaluate.embedding_tasks import EMBEDDING_TYPES, embedding_definition
from harness.evaluate.hub_data import DataCommit, DataCommits
from harness.evaluate.revision import hashed_files, task_revision
from harness.evaluate.yaml_files import YamlReader
from harness.keys import content_key

__all__ = ["BUNDLED_DIR", "ResolvedTask", "TaskInfo", "list_tasks", "resolve_tasks"]

BUNDLED_DIR = Path(__file__).parent / "tasks"


@dataclass(frozen=True, slots=True)
class ResolvedTask:
    """A task with what a worker needs to load it, and the hash of its content.

    A single task is loaded from `yaml_path`; a group by name from `include_dirs`, the folders of its
    members. `output_type` is lm-eval's (``multiple_choice``, ``loglikelihood``,
    ``loglikelihood_rolling``, ``generate_until``) or one of `EMBEDDING_TYPES`, None where it is not known
    before loading or where the members of a group differ.
    """

    name: str
    origin: str  # bundled | include | lm-eval
    kind: str  # task | group
    yaml_path: Path
    include_dirs: tuple[Path, ...]
    output_type: str | None
    revision: str
    data: tuple[DataCommit, ...] = ()  # the data sets of the hub, at the commits that `revision` counts
    files: tuple[tuple[Path, str], ...] = ()  # a user's own, with the hashes that `revision` counts


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """One row of ``harness tasks``."""

    name: str
    origin: str
    output_type: str | None
    summary: str


def resolve_tasks(names: Sequence[str], include_paths: Sequence[Path] = ()) -> tuple[ResolvedTask, ...]:
    """Find tasks by name, pattern (``blimp_*``) or path of a YAML file; each comes once, in order.

    Args:
        include_paths: folders of task files: the plugins' and the user's own.

    Raises:
        UnknownName: no such task; names the near matches.
        ConfigError: a file that cannot be read, a name defined twice, an empty group.
    """
    finder = _Finder(tuple(include_paths))
    found: dict[str, ResolvedTask] = {}
    for name in names:
        for entry in finder.expand(name):
            known = found.get(entry.name)
            if known is None:
                found[entry.name] = finder.resolve(entry)
            elif entry.yaml_path and os.path.realpath(entry.yaml_path) != os.path.realpath(known.yaml_path):
                raise ConfigError(
                    f"task {entry.name!r} is defined by both {known.yaml_path} and {_place(entry)}"
                )
    return tuple(found.values())


def list_tasks(include_paths: Sequence[Path] = (), *, all: bool = False) -> list[TaskInfo]:
    """The bundled tasks and those of `include_paths`; with `all` lm-eval's own too, groups included."""
    finder = _Finder(tuple(include_paths))
    entries = list(finder.local.values())
    if all:
        entries += [entry for name, entry in finder.lm_eval.items() if name not in finder.local]
    return [
        TaskInfo(entry.name, _origin(entry), entry.output_type, entry.summary)
        for entry in entries
        if entry.kind != "tag"
    ]


@dataclass(frozen=True)
class _Finder:
    """The catalogues of one call; lm-eval's is read when it is first needed."""

    include_paths: tuple[Path, ...]

    @cached_property
    def local(self) -> Catalog:
        merged: dict[str, Entry] = {}
        given = (os.path.realpath(os.path.expanduser(each)) for each in self.include_paths)
        folders = dict.fromkeys(Path(each) for each in given)
        for folder in (BUNDLED_DIR, *(path for path in folders if path != BUNDLED_DIR)):
            for name, entry in folder_catalog(folder).items():
                if name in merged and entry.kind == merged[name].kind == "tag":
                    entry = replace(entry, members=(*merged[name].members, *entry.members))
                elif name in merged:
                    raise ConfigError(
                        f"task {name!r} is defined by both {_place(merged[name])} and {_place(entry)}"
                    )
                merged[name] = entry
        return merged

    @cached_property
    def lm_eval(self) -> Catalog:
        return lm_eval_catalog()

    @cached_property
    def reader(self) -> YamlReader:
        return YamlReader()

    @cached_property
    def data_commits(self) -> DataCommits:
        return DataCommits()

    def find(self, name: str) -> Entry | None:
        return self.local.get(name) or self.lm_eval.get(name)

    def expand(self, name: str) -> Iterable[Entry]:
        """The tasks and whole groups that a name stands for."""
        if name.endswith((".yaml", ".yml")):
            return [_entry_of_file(Path(os.path.realpath(os.path.expanduser(name))))]
        if set(name) & set("*?["):
            known = {**self.lm_eval, **self.local}
            matches = [known[match] for match in sorted(fnmatch.filter(known, name))]
            if not matches:
                raise UnknownName("task", name, known, hint="(no name matches the pattern)")
            return [leaf for match in matches for leaf in self._leaves(match, ())]
        entry = self.find(name)
        if entry is None:
            raise UnknownName("task", name, {**self.lm_eval, **self.local})
        return self._leaves(entry, ())

    def _leaves(self, entry: Entry, above: tuple[str, ...]) -> list[Entry]:
        if entry.kind == "task" or (entry.kind == "group" and entry.whole):
            return [entry]
        leaves: list[Entry] = []
        for member in entry.members:
            found = self.find(member)
            if found is None:
                raise ConfigError(f"{entry.kind} {entry.name!r} names the unknown task {member!r}")
            if member not in above:
                leaves += self._leaves(found, (*above, entry.name))
        if not leaves:
            raise ConfigError(f"{entry.kind} {entry.name!r} has no tasks")
        return leaves

    def resolve(self, entry: Entry) -> ResolvedTask:
        assert entry.yaml_path is not None
        if entry.kind == "group":
            return self._resolve_group(entry)
        if entry.output_type in EMBEDDING_TYPES:
            embedding_definition(entry.name, self.reader.read(entry.yaml_path).content)
        data = self._data(entry)
        revision, files = self._revision(entry)
        return ResolvedTask(
            name=entry.name,
            origin=_origin(entry),
            kind="task",
            data=data,
            yaml_path=entry.yaml_path,
            include_dirs=(),
            output_type=entry.output_type,
            revision=_with_data(revision, data),
            files=files,
        )

    def _resolve_group(self, group: Entry) -> ResolvedTask:
        assert group.yaml_path is not None
        members = self._members(group, {})
        folders = {entry.yaml_path.parent for entry in (group, *members) if entry.yaml_path}
        types = {entry.output_type for entry in members if entry.kind == "task"}
        if types & EMBEDDING_TYPES:
            raise ConfigError(
                f"group {group.name!r} aggregates tasks of encoders, which no group can; name its members"
            )
        found = {entry.name: self._revision(entry) for entry in (group, *members)}
        parts = {name: revision for name, (revision, _) in found.items()}
        data = tuple(dict.fromkeys(each for entry in (group, *members) for each in self._data(entry)))
        return ResolvedTask(
            name=group.name,
            origin=_origin(group),
            kind="group",
            data=data,
            yaml_path=group.yaml_path,
            include_dirs=tuple(sorted(path for path in folders if not folders & set(path.parents))),
            output_type=types.pop() if len(types) == 1 else None,
            revision=_with_data(content_key(parts), data),
            files=tuple(dict.fromkeys(file for _, files in found.values() for file in files)),
        )

    def _members(self, entry: Entry, seen: dict[str, Entry]) -> list[Entry]:
        """Everything below a group; names found nowhere are tasks defined in place."""
        for member in entry.members:
            found = self.find(member)
            if found is not None and member not in seen:
                seen[member] = found
                self._members(found, seen)
        return list(seen.values())

    def _data(self, entry: Entry) -> tuple[DataCommit, ...]:
        if entry.yaml_path is None or entry.kind == "tag":
            return ()
        return self.data_commits.of(self.reader.read(entry.yaml_path).content)

    def _revision(self, entry: Entry) -> tuple[str, tuple[tuple[Path, str], ...]]:
        """The content hash of an entry, and where it is a user's own, the files behind it."""
        if entry.yaml_path is None:
            return content_key({"members": list(entry.members)}), ()
        origin, task = _origin(entry), self.reader.read(entry.yaml_path)
        hashed = hashed_files(entry.name, task)
        revision = task_revision(entry.name, task, hashed, run_python=origin != "lm-eval")
        if origin != "include":
            return revision, ()  # as constant as the package that they belong to
        files = (file for of_kind in hashed.values() for file in of_kind)
        return revision, tuple((path.absolute(), digest) for path, digest in files)


def _with_data(revision: str, data: Sequence[DataCommit]) -> str:
    """The content of a task with the commits of its data, where it has data on the hub."""
    if not data:
        return revision
    commits = sorted([each.name, each.revision or "", each.commit or ""] for each in data)
    return content_key({"task": revision, "data": commits})


def _entry_of_file(path: Path) -> Entry:
    content = YamlReader().read(path).content
    name = content.get("task")
    if not isinstance(name, str) or "group" in content:
        raise ConfigError(f"{path} defines no task; name a group's folder with --include-path")
    output_type = None if "class" in content else content.get("output_type", "generate_until")
    return Entry(name, "task", path, output_type)


def _origin(entry: Entry) -> str:
    path = entry.yaml_path
    if path is not None and path.is_relative_to(BUNDLED_DIR):
        return "bundled"
    if path is not None and path.is_relative_to(lm_eval_folder()):
        return "lm-eval"
    return "include"


def _place(entry: Entry) -> str:
    return str(entry.yaml_path) if entry.yaml_path else f"the tag {entry.name}"
