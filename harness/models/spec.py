"""The written form of a model: what `--models` takes.

===========================  ==========================================================
``zoo:llama-6m``             a bundled trained checkpoint
``org/name``, ``org/n@rev``  a hub id, with an optional branch, tag or commit
``./directory``              a local directory in Hugging Face format
``shape:llama-7b``           the real architecture with random weights (synthetic)
``scratch:llama-nano``       small and untrained, trained after the transform
``package:module``           the folder ``model`` of an installed Python package
``name``                     a name that a plugin registered
``...+outliers``             modifier: function-preserving activation outliers
===========================  ==========================================================

The text alone decides where a model comes from, never what happens to lie in the working directory: a
directory is written with ``./``, ``../``, ``/`` or ``~`` (or has a second slash, which no hub id has). An
``org/name`` that is a folder here as well is refused, with both ways to write it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from harness.errors import ConfigError, UnknownName

__all__ = ["MODIFIERS", "SOURCES", "ModelSpec", "parse_model"]

SOURCES = ("zoo", "shape", "scratch", "package", "hub", "local", "plugin")
PREFIXES = ("zoo", "shape", "scratch", "package")
MODIFIERS = ("outliers",)
# The hub's own rules: 96 characters of letters, digits, ".", "-", "_"; no "--", "..", ".git" at the end.
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"(?!.*(?:--|\.\.))(?!.*\.git$){_PART}(?:/{_PART})?", re.ASCII)
_LONGEST_HUB_ID = 96
# Branches, tags, commits and refs/pr/1, as git allows them; no part of one may climb out of a folder.
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)*", re.ASCII)
_LONGEST_REVISION = 200
_MODULE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A parsed model: where it comes from, its name there, and modifiers with their options.

    `modifiers` holds ``(name, ((option, value), ...))`` pairs in the order in which they apply.
    """

    label: str
    source: str
    name: str
    revision: str | None = None
    modifiers: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()
    trust_remote_code: bool = False
    allow_pickle: bool = False  # load .bin checkpoints too; safetensors only unless asked


def parse_model(text: str, *, trust_remote_code: bool = False, allow_pickle: bool = False) -> ModelSpec:
    """Parse the written form of a model; the existence of what it names is checked at loading.

    Raises:
        ConfigError: nothing before the modifiers, an unknown source, a path that is no directory, a null
            character, a name that can be read in two ways.
        UnknownName: an unknown modifier.
    """
    label = text.strip()
    if "\0" in label:  # no path has one, and the look-up of a home directory fails on it
        raise ConfigError(f"model {text!r} holds a null character")
    base, *written = _split_modifiers(label)
    if not base:
        raise ConfigError(f"model {text!r} is empty")
    modifiers = tuple(_parse_modifier(part) for part in written)
    source, name, revision = _split_source(base)
    return ModelSpec(label, source, name, revision, modifiers, trust_remote_code, allow_pickle)


def _looks_like_path(text: str) -> bool:
    if text.partition(":")[0] in PREFIXES:
        return False
    before_revision = text.partition("@")[0]  # which may be refs/pr/1
    return text.startswith((".", "/", "~")) or text.endswith("/") or before_revision.count("/") > 1


def _split_modifiers(label: str) -> list[str]:
    head, *rest = label.split("+")
    if not _looks_like_path(head):
        return [head, *rest]
    # A directory may have a plus sign in its name; only a known modifier after one is split off.
    if os.path.isdir(os.path.expanduser(label)):
        return [label]
    parts: list[str] = []
    while rest and rest[-1].split(":")[0] in MODIFIERS:
        parts.insert(0, rest.pop())
    return ["+".join([head, *rest]), *parts]


def _parse_modifier(text: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    name, *options = text.split(":")
    if name not in MODIFIERS:
        raise UnknownName("model modifier", name, MODIFIERS)
    pairs: dict[str, str] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not (equals and key and value):
            raise ConfigError(f"model modifier {text!r}: write options as name=value")
        if key in pairs:
            raise ConfigError(f"model modifier {text!r}: {key} is given twice")
        pairs[key] = value
    return name, tuple(pairs.items())


def _split_source(base: str) -> tuple[str, str, str | None]:
    if _looks_like_path(base):
        path = os.path.expanduser(base)
        if not os.path.isdir(path):
            raise ConfigError(f"model directory {base!r} does not exist")
        return "local", str(Path(path)), None
    prefix, colon, name = base.partition(":")
    if colon:
        return _prefixed(base, prefix, name)
    name, at, revision = base.partition("@")
    if len(name) > _LONGEST_HUB_ID or not _HUB_ID.fullmatch(name):
        raise ConfigError(
            f"model {base!r} is neither a hub id (organisation/name) nor a directory (./name, /path/name)"
        )
    if at and (len(revision) > _LONGEST_REVISION or not _REVISION.fullmatch(revision)):
        raise ConfigError(f"model {base!r}: a branch, a tag or a commit must follow the @, not {revision!r}")
    if "/" not in name:
        # A name without an organisation is one that a plugin registered: the registry decides.
        if at:
            raise ConfigError(
                f"model {base!r}: a registered name has no revision; a hub id is org/name@revision"
            )
        return "plugin", name, None
    if not at and os.path.isdir(name):
        raise ConfigError(
            f"model {name!r} is a folder here and may be a hub id too: write ./{name} for the folder, "
            f"{name}@main for the hub"
        )
    return "hub", name, revision or None


def _prefixed(base: str, prefix: str, name: str) -> tuple[str, str, None]:
    if prefix not in PREFIXES:
        raise UnknownName("model source", prefix, PREFIXES, hint="(a directory is ./name)")
    if not name:
        raise ConfigError(f"model {base!r}: a name must follow {prefix}:")
    if prefix == "package" and not _MODULE.fullmatch(name):
        raise ConfigError(f"model {base!r}: the name of an installed package must follow package:")
    return prefix, name, None
