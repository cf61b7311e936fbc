"""``harness new``: start a method of your own in one file."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["new"]


def _is_importable(module: str) -> bool:
    """Whether Python has a module of this name; a folder without code is none."""
    if module in sys.stdlib_module_names:
        return True
    found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None


def new(
    name: Annotated[str, typer.Argument(help="The method's name, such as my-method.")],
    directory: Annotated[Path, typer.Option(help="Where to write the file.")] = Path(),
) -> None:
    """Write a working method to start from; sweep it with --plugin FILE.py --methods NAME."""
    from harness.errors import ConfigError
    from harness.plugins import load_plugins

    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise ConfigError(f"method name {name!r}: use lower-case words joined by hyphens")
    if name in load_plugins().methods:
        raise ConfigError(f"method {name!r} exists already; choose another name")
    if not os.path.isdir(directory):
        raise ConfigError(f"--directory {directory} is no directory")
    module = name.replace("-", "_")
    target = directory / f"{module}.py"
    if not target.exists() and _is_importable(module):
        # Python looks in the working directory first: a torch.py there would end every program.
        raise ConfigError(f"{target} would hide the module {module} of that name; choose another name")
    title = "".join(word.capitalize() for word in name.split("-"))
    template = (files("harness.cli") / "method_template.txt").read_text(encoding="utf-8")
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(template.replace("@NAME@", name).replace("@TITLE@", title))
    except FileExistsError:
        raise ConfigError(f"{target} exists already; nothing was changed") from None
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}") from None
    typer.echo(f"wrote {target}\ntry it: harness sweep --plugin {target} --methods {name},rtn")
