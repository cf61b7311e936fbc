"""What the installed plugins say about their methods, read without importing them here.

Importing every plugin imports torch: seconds, and half a gigabyte that a server would keep. So a process of
its own does it (``python -m harness_dashboard.method_catalogue``) and answers in JSON; what is broken there
cannot break the pages.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from harness.errors import PluginError

__all__ = [
    "Broken",
    "Catalogue",
    "MethodCard",
    "Option",
    "card_parts",
    "describe_installed",
    "read_catalogue",
]

_TIMEOUT_S = 120.0
_LAST_LINES = 5
_ARXIV = re.compile(r"(?:[a-z-]+(?:\.[A-Z]{2})?/\d{7}|\d{4}\.\d{4,5})(?:v\d+)?")
_PART = re.compile(r"^(Paper|Changes|Needs|Knobs|Hurts): ", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Option:
    """One knob of a method, as text."""

    name: str
    type: str
    range: str
    default: str
    aliases: str
    meaning: str


@dataclass(frozen=True, slots=True)
class MethodCard:
    """What a plugin says about one method; `needs` is None where they depend on the options."""

    name: str
    family: str
    claim: str
    card: str
    paper: str = ""
    arxiv: str | None = None
    needs: tuple[str, ...] | None = ()
    options: tuple[Option, ...] = ()


@dataclass(frozen=True, slots=True)
class Broken:
    """A plugin that could not be loaded."""

    name: str
    error: str


@dataclass(frozen=True)
class Catalogue:
    """The methods of this installation by name, and the plugins that are broken."""

    methods: Mapping[str, MethodCard] = field(default_factory=dict)
    broken: tuple[Broken, ...] = ()


def card_parts(card: str) -> list[tuple[str, str]]:
    """A card in its parts: the claim (without a title), then what begins with ``Paper:``, ``Changes:``, ...

    >>> card_parts("It helps.\\n\\nNeeds: nothing.\\n\\nHurts: never.")
    [('', 'It helps.'), ('Needs', 'nothing.'), ('Hurts', 'never.')]
    """
    pieces = _PART.split(card)
    titled = zip(pieces[1::2], pieces[2::2], strict=True)
    return [(title, text.strip()) for title, text in [("", pieces[0]), *titled] if text.strip()]


def read_catalogue(timeout_s: float = _TIMEOUT_S) -> Catalogue:
    """Ask a process of its own; takes seconds, so keep the answer.

    Raises:
        PluginError: the process failed, did not end in time, or did not answer.
    """
    command = [sys.executable, "-m", "harness_dashboard.method_catalogue"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise PluginError(
            f"loading the plugins took longer than {timeout_s:g} s; see harness plugins"
        ) from None
    except OSError as error:
        raise PluginError(f"the plugins cannot be loaded: {error.strerror}") from error
    if done.returncode:
        said = " ".join(done.stderr.strip().splitlines()[-_LAST_LINES:])
        raise PluginError(f"loading the plugins failed (exit code {done.returncode}): {said}")
    return _catalogue(json.loads(done.stdout))


def _catalogue(answer: Mapping[str, Any]) -> Catalogue:
    methods = {}
    for row in answer["methods"]:
        needs = None if row["needs"] is None else tuple(row["needs"])
        options = tuple(Option(**option) for option in row["options"])
        methods[row["name"]] = MethodCard(**{**row, "needs": needs, "options": options})
    return Catalogue(methods, tuple(Broken(**row) for row in answer["broken"]))


# --- in the other process -------------------------------------------------------------------------


def describe_installed() -> dict[str, Any]:
    """The methods and the broken plugins of this installation, as JSON values; imports all plugins."""
    from harness.plugins import load_plugins

    loaded = load_plugins()
    return {
        "methods": [asdict(_described(method)) for method in loaded.methods.values()],
        "broken": [asdict(Broken(each.name, each.error or "")) for each in loaded.broken],
    }


def _described(method: Any) -> MethodCard:
    arxiv = getattr(method.paper, "arxiv", None)
    return MethodCard(
        name=method.name,
        family=method.family,
        claim=method.claim,
        card=method.card,
        paper="" if method.paper is None else str(method.paper),
        arxiv=arxiv if arxiv and _ARXIV.fullmatch(arxiv) else None,
        needs=None if callable(method.needs) else tuple(sorted(method.needs)),
        options=tuple(_options(method.options)),
    )


def _options(options: Any) -> Iterator[Option]:
    from harness.method import COMMON_ALIASES

    schema = options.model_json_schema()
    aliases: dict[str, list[str]] = {}
    for alias, name in {**COMMON_ALIASES, **options.aliases}.items():
        # A name that the class has itself is no alias of another.
        if alias not in options.model_fields:
            aliases.setdefault(name, []).append(alias)
    for name, described in schema.get("properties", {}).items():
        has_default = "default" in described
        yield Option(
            name=name,
            type=" or ".join(_types(described, schema)),
            range="; ".join(_ranges(described, schema)),
            default=_plain(described["default"]) if has_default else "must be given",
            aliases=", ".join(aliases.get(name, [])),
            meaning=str(described.get("description", "")),
        )


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def _branches(described: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The alternatives of a field, references followed."""
    if "$ref" in described:
        name = str(described["$ref"]).rpartition("/")[2]
        yield from _branches(schema.get("$defs", {}).get(name, {}), schema)
    elif "anyOf" in described or "oneOf" in described:
        for each in described.get("anyOf") or described["oneOf"]:
            yield from _branches(each, schema)
    else:
        yield described


def _types(described: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterable[str]:
    found = []
    for branch in _branches(described, schema):
        name = str(branch.get("type", "any"))
        if name == "array":
            name = f"list of {' or '.join(_types(branch.get('items', {}), schema))}"
        found.append({"null": "none", "string": "text"}.get(name, name))
    return dict.fromkeys(found)


def _ranges(described: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[str]:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    for branch in _branches(described, schema):
        if "enum" in branch:
            yield ", ".join(str(value) for value in branch["enum"])
        elif "const" in branch:
            yield str(branch["const"])
        elif limits := [f"{sign} {branch[key]:g}" for key, sign in signs.items() if key in branch]:
            yield " and ".join(limits)


def _main() -> None:
    # Whatever a plugin prints must not get into the answer.
    with contextlib.redirect_stdout(sys.stderr):
        answer = describe_installed()
    print(json.dumps(answer))


if __name__ == "__main__":
    _main()
