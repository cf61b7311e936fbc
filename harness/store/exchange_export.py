"""Writing a store's results to a text file: small, in a fixed order, without what names a person."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import JSON, Connection, Text, select

import harness
from harness.errors import ConfigError, UnknownName
from harness.privacy import in_texts, without_identity, without_passwords
from harness.store.chunks import chunks
from harness.store.encoding import CleanText, dump_json
from harness.store.exchange_layout import FORMAT, OPTIONAL, VERSION, Section, sections
from harness.store.exchange_rows import Row, original_key, sweep_identity, variant_digest
from harness.store.exchange_text import write_lines
from harness.store.selection import current, narrowed, sweep_number
from harness.store.store import Store
from harness.store.tables import cells, machines, sweep_cells, sweeps, variants

__all__ = ["ExportTree", "Exported", "Wanted", "export_results", "read_tree"]

_NOT_EXPORTED = ("traceback", "log_tail")  # of cells: they quote paths, names and anything else
_STORE_OPTION = re.compile(r"\s--db[=\s]\s*\S+")
# Of manifests; the names of a rented machine's system tell where it was rented.
_NAMING = ("command", "hostname", "host", "user", "cwd", "home", "os", "kernel")
_UNIQUE = re.compile(r"uuid|serial", re.IGNORECASE)


@dataclass(frozen=True)
class Wanted:
    """Which cells are exported; None means all, as in `harness.store.queries.results`."""

    sweep: int | Literal["last"] | None = None
    models: Sequence[str] | None = None
    methods: Sequence[str] | None = None
    tasks: Sequence[str] | None = None
    scenarios: Sequence[str] | None = None
    statuses: Sequence[str] | None = None


@dataclass(frozen=True)
class Exported:
    """What a file holds: the number of rows by section, and its size."""

    rows: Mapping[str, int]
    file_bytes: int


def export_results(
    store: Store,
    file: Path,
    wanted: Wanted,
    *,
    leave_out: Collection[str] = (),
    with_host: bool = False,
) -> Exported:
    """Write the cells that are wanted, with all that explains them, to a file.

    Args:
        leave_out: sections to leave out, of `OPTIONAL`.
        with_host: keep host names, commands, paths, tracebacks and logs.

    Raises:
        ConfigError: nothing is wanted, or the file cannot be written.
        UnknownName: no such sweep, or nothing of that name can be left out.
        StoreError: the store cannot be read.
    """
    tree = read_tree(store, wanted, leave_out, with_host=with_host)
    if not tree.variants:
        raise ConfigError(f"nothing to export: no cell in {store.label} is wanted")
    rows = [*tree.machines, *tree.sweeps, *tree.variants]
    counts = Counter(row.section.name for root in rows for row in root.walk())
    size = write_lines(file, _lines(rows, tree.sweeps, leave_out))
    return Exported(counts, size)


def read_tree(
    store: Store, wanted: Wanted, leave_out: Collection[str] = (), *, with_host: bool = False
) -> ExportTree:
    """The rows that are wanted, without the sections that are left out.

    Raises:
        UnknownName: no such sweep, or nothing of that name can be left out.
        StoreError: the store cannot be read.
    """
    for name in leave_out:
        if name not in OPTIONAL:
            raise UnknownName("section", name, OPTIONAL)
    with store.reading() as connection:
        return ExportTree(connection, wanted, frozenset(leave_out), with_host)


def _lines(rows: Iterable[Row], sweep_rows: Iterable[Row], leave_out: Collection[str]) -> Iterator[str]:
    versions = {row.values["manifest"].get("measuring_version") for row in sweep_rows}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "made_by": f"transformer-harness {harness.__version__}",
        "measuring_versions": sorted(version for version in versions if isinstance(version, int)),
        "left_out": sorted(leave_out),
    }
    yield dump_json(header)
    for section in sections().values():
        if section.name not in leave_out:
            yield dump_json({"table": section.name, "columns": section.columns})
    for root in rows:
        for row in root.walk():
            yield row.line_of()


class ExportTree:
    """The rows that are wanted, read from one connection and brought into their order.

    `machines`, `sweeps` and `variants` are the roots; a sweep names its machine and a cell its sweeps by
    their number among them, from 1.
    """

    def __init__(
        self, connection: Connection, wanted: Wanted, leave_out: frozenset[str], with_host: bool
    ) -> None:
        self._connection, self._leave_out, self._with_host = connection, leave_out, with_host
        self._hosts: tuple[str, ...] = ()  # what no text may say
        self._known_changes: dict[str, list[tuple[str, Callable[[str], str]]]] = {}
        found = _wanted_cells(connection, wanted)
        measured = {cell["sweep_id"] for cell in found}
        asked = sweep_number(connection, wanted.sweep)
        self.machines, self.sweeps, numbers = self._read_sweeps(measured | {asked})
        self.variants = self._read_variants(found, numbers)

    # --- sweeps and machines ----------------------------------------------------------------

    def _read_sweeps(self, ids: set[int | None]) -> tuple[list[Row], list[Row], dict[int, int]]:
        about = {row["id"]: row["facts"] for row in self._rows(select(machines))}
        found = [row for row in self._rows(select(sweeps)) if row["id"] in ids]
        kinds = sections()
        hosts = {row["manifest"].get("hostname") for row in found}
        self._hosts = tuple(sorted((host for host in hosts if isinstance(host, str)), key=len, reverse=True))
        identities = {row["id"]: sweep_identity(about[row["machine_id"]], row) for row in found}
        found.sort(key=lambda row: (row["started_at"], identities[row["id"]]))
        places: dict[str, int] = {}
        machine_rows, sweep_rows = [], []
        for row in found:
            facts = about[row["machine_id"]]
            text = dump_json(facts)
            if text not in places:
                places[text] = len(places) + 1
                machine_rows.append(Row(kinds["machines"], {"facts": in_texts(facts, without_identity)}))
            values = self._own(kinds["sweeps"], row)
            if not self._with_host:
                values["command"] = _STORE_OPTION.sub("", values["command"])
            for name in ("manifest", "manifest_end"):
                values[name] = self._manifest(values[name])
            sweep_rows.append(Row(kinds["sweeps"], {"machine": places[text], **values}))
        return machine_rows, sweep_rows, {row["id"]: n for n, row in enumerate(found, start=1)}

    # --- variants and cells -----------------------------------------------------------------

    def _read_variants(self, found: list[dict[str, Any]], numbers: Mapping[int, int]) -> list[Row]:
        """Variants without any difference become one, whether they were measured here or imported."""
        ids = sorted({cell["variant_id"] for cell in found})
        section = sections()["variants"]
        by_id: dict[int, Row] = {}
        for stored in self._by_ids(section, "id", ids):
            values = self._own(section, stored)
            by_id[stored["id"]] = Row(section, {**values, "key": original_key(stored["key"])})
        self._hang_below(section, by_id)
        by_digest: dict[str, Row] = {}
        for id_, variant in list(by_id.items()):
            by_id[id_] = by_digest.setdefault(variant_digest(variant), variant)
        of_variant: dict[int, list[Row]] = {}
        for cell, row in zip(found, self._read_cells(found, numbers), strict=True):
            of_variant.setdefault(id(by_id[cell["variant_id"]]), []).append(row)
        for variant in by_digest.values():
            variant.children += sorted(of_variant[id(variant)], key=_cell_order)
        names = ("model", "method", "seed", "dtype", "device_name", "key")
        ordered = sorted(by_digest.items(), key=lambda e: (*(e[1].values[n] for n in names), e[0]))
        return [row for _, row in ordered]

    def _read_cells(self, found: list[dict[str, Any]], numbers: Mapping[int, int]) -> list[Row]:
        section = sections()["cells"]
        links: dict[int, list[int]] = {}
        for link in self._by_ids_of(sweep_cells, "cell_id", [cell["id"] for cell in found]):
            if link["sweep_id"] in numbers:
                links.setdefault(link["cell_id"], []).append(numbers[link["sweep_id"]])
        by_id = {}
        for cell in found:
            values = self._own(section, cell)
            if not self._with_host:
                values |= dict.fromkeys(_NOT_EXPORTED)
            measured_by = numbers[cell["sweep_id"]]
            used_by = sorted(set(links.get(cell["id"], [])) - {measured_by})
            values |= {"sweep": measured_by, "used_by": used_by, "key": original_key(cell["key"])}
            by_id[cell["id"]] = Row(section, values)
        self._hang_below(section, by_id)
        return list(by_id.values())

    def _hang_below(self, parent: Section, by_id: Mapping[int, Row]) -> None:
        """Read what hangs on rows, and what hangs on that, in the order of the tables."""
        for section in sections().values():
            if section.parent != parent.name or section.name in ("cells", *self._leave_out):
                continue
            assert section.link is not None
            inner = {}
            for values in self._by_ids(section, section.link, list(by_id)):
                row = Row(section, self._own(section, values))
                by_id[values[section.link]].children.append(row)
                if section.has_id:
                    inner[values["id"]] = row
            if inner:
                self._hang_below(section, inner)

    # --- reading ----------------------------------------------------------------------------

    def _own(self, section: Section, row: Mapping[str, Any]) -> dict[str, Any]:
        values = {name: row[name] for name in section.stored}
        for name, change in self._changes(section):
            if section.name == "items" and name == "detail" and "lm_eval" in values[name]:
                continue  # a document of a public data set, which may hold any text, stays as it is
            values[name] = in_texts(values[name], change)
        return values

    def _changes(self, section: Section) -> list[tuple[str, Callable[[str], str]]]:
        """What is done to the texts of each column that can hold any."""
        if section.name not in self._known_changes:
            # A machine may be called like a method or a metric: only sentences are searched for its name.
            prose = partial(without_identity, names=self._hosts)
            found: list[tuple[str, Callable[[str], str]]] = []
            for name in section.stored:
                kind = section.table.c[name].type
                if isinstance(kind, Text | CleanText | JSON):
                    change = prose if isinstance(kind, CleanText) else without_identity
                    found.append((name, without_passwords if self._with_host else change))
            self._known_changes[section.name] = found
        return self._known_changes[section.name]

    def _manifest(self, manifest: dict[str, Any] | None) -> dict[str, Any] | None:
        """Without which process it was and, if asked for, without what names a machine or a person."""
        if manifest is None:
            return None
        left = {name: each for name, each in manifest.items() if name != "process"}
        if self._with_host:
            return left
        named = {name: each for name, each in left.items() if name not in _NAMING}
        if isinstance(named.get("lm_eval"), dict):
            named["lm_eval"] = {name: v for name, v in named["lm_eval"].items() if name != "pretty_env_info"}
        return dict(_without_numbers(named))

    def _rows(self, query: Any) -> list[dict[str, Any]]:
        return [dict(row) for row in self._connection.execute(query).mappings()]

    def _by_ids(self, section: Section, column: str, ids: Sequence[int]) -> list[dict[str, Any]]:
        """Rows in an order that does not depend on the database: by id, or by what makes them unique."""
        rows = self._by_ids_of(section.table, column, ids)
        key = ("id",) if section.has_id else tuple(c.name for c in section.table.primary_key)
        return sorted(rows, key=lambda row: tuple(row[name] for name in key))

    def _by_ids_of(self, table: Any, column: str, ids: Sequence[int]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for chunk in chunks(ids):
            rows += self._rows(select(table).where(table.c[column].in_(chunk)))
        return rows


def _wanted_cells(connection: Connection, wanted: Wanted) -> list[dict[str, Any]]:
    """The cells by id; of a key that a sweep measured twice only the newest."""
    query = narrowed(
        select(cells).join(variants, cells.c.variant_id == variants.c.id),
        models=wanted.models,
        methods=wanted.methods,
        tasks=wanted.tasks,
        scenarios=wanted.scenarios,
        statuses=wanted.statuses,
    )
    query = query.where(current(connection, wanted.sweep)).order_by(cells.c.id)
    newest = {(row["sweep_id"], row["key"]): dict(row) for row in connection.execute(query).mappings()}
    return sorted(newest.values(), key=lambda row: row["id"])


def _cell_order(row: Row) -> tuple[Any, ...]:
    values = row.values
    kinds = ("transform", "scenario", "task")
    scenario = values["scenario"] or ""
    return (
        kinds.index(values["kind"]),
        values["task"] or "",
        [int(number) for number in re.findall(r"\d+", scenario)],
        scenario,
        values["sweep"],
        values["key"],
        values["started_at"],
    )


def _without_numbers(value: Any) -> Any:
    """A JSON value without the entries that are called a serial number or a unique identity."""
    if isinstance(value, dict):
        return {k: _without_numbers(v) for k, v in value.items() if not _UNIQUE.search(k)}
    return [_without_numbers(each) for each in value] if isinstance(value, list) else value
