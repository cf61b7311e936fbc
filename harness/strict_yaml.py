"""Reading a YAML file that holds settings: bounded, without surprises.

YAML as such lets a file say one name twice (the last one wins in silence), build objects, refer to itself and
grow to any size in memory. A file of settings needs none of that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from harness.errors import ConfigError

__all__ = ["read_mapping"]

LARGEST_FILE_BYTES = 1_000_000
MOST_ALIASES = 100


def read_mapping(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        ConfigError: no such file, unreadable, too large, not YAML, a name given twice, no mapping.
    """
    what = f"the configuration file {file}"
    try:
        with file.open("rb") as opened:
            data = opened.read(LARGEST_FILE_BYTES + 1)  # not all of /dev/zero
        text = data.decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{what} does not exist") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{what} cannot be read: it is no text in UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{what} cannot be read: {reason}") from None
    if len(data) > LARGEST_FILE_BYTES:
        raise ConfigError(f"{what} is larger than {LARGEST_FILE_BYTES:,} bytes")
    try:
        content = yaml.load(text, _Loader)  # a safe loader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark is not None else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "malformed"
        raise ConfigError(f"{what} is not YAML{where}: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{what} is nested too deeply") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        # What PyYAML's own constructors raise for a date of month 13 or a tag such as `!!int ""`.
        raise ConfigError(f"{what} holds a value that is not what it says to be") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{what} must hold a mapping of option names")
    return {str(name): value for name, value in content.items()}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader (plain values only) that refuses doubled names and hordes of aliases."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > MOST_ALIASES:
                raise yaml.MarkedYAMLError(None, None, f"more than {MOST_ALIASES} aliases")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            name = str(key.value)
            if name in seen:
                raise yaml.MarkedYAMLError(None, None, f"{name!r} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep=deep)
