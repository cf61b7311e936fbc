"""The content hash of a task: everything on this machine that decides what it asks.

Hashed are the YAML files with their includes, the Python beside them that a ``!function`` names, and
the data: local ``data_files`` by their content, a hub data set by what the YAML says of it (path, name,
revision), and what a module's own ``data_revision()`` answers.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import ConfigError
from harness.evaluate.yaml_files import FunctionRef, TaskFile, functions_in
from harness.importing import import_file
from harness.keys import content_key, file_hash

__all__ = ["data_files", "hashed_files", "require_unchanged", "task_revision"]

DATA_REVISION = "data_revision"  # the function that a task's Python file may define


FileHashes = Mapping[str, Sequence[tuple[Path, str]]]


def hashed_files(name: str, task: TaskFile) -> FileHashes:
    """The files of a task with the SHA-256 (hex) of each: ``yaml``, ``python`` and ``data``.

    Args:
        name: for messages.
        task: the merged content and the YAML files it came from.

    Raises:
        ConfigError: a local data file is absent.
    """
    functions = functions_in(task.content)
    folders = sorted({function.file.parent for function in functions if function.file.is_file()})
    found = {
        "yaml": task.files,
        "python": [file for folder in folders for file in sorted(folder.glob("*.py"))],
        "data": data_files(name, task.content),
    }
    return {kind: [(path, file_hash(path)) for path in paths] for kind, paths in found.items()}


def task_revision(name: str, task: TaskFile, hashed: FileHashes, *, run_python: bool = True) -> str:
    """SHA-256 (hex) of the content of a task (see the module).

    Args:
        name: for messages.
        task: the merged content and the YAML files it came from.
        hashed: of `hashed_files`.
        run_python: ask `data_revision()`; off for lm-eval's own tasks, none of which defines one.

    Raises:
        ConfigError: `data_revision()` fails.
    """
    answers = [_own_data_revision(name, each) for each in _definitions(task.content)] if run_python else []
    answers = [answer for answer in answers if answer is not None]
    return content_key(
        {
            **{kind: [[path.name, digest] for path, digest in files] for kind, files in hashed.items()},
            "data_revision": answers if len(answers) > 1 else next(iter(answers), None),
        }
    )


def require_unchanged(name: str, files: Sequence[tuple[Path, str]]) -> None:
    """Raise `ConfigError` where one of a task's files was changed since it was hashed: what the task asks now
    would be stored under the key of what it asked. Called after they were read, so that nothing comes in
    between."""
    for path, digest in files:
        try:
            is_same = file_hash(path) == digest
        except OSError:
            is_same = False
        if not is_same:
            raise ConfigError(
                f"{path.name} of task {name!r} was changed since the sweep began; run the same command again"
            )


def data_files(name: str, content: Mapping[str, Any]) -> list[Path]:
    """The local files that a task, or what a group defines in place, reads through `datasets`, sorted.

    As `datasets` does, relative paths start at the working directory. Addresses (``https://...``) are
    left out: they count as named.

    Raises:
        ConfigError: a named file does not exist.
    """
    return sorted({file for each in _definitions(content) for file in _data_files(name, each)})


def _definitions(content: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The content of a file, and of a group's the tasks and groups that it defines or changes in place."""
    yield content
    members = content.get("task")
    for member in members if isinstance(members, list) else ():
        if isinstance(member, Mapping):
            yield from _definitions(member)


def _data_files(name: str, content: Mapping[str, Any]) -> set[Path]:
    found: set[Path] = set()
    folder = content.get("dataset_path")
    if isinstance(folder, str) and Path(folder).is_dir():
        found |= {path for path in Path(folder).rglob("*") if path.is_file()}
    options = _options(name, content)
    base = Path(options.get("data_dir") or "")
    for pattern in _strings(options.get("data_files")):
        if "://" in pattern:
            continue
        path = Path(pattern)
        matches = list(path.parent.glob(path.name) if path.is_absolute() else base.glob(pattern))
        if not matches and isinstance(folder, str) and "/" not in folder:
            raise ConfigError(f"task {name!r} reads {base / pattern}, which does not exist")
        found.update(match for match in matches if match.is_file())
    return found


def _options(name: str, content: Mapping[str, Any]) -> Mapping[str, Any]:
    options = content.get("dataset_kwargs") or {}
    if not isinstance(options, Mapping) or not isinstance(options.get("data_dir") or "", str):
        raise ConfigError(f"task {name!r}: dataset_kwargs must be a mapping, and data_dir in it a text")
    return options


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _own_data_revision(name: str, content: Mapping[str, Any]) -> str | None:
    """What the module of `custom_dataset` says of its data, called with the same arguments."""
    function = content.get("custom_dataset")
    if not isinstance(function, FunctionRef) or not _defines(function.file, DATA_REVISION):
        return None
    metadata = content.get("metadata")
    arguments = {
        **(metadata if isinstance(metadata, dict) else {}),
        **_options(name, content),
    }
    try:
        return str(getattr(import_file(function.file, "harness_task"), DATA_REVISION)(**arguments))
    except (ImportError, SyntaxError, OSError, ValueError, TypeError, LookupError) as error:
        raise ConfigError(f"task {name!r}: {function.file.name}: {error}") from error


def _defines(file: Path, function: str) -> bool:
    """Whether a Python file has a top-level function of this name, without running it."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return False  # lm-eval says what is wrong with it when it loads the task
    return any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body)
