"""Reading an exported file: every value is checked before anything is written to a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.errors import ConfigError
from harness.store.exchange_layout import FORMAT, ROOTS, VERSION, Section, sections
from harness.store.exchange_rows import Row, sweep_identity
from harness.store.exchange_text import problem, read_lines

__all__ = ["Contents", "RowReader", "read_results"]

_UPGRADE = "upgrade: pip install --upgrade transformer-harness"


@dataclass
class Contents:
    """A file's rows, checked: `machines` and `sweeps` in order (they are referred to by number)."""

    file: Path
    machines: list[Row] = field(default_factory=list)
    sweeps: list[Row] = field(default_factory=list)
    variants: list[Row] = field(default_factory=list)
    identities: list[str] = field(default_factory=list)

    @property
    def measuring_versions(self) -> tuple[int, ...]:
        versions = {row.values["manifest"].get("measuring_version") for row in self.sweeps}
        return tuple(sorted(version for version in versions if isinstance(version, int)))


def read_results(file: Path) -> Contents:
    """Read and check a whole file.

    Raises:
        ConfigError: in one line that names the file's line: not such a file, of another version, a
            value of the wrong type or range, a reference to nothing, the same thing twice.
    """
    reader = RowReader(file)
    for number, value in read_lines(file):
        reader.take(number, value)
    reader.end()
    return reader.contents


