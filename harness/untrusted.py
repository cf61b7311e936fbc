"""Texts that others wrote, made safe for a terminal and for a spreadsheet. Pure.

Names, reasons and logs of a store come from anywhere. A terminal obeys control characters, a spreadsheet runs
what looks like a formula.
"""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["clean", "spreadsheet_cell"]

# Beside the control characters: lone surrogates, which no encoding has, the separators that a terminal may
# take for the end of a line, and what turns the direction of writing, so that a text reads as another.
_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # some spreadsheets read the wide forms too
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?%?")


def clean(text: str) -> str:
    """The text on one line, without what a terminal would obey.

    >>> clean("a\\nb\\x1b[31mred")
    'a b�[31mred'
    """
    return _CONTROL.sub("�", text.replace("\n", " ").replace("\t", " "))


def spreadsheet_cell(value: Any) -> Any:
    """A value for a cell of a CSV file: numbers stay numbers, and no text is a formula.

    A text that begins like a formula gets an apostrophe, which spreadsheets take for "this is text".

    >>> spreadsheet_cell(-1.5), spreadsheet_cell("-1.5"), spreadsheet_cell("=1+1"), spreadsheet_cell("-x")
    (-1.5, '-1.5', "'=1+1", "'-x")
    """
    if isinstance(value, (dict, list, tuple)):
        value = json.dumps(value, separators=(",", ":"))
    if not isinstance(value, str):
        return value
    text = clean(value)
    if text.lstrip(" �").startswith(_FORMULA) and not _NUMBER.fullmatch(text):
        return "'" + text
    return text
