"""Taking out of texts what must not be kept or passed on: passwords, paths, names of machines."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["in_texts", "without_identity", "without_passwords"]

# Up to the last @, so that a password that should have been percent-encoded is hidden whole.
_URL_PASSWORD = re.compile(r"(?P<head>\b[\w+.-]+://[^\s:/@?#]*):\S*@")
_WEB_USER = re.compile(r"(?P<head>\bhttps?://)[^\s:/@?#]+@")  # a token, as a rule
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_NAMED_PASSWORD = re.compile(r"(?P<name>\b(?:password|passwd|pwd)=)[^\s&'\"]+", re.IGNORECASE)
_HOMES = "home|root|Users|tmp|mnt|media|scratch"
_OF_USERS = ("home", "Users")
# A path from the root or from a home directory, of at least two parts: not the end of an address or of
# a relative path, but behind an option's letter (-I/home/me) where it begins like a home.
_PATH = re.compile(
    rf"(?:file://)?(?:(?<![\w.:/~>])(?:~[\w.-]*)?|(?<=:)(?!//)|(?=/(?:{_HOMES})/))"
    r"(?:/[\w.+@%=~-]+)+/?"
)
_SHORTEST_NAME = 4  # a machine called "vm" would be found in many a text


def without_passwords(text: str) -> str:
    """The text with the passwords of URLs hidden, and tokens of the hub and of web addresses.

    >>> without_passwords("harness sweep --db postgresql://me:secret@host/results")
    'harness sweep --db postgresql://me:***@host/results'
    """
    text = _URL_PASSWORD.sub(r"\g<head>:***@", text)
    text = _HUB_TOKEN.sub("hf_***", _WEB_USER.sub(r"\g<head>***@", text))
    return _NAMED_PASSWORD.sub(r"\g<name>***", text)


def in_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every text in it changed, the names of its entries included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(name): in_texts(each, change) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [in_texts(each, change) for each in value]
    return value


def without_identity(text: str, names: Sequence[str] = ()) -> str:
    """The text without passwords, absolute paths and these names of machines.

    The last part of a path stays, unless it is a home directory and so names its user.
    Doing it twice changes nothing more.

    >>> without_identity("gpu-box-7 cannot read /home/me/models/x.bin", ["gpu-box-7"])
    '<host> cannot read <path>/x.bin'
    """
    text = without_passwords(text)
    if "/" in text:
        text = _PATH.sub(_last_part, text)
    for name in names:
        if len(name) >= _SHORTEST_NAME:
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", "<host>", text)
    return text


def _last_part(match: re.Match[str]) -> str:
    parts = [part for part in match.group().removeprefix("file://").split("/") if part]
    if len(parts) < 2:
        return match.group()  # "/x" alone names no place
    # Of a home directory itself, the last part is the name of its user.
    return "<path>" if len(parts) == 2 and parts[0] in _OF_USERS else f"<path>/{parts[-1]}"
