"""Which tasks, groups and tags there are in a folder of lm-eval files.

The rules are lm-eval's: files in order of their paths, the first of a name wins, a file without
``task`` or ``group`` is a template. lm-eval's own 14,000 files take seconds to read, so their catalogue
is kept on disk under lm-eval's version and location.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness.errors import ConfigError
from harness.evaluate.yaml_files import YamlReader
from harness.folders import default_cache_dir, replacing

__all__ = ["Catalog", "Entry", "folder_catalog", "lm_eval_catalog", "lm_eval_folder"]

FORMAT = 1  # of the file on disk
_GROUP_KEYS = frozenset({"group", "group_alias", "task", "tag", "aggregate_metric_list", "metadata"})
_SKIPPED = frozenset({"__pycache__", ".ipynb_checkpoints"})


@dataclass(frozen=True, slots=True)
class Entry:
    """One name. `kind` is ``task``, ``group`` or ``tag`` (a shorthand for tasks).

    A group is `whole` where its members alone would not say the same: lm-eval aggregates it, or it
    defines or changes tasks in place.
    """

    name: str
    kind: str
    yaml_path: Path | None = None
    output_type: str | None = None
    members: tuple[str, ...] = ()
    whole: bool = False
    summary: str = ""


Catalog = Mapping[str, Entry]


def folder_catalog(folder: Path, *, lenient: bool = False) -> dict[str, Entry]:
    """Read a folder and everything below it.

    Args:
        lenient: skip files that cannot be read, as lm-eval does with its own.

    Raises:
        ConfigError: not lenient, and the folder or a file in it cannot be read, or two files define
            the same name.
    """
    if not os.path.isdir(folder):
        raise ConfigError(f"the task folder {folder} does not exist")
    reader = YamlReader()
    entries: dict[str, Entry] = {}
    for path in _yaml_files(folder):
        try:
            content = reader.read(path).content
        except ConfigError:
            if lenient:
                continue
            raise
        if (entry := _entry_of(content, path)) is None:
            continue
        if entry.name in entries:
            first = entries[entry.name]
            if not lenient and first.yaml_path is not None:
                raise ConfigError(f"task {entry.name!r} is defined by both {first.yaml_path} and {path}")
            continue
        entries[entry.name] = entry
        if entry.kind == "task":
            _add_tags(entries, entry.name, content.get("tag"))
    return entries


def lm_eval_folder() -> Path:
    """Where lm-eval keeps its tasks, found without importing it."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise ConfigError("lm-eval is not installed; run: pip install lm-eval")
    return Path(spec.origin).parent / "tasks"


def lm_eval_catalog(cache_dir: Path | None = None) -> dict[str, Entry]:
    """lm-eval's own tasks, from the disk where this version in this place was read before."""
    folder = lm_eval_folder()
    try:
        release = version("lm_eval")
    except PackageNotFoundError:
        release = "unknown"
    place = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    stored = (cache_dir or default_cache_dir()) / f"lm-eval-tasks-{release}-{place}.json"
    entries = _read_stored(stored, folder)
    if entries is None:
        entries = folder_catalog(folder, lenient=True)
        _store(stored, folder, entries)
    return entries


# --- reading -----------------------------------------------------------------------------------------


def _yaml_files(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*.yaml") if not _SKIPPED & set(path.parts))
    return sorted(found, key=lambda path: path.as_posix())


def _entry_of(content: Mapping[str, Any], path: Path) -> Entry | None:
    if "class" not in content and "group" in content:
        return Entry(
            name=str(content["group"]),
            kind="group",
            yaml_path=path,
            members=tuple(_members(content.get("task"))),
            whole=_is_whole(content),
            summary=_summary(content),
        )
    if not isinstance(content.get("task"), str):
        return None
    output_type = None if "class" in content else content.get("output_type", "generate_until")
    return Entry(content["task"], "task", path, output_type, summary=_summary(content))


def _is_whole(content: Mapping[str, Any]) -> bool:
    listed = content.get("task")
    in_place = isinstance(listed, list) and any(isinstance(item, dict) for item in listed)
    return bool(content.get("aggregate_metric_list")) or in_place or not content.keys() <= _GROUP_KEYS


def _members(listed: Any) -> list[str]:
    """The names in a group's ``task`` list; groups defined in place are opened."""
    names: list[str] = []
    for item in listed if isinstance(listed, list) else [listed]:
        if isinstance(item, str):
            names.append(item)
        elif isinstance(item, dict) and isinstance(item.get("task"), list):
            names.extend(_members(item["task"]))
        elif isinstance(item, dict):
            names += [str(item[key]) for key in ("group", "task") if key in item][:1]
    return names


def _summary(content: Mapping[str, Any]) -> str:
    metadata = content.get("metadata")
    if isinstance(metadata, dict) and "summary" in metadata:
        return str(metadata["summary"])
    parts = (content.get("dataset_path"), content.get("dataset_name"))
    return " ".join(part for part in parts if isinstance(part, str))


def _add_tags(entries: dict[str, Entry], task: str, tags: Any) -> None:
    for tag in tags if isinstance(tags, list) else [tags]:
        if isinstance(tag, str):
            known = entries.get(tag, Entry(tag, "tag"))
            if known.kind == "tag":
                entries[tag] = replace(known, members=(*known.members, task))


# --- the file on disk --------------------------------------------------------------------------------


def _read_stored(path: Path, folder: Path) -> dict[str, Entry] | None:
    try:
        stored = json.loads(path.read_bytes())
        if stored["format"] != FORMAT:
            return None
        return {row["name"]: _entry_from(row, folder) for row in stored["entries"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent or damaged: read the files again


def _entry_from(row: dict[str, Any], folder: Path) -> Entry:
    path = row.pop("yaml_path")
    members = tuple(row.pop("members"))
    return Entry(**row, members=members, yaml_path=None if path is None else folder / path)


def _store(path: Path, folder: Path, entries: Catalog) -> None:
    rows = []
    for entry in entries.values():
        row = asdict(entry)
        row["yaml_path"] = entry.yaml_path and entry.yaml_path.relative_to(folder).as_posix()
        rows.append(row)
    # Nothing depends on this file but the time to read 14,000 others again.
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(json.dumps({"format": FORMAT, "entries": rows}).encode())
