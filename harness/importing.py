"""Importing a Python file that lies anywhere."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["import_file"]


def import_file(file: Path, prefix: str) -> ModuleType:
    """Run a file once as a module; whatever it raises is passed on.

    The module's name carries the hash of the path and the content, so that two files of one name do not
    replace each other and an edited file is run again.

    Raises:
        ImportError: it is no Python file.
    """
    digest = hashlib.sha256(str(file.resolve()).encode() + b"\0" + file.read_bytes()).hexdigest()[:12]
    name = f"{prefix}_{file.stem.replace('-', '_')}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
