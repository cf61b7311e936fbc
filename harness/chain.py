"""The written form of methods: ``gptq:bits=3:group_size=64``, chains ``smoothquant+gptq``, lists.

Pure: names and options are checked against the methods that are passed in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from harness.errors import ConfigError, UnknownName
from harness.method import Method, Options

__all__ = ["Chain", "Step", "parse_chain", "split_list", "split_optional"]

_OPEN, _CLOSE = "[{(", "]})"
_MEANS_SOMETHING = frozenset(',:+="' + _OPEN + _CLOSE)  # a text with one of these is written in quotes


@dataclass(frozen=True)
class Step:
    """One method with its options."""

    method: Method
    options: Options

    @property
    def label(self) -> str:
        """The shortest text that parses to this step."""
        options = "".join(f":{name}={_written(value)}" for name, value in self.options.non_default().items())
        return self.method.name + options

    def identity(self) -> dict[str, Any]:
        """What decides what the step does."""
        identity: dict[str, Any] = {
            "method": self.method.name,
            "options": self.options.canonical(),
            "source": self.method.source_hash,
        }
        if inputs := self.method.inputs_of(self.options):
            identity["inputs"] = inputs
        return identity


@dataclass(frozen=True)
class Chain:
    """Methods applied in order."""

    steps: tuple[Step, ...]

    @property
    def label(self) -> str:
        return "+".join(step.label for step in self.steps)

    @property
    def is_baseline(self) -> bool:
        return all(step.method.family == "baseline" for step in self.steps)

    def ends_with(self, position: int) -> bool:
        """Whether nothing follows the step at a position but the baseline, which changes nothing.

        A method that only prepares (smoothing) leaves the rest to what follows, and that must do it.
        """
        return all(step.method.family == "baseline" for step in self.steps[position + 1 :])

    @property
    def family(self) -> str:
        """The family of the last step that is not the baseline."""
        families = [step.method.family for step in self.steps if step.method.family != "baseline"]
        return families[-1] if families else "baseline"

    def identity(self) -> list[dict[str, Any]]:
        return [step.identity() for step in self.steps]

    def described(self) -> list[dict[str, Any]]:
        """Names and all options, for the store."""
        return [{"name": step.method.name, "options": step.options.canonical()} for step in self.steps]

    def needs(self) -> frozenset[str]:
        return frozenset().union(*(step.method.needs_of(step.options) for step in self.steps))


def split_list(text: str, separator: str = ",") -> list[str]:
    """Split at a separator that is not inside brackets or double quotes; empty parts are dropped.

    >>> split_list("gptq:bits=3,distilbert:layer_map=[0,2]")
    ['gptq:bits=3', 'distilbert:layer_map=[0,2]']
    """
    parts, depth, start, quoted, escaped = [], 0, 0, False, False
    for place, character in enumerate(text):
        if quoted:
            quoted = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            quoted = True
        elif character == separator and depth == 0:
            parts.append(text[start:place])
            start = place + 1
        else:
            # A bracket that closes nothing must not keep the rest of the list together.
            depth = max(0, depth + (character in _OPEN) - (character in _CLOSE))
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def split_optional(text: str | None) -> list[str] | None:
    """`split_list` of an option that may be left out."""
    return None if text is None else split_list(text)


def parse_chain(text: str, methods: Mapping[str, Method]) -> Chain:
    """Parse ``method[:option=value...][+method...]``.

    Raises:
        UnknownName: a method that is not registered (with near matches).
        ConfigError: an unknown option, a value out of range, or a malformed text.
    """
    parts = split_list(text, "+")
    if not parts:
        raise ConfigError("a method is empty; write a name such as gptq or smoothquant+gptq")
    if text.strip().startswith("+") or text.strip().endswith("+"):
        raise ConfigError(f"method {text!r}: a name is missing beside the plus sign")
    return Chain(tuple(_parse_step(part, methods) for part in parts))


def _parse_step(text: str, methods: Mapping[str, Method]) -> Step:
    name, *written = split_list(text, ":") or [""]
    if not name:
        raise ConfigError(f"method {text!r}: a name is missing before the colon")
    if name not in methods:
        raise UnknownName("method", name, methods)
    values: dict[str, Any] = {}
    for part in written:
        option, equals, value = part.partition("=")
        option = option.strip()
        if not (equals and option):
            raise ConfigError(f"{name}: write options as name=value, not {part!r}")
        if option in values:
            raise ConfigError(f"{name}: option {option!r} is given twice")
        value = value.strip()
        is_choice = _is_choice(methods[name].options, option, value)
        values[option] = value if is_choice else _read(value, name, option)
    return Step(methods[name], methods[name].options.parse(values, method=name))


def _is_choice(options: type[Options], option: str, value: str) -> bool:
    """Whether a word such as none is one of the choices of an option, and not the absence of a value."""
    field = options.model_fields.get(option)
    return (
        field is not None and get_origin(field.annotation) is Literal and value in get_args(field.annotation)
    )


def _read(value: str, method: str, option: str) -> Any:
    """Numbers, true, false, null, quoted texts and bracketed lists are JSON; all else is a text."""
    if value.lower() in ("none", "null"):
        return None
    try:
        return json.loads(value.lower() if value.lower() in ("true", "false") else value)
    except json.JSONDecodeError as error:
        if value[:1] in ("[", "{", '"'):
            raise ConfigError(f"{method}: option {option} is no JSON: {error}") from None
        return value
    except (ValueError, RecursionError):  # an integer of thousands of digits; thousands of brackets
        raise ConfigError(f"{method}: option {option} is too long to be a value") from None


def _written(value: Any) -> str:
    """The shortest text that `_read` reads as this value, whatever stands around it in a chain."""
    if isinstance(value, str):
        plain = (
            value == value.strip()
            and value.isprintable()
            and not set(value) & _MEANS_SOMETHING
            and not _is_json(value)
        )
        return value if plain else json.dumps(value)
    # A plus sign would part the chain: 1e+16 is written 1e16.
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("e+", "e") if isinstance(value, float) else text


def _is_json(text: str) -> bool:
    """Whether `_read` would take a text for a number, a truth value or nothing at all."""
    if not text or text.lower() in ("none", "null", "true", "false"):
        return True
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):
        return True
    return True
