"""Reading lm-eval's task files without lm-eval.

lm-eval resolves ``!function`` and imports itself (torch, datasets: seconds) to read one file. What the
grid needs is a name, a kind and a content hash, so this reader leaves functions unresolved, follows
``include`` as lm-eval does, and keeps the files that an entry was read from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from harness.errors import ConfigError

__all__ = ["FunctionRef", "TaskFile", "YamlReader", "functions_in"]


@dataclass(frozen=True, slots=True)
class FunctionRef:
    """An unresolved ``!function module.name`` of a file in `folder`."""

    folder: Path
    qualified: str

    @property
    def file(self) -> Path:
        """The Python file beside the YAML that lm-eval tries first; it need not exist."""
        module = self.qualified.rpartition(".")[0]
        return self.folder / f"{module.replace('.', '/')}.py"

    @property
    def name(self) -> str:
        return self.qualified.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class TaskFile:
    """The content of a task file with its includes merged in, and all the YAML files read for it."""

    content: dict[str, Any]
    files: tuple[Path, ...]


@dataclass
class YamlReader:
    """Reads files and remembers them: thousands of tasks include the same few templates."""

    _known: dict[Path, TaskFile] = field(default_factory=dict)

    def read(self, path: Path, *, _above: tuple[Path, ...] = ()) -> TaskFile:
        """The merged content of `path`; keys of the file itself win over included ones.

        Raises:
            ConfigError: unreadable, not YAML, not a mapping, or included by itself.
        """
        if path in _above:
            raise ConfigError(f"{path} includes itself")
        if path not in self._known:
            self._known[path] = self._read(path, _above)
        return self._known[path]

    def _read(self, path: Path, above: tuple[Path, ...]) -> TaskFile:
        own = _load(path)
        includes = own.pop("include", [])
        merged: dict[str, Any] = {}
        files = [path]
        for include in includes if isinstance(includes, list) else [includes]:
            included = self.read((path.parent / str(include)).resolve(), _above=(*above, path))
            merged.update(included.content)
            files.extend(included.files)
        return TaskFile({**merged, **own}, tuple(dict.fromkeys(files)))


def functions_in(value: Any) -> list[FunctionRef]:
    """Every ``!function`` in a file's content, in order."""
    if isinstance(value, FunctionRef):
        return [value]
    if isinstance(value, dict):
        return [found for item in value.values() for found in functions_in(item)]
    if isinstance(value, list):
        return [found for item in value for found in functions_in(item)]
    return []


_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):  # type: ignore[misc]
    """The safe loader with ``!function`` left unresolved; `folder` is where the file lies."""

    folder: Path


def _function(loader: Any, node: Any) -> FunctionRef:
    return FunctionRef(loader.folder, str(loader.construct_scalar(node)))


yaml.add_constructor("!function", _function, Loader=_Loader)


def _load(path: Path) -> dict[str, Any]:
    try:
        loader = _Loader(path.read_bytes())
        loader.folder = path.parent
        try:
            content = loader.get_single_data()
        finally:
            loader.dispose()
    except OSError as error:
        raise ConfigError(f"cannot read the task file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping (task: ..., dataset_path: ...)")
    return content
