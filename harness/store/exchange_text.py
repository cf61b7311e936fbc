"""The text of an exported file: JSON Lines, gzipped where the name ends in ``.gz``.

::

    {"format": "harness results", "version": 1, "made_by": "transformer-harness 0.1.0", ...}
    {"table": "records", "columns": ["metric", "value", "unit", ...]}     one line a section
    ["records", "decode_latency", 0.0083, "s", ...]                       one line a row

What is read may come from anyone: nothing is trusted to be small, shallow, complete or well-formed.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from harness.errors import ConfigError
from harness.folders import replacing
from harness.store.encoding import untagged
from harness.store.exchange_layout import MAX_DEPTH

__all__ = [
    "MAX_CHARACTERS",
    "MAX_LINE",
    "is_store",
    "parsed_json",
    "problem",
    "read_lines",
    "write_lines",
]

MAX_LINE = 16 << 20
MAX_CHARACTERS = 1 << 30
"""How long a line, and how much text a file may hold: an archive of a few bytes can unpack to any size."""

_SQLITE = b"SQLite format 3\0"


def problem(file: Path, line: int, what: str) -> ConfigError:
    """The error for one line of a file."""
    return ConfigError(f"{file}, line {line}: {what}")


# --- writing ----------------------------------------------------------------------------------


def write_lines(file: Path, lines: Iterable[str]) -> int:
    """Write the lines beside the file and rename them into place; returns the bytes written.

    Raises:
        ConfigError: the folder is missing or not writable, or the file is a results store.
    """
    try:
        if file.is_dir():
            raise ConfigError(f"{file} is a directory, not a file to write to")
        if file.is_file() and is_store(file):
            raise ConfigError(f"{file} is a results store; name another file for the exported text")
        with replacing(file) as raw, _packed(raw, file) as target:
            for line in lines:
                target.write(line.encode() + b"\n")
        return file.stat().st_size
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror or error}") from None


def is_store(file: Path) -> bool:
    """Whether an existing file is a results store, which no text may replace."""
    with file.open("rb") as opened:
        return opened.read(len(_SQLITE)) == _SQLITE


@contextlib.contextmanager
def _packed(raw: IO[bytes], file: Path) -> Iterator[IO[bytes]]:
    if file.suffix != ".gz":
        yield raw
        return
    # Neither a name nor a time in it: the same rows are the same bytes.
    with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
        yield cast("IO[bytes]", packed)


# --- reading ----------------------------------------------------------------------------------


def read_lines(file: Path, *, with_nan: bool = False) -> Iterator[tuple[int, Any]]:
    """The JSON value of each line with its number; empty lines are passed over.

    Args:
        with_nan: take ``NaN`` and ``Infinity``, which are no JSON but what Python writes.

    Raises:
        ConfigError: in one line, with the line's number: not text, not JSON, too long, too deep.
    """
    number = 0
    try:
        with (gzip.open if file.suffix == ".gz" else open)(
            file, "rt", encoding="utf-8", newline="\n"
        ) as opened:
            total = 0
            while line := opened.readline(MAX_LINE + 1):
                number += 1
                total += len(line)
                if len(line) > MAX_LINE:
                    raise problem(file, number, f"longer than {MAX_LINE:,} characters")
                if total > MAX_CHARACTERS:
                    raise problem(file, number, f"the file holds more than {MAX_CHARACTERS:,} characters")
                if line.strip():
                    yield number, parsed_json(file, number, line, with_nan=with_nan)
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist") from None
    except UnicodeDecodeError:
        raise problem(file, number + 1, "not text in UTF-8") from None
    except (gzip.BadGzipFile, zlib.error, EOFError):
        raise ConfigError(f"{file} is no gzip file, or a damaged one") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}") from None


def parsed_json(file: Path, number: int, line: str, *, with_nan: bool = False) -> Any:
    """The value of a text in JSON.

    Raises:
        ConfigError: not JSON, nested too deep, a name twice in one object, a number out of range.
    """
    constant = float if with_nan else _no_constant
    try:
        value = json.loads(line, object_pairs_hook=_object, parse_constant=constant, parse_float=_finite)
        if line.count("[") + line.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
            raise RecursionError
        return value
    except RecursionError:
        raise problem(file, number, f"nested more than {MAX_DEPTH} deep") from None
    except json.JSONDecodeError as error:
        raise problem(file, number, f"not JSON ({error.msg} at character {error.pos + 1})") from None
    except ValueError as error:
        raise problem(file, number, str(error).splitlines()[0]) from None


def _object(pairs: list[tuple[str, Any]]) -> Any:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return untagged(value)


def _no_constant(name: str) -> float:
    raise ValueError(f'{name} is not JSON; write {{"$float": "nan"}}, "inf" or "-inf"')


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:40]} is too large for a number")
    return value


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 0