class RowReader:
    """Takes the lines of a file, or rows that were made from another form of results, and checks each.

    Args:
        is_text: the numbers given are those of the file's lines, so messages name them.
    """

    def __init__(self, file: Path, *, is_text: bool = True) -> None:
        self.contents = Contents(file)
        self._is_text, self._lines = is_text, 0
        self._header_seen = False
        self._columns: dict[str, Sequence[str]] = {}
        self._last: dict[str, Row] = {}  # the row of each section that is open now
        self._cells_seen: dict[tuple[int, str], int] = {}
        self._unique: dict[tuple[Any, ...], int] = {}

    def put(self, value: Any) -> None:
        """Take a value that stands on no line of its own."""
        self.take(self._lines + 1, value)

    def take(self, number: int, value: Any) -> None:
        """Take one line: the header, the columns of a table, or a row.

        Raises:
            ConfigError: as `read_results`.
        """
        self._lines = number
        if not self._header_seen:
            self._header(number, value)
        elif isinstance(value, dict):
            self._declaration(number, value)
        elif isinstance(value, list) and value and isinstance(value[0], str):
            self._row(number, value[0], value[1:])
        else:
            raise self._wrong(number, "neither a table's columns nor a row of one")

    def end(self) -> None:
        """Say that there is no more.

        Raises:
            ConfigError: there was nothing.
        """
        if not self._header_seen:
            raise ConfigError(f"{self.contents.file} is empty, not a {FORMAT} file")

    def _wrong(self, number: int, what: str) -> ConfigError:
        return problem(self.contents.file, number, what) if self._is_text else self._elsewhere(what)

    def _elsewhere(self, what: str) -> ConfigError:
        return ConfigError(f"{self.contents.file}: {what}")

    def _header(self, number: int, value: Any) -> None:
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise self._wrong(number, f'not a {FORMAT} file: it begins with {{"format": "{FORMAT}", ...}}')
        version = value.get("version")
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise self._wrong(number, "the version of the format is missing")
        if version > VERSION:
            raise ConfigError(
                f"{self.contents.file} is of version {version} of the format, this harness reads "
                f"up to {VERSION}; {_UPGRADE}"
            )
        self._header_seen = True

    def _declaration(self, number: int, value: Mapping[str, Any]) -> None:
        name, columns = value.get("table"), value.get("columns")
        is_list = isinstance(columns, list) and all(isinstance(column, str) for column in columns)
        if not isinstance(name, str) or not is_list or len(value) != 2:
            raise self._wrong(number, 'expected {"table": name, "columns": [names]}')
        if name not in sections():
            raise self._wrong(number, f"the table {name[:100]!r} is unknown to this harness; {_UPGRADE}")
        unknown = [column for column in columns or () if column not in sections()[name].columns]
        if unknown:
            what = f"the column {unknown[0][:100]!r} of {name} is unknown to this harness"
            raise self._wrong(number, f"{what}; {_UPGRADE}")
        if len(set(columns or ())) != len(columns or ()) or name in self._columns:
            raise self._wrong(number, f"the table {name} or a column of it is declared twice")
        self._columns[name] = tuple(columns or ())

    # --- rows -------------------------------------------------------------------------------

    def _row(self, number: int, name: str, values: list[Any]) -> None:
        if name not in self._columns:
            raise self._wrong(number, f"a row of {name[:100]!r}, whose columns were not declared above")
        columns = self._columns[name]
        if len(values) != len(columns):
            raise self._wrong(number, f"a row of {name} with {len(values)} values for {len(columns)} columns")
        section = sections()[name]
        row = Row(
            section, self._checked(number, section, dict(zip(columns, values, strict=True))), line=number
        )
        check = {"machines": self._machine, "sweeps": self._sweep, "cells": self._cell}.get(name)
        if check is not None:
            check(row)
        self._place(row)

    def _checked(self, number: int, section: Section, given: dict[str, Any]) -> dict[str, Any]:
        try:
            return dict(section.row.model_validate(given))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"][:4])
            message = first["msg"].removeprefix("Value error, ")
            raise self._wrong(number, f"{section.name}.{where[:200]}: {message[:300]}") from None
        except RecursionError:
            raise self._wrong(number, f"a row of {section.name} is nested too deep") from None

    def _place(self, row: Row) -> None:
        """Hang the row on the last row of its parent section."""
        section = row.section
        if section.parent is None:
            getattr(self.contents, section.name).append(row)
            self._last = {} if section.name in ROOTS else self._last
            self._last[section.name] = row
            return
        parent = self._last.get(section.parent)
        if parent is None:
            raise self._wrong(row.line, f"a row of {section.name} stands below no row of {section.parent}")
        self._refuse_double(row, parent)
        parent.children.append(row)
        self._last[section.name] = row
        for name, each in sections().items():
            if each.parent == section.name:
                self._last.pop(name, None)

    def _refuse_double(self, row: Row, parent: Row) -> None:
        names = row.section.unique
        if not names:
            return
        key = (row.section.name, parent.line, *(row.values[name] for name in names))
        if key in self._unique:
            what = ", ".join(f"{name} {row.values[name]}" for name in names)
            raise self._wrong(row.line, f"{row.section.name}: {what} was on line {self._unique[key]} already")
        self._unique[key] = row.line

    def _machine(self, row: Row) -> None:
        if any(row.values == other.values for other in self.contents.machines):
            raise self._wrong(row.line, "the same machine twice")

    def _sweep(self, row: Row) -> None:
        self._refers(row, "machine", [row.values["machine"]], self.contents.machines)
        facts = self.contents.machines[row.values["machine"] - 1].values["facts"]
        identity = sweep_identity(facts, row.values)
        if identity in self.contents.identities:
            raise self._wrong(row.line, "the same sweep twice")
        self.contents.identities.append(identity)

    def _cell(self, row: Row) -> None:
        values = row.values
        self._refers(row, "sweep", [values["sweep"], *values["used_by"]], self.contents.sweeps)
        named = {"task": values["task"], "scenario": values["scenario"]}
        expected = {values["kind"]} & set(named)
        if {name for name, value in named.items() if value is not None} != expected:
            wants = f"a {values['kind']}" if expected else "neither task nor scenario"
            raise self._wrong(row.line, f"a {values['kind']} cell must name {wants} only")
        key = (values["sweep"], values["key"])
        if key in self._cells_seen:
            raise self._wrong(row.line, f"the cell of line {self._cells_seen[key]} again")
        self._cells_seen[key] = row.line

    def _refers(self, row: Row, what: str, numbers: Sequence[int], rows: Sequence[Row]) -> None:
        for number in numbers:
            if number > len(rows):
                raise self._wrong(row.line, f"{row.section.name}: there is no {what} {number} above")
