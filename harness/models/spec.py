"""The written form of a model: what `--models` takes.

===========================  ==========================================================
``zoo:llama-6m``             a bundled trained checkpoint
``org/name``, ``org/n@rev``  a hub id, with an optional revision
``./directory``              a local directory in Hugging Face format
``shape:llama-7b``           the real architecture with random weights (synthetic)
``scratch:llama-nano``       small and untrained, trained after the transform
``package:module``           the folder ``model`` of an installed Python package
``name``                     a name that a plugin registered
``...+outliers``             modifier: function-preserving activation outliers
===========================  ==========================================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from harness.errors import ConfigError, UnknownName

__all__ = ["MODIFIERS", "SOURCES", "ModelSpec", "parse_model"]

SOURCES = ("zoo", "shape", "scratch", "package", "hub", "local", "plugin")
PREFIXES = ("zoo", "shape", "scratch", "package")
MODIFIERS = ("outliers",)
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


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
        ConfigError: nothing before the modifiers, an unknown source, a path that is no directory.
        UnknownName: an unknown modifier.
    """
    label = text.strip()
    base, *written = _split_modifiers(label)
    if not base:
        raise ConfigError(f"model {text!r} is empty")
    modifiers = tuple(_parse_modifier(part) for part in written)
    source, name, revision = _split_source(base)
    return ModelSpec(label, source, name, revision, modifiers, trust_remote_code, allow_pickle)


def _split_modifiers(label: str) -> list[str]:
    # A directory may have a plus sign in its name; only a known modifier after one is split off.
    if Path(label).expanduser().is_dir():
        return [label]
    head, *rest = label.split("+")
    looks_like_path = head.startswith((".", "/", "~")) or len(Path(head).parts) > 2
    if looks_like_path:
        parts: list[str] = []
        while rest and rest[-1].split(":")[0] in MODIFIERS:
            parts.insert(0, rest.pop())
        return ["+".join([head, *rest]), *parts]
    return [head, *rest]


def _parse_modifier(text: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    name, *options = text.split(":")
    if name not in MODIFIERS:
        raise UnknownName("model modifier", name, MODIFIERS)
    pairs = []
    for option in options:
        key, equals, value = option.partition("=")
        if not (equals and key and value):
            raise ConfigError(f"model modifier {text!r}: write options as name=value")
        pairs.append((key, value))
    return name, tuple(pairs)


def _split_source(base: str) -> tuple[str, str, str | None]:
    prefix, colon, name = base.partition(":")
    if colon:
        if prefix not in PREFIXES:
            raise UnknownName("model source", prefix, PREFIXES)
        if not name:
            raise ConfigError(f"model {base!r}: a name must follow {prefix}:")
        return prefix, name, None
    path = Path(base).expanduser()
    if path.is_dir():
        return "local", str(path), None
    if base.startswith((".", "/", "~")) or base.endswith("/") or len(path.parts) > 2:
        raise ConfigError(f"model directory {base!r} does not exist")
    name, _, revision = base.partition("@")
    if not _HUB_ID.match(name):
        raise ConfigError(f"model {base!r} is neither a directory nor a hub id (organisation/name)")
    # A name without an organisation may be one that a plugin registered: the registry decides.
    return ("hub" if "/" in name else "plugin"), name, revision or None
