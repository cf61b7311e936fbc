"""What the two sides of a comparison are: how they are written, and the cells that they mean.

::

    gptq:bits=3            a method, as the results show it
    variant:12             one variant, by its number in `harness results --records`
    sweep:3                all that a sweep asked for; sweep:last, sweep:last~1 (the one before)
    main.db                a store: a path, a URL, a file that `harness results export` wrote,
                           or lm-eval's output
    main.db#sweep:2        a sweep, a method or a variant of another store
    sweep:2#gptq           a method, as one sweep measured it
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import select

from harness.chain import split_list
from harness.comparing.cells import Cell, all_cells
from harness.errors import ConfigError, UnknownName
from harness.records import Status
from harness.store.exchange_sources import is_text, read_source
from harness.store.exchange_text import is_store
from harness.store.store import Store
from harness.store.tables import imports, sweeps

__all__ = ["Side", "SideName", "Stores", "load_side", "other_methods", "parse_side", "parse_sides"]

_SUFFIXES = (".db", ".sqlite", ".sqlite3")
_SWEEP = re.compile(r"^sweep:(?:(\d{1,18})|last(?:~(\d{1,9}))?)$")
_VARIANT = re.compile(r"^variant:(\d{1,18})$")


@dataclass(frozen=True)
class SideName:
    """One side as it was written.

    `store` is None for the store of the call; `sweep` is a number, or ``last`` with how many before it in
    `before`. A side with a `method` or a `variant` is one variant of each model, any other a matrix.
    """

    text: str
    store: str | None = None
    sweep: int | str | None = None
    before: int = 0
    method: str | None = None
    variant: int | None = None

    @property
    def is_matrix(self) -> bool:
        return self.method is None and self.variant is None


@dataclass(frozen=True)
class Side:
    """One side with its cells of every status; sides of equal `scope` come from the same rows."""

    name: SideName
    cells: tuple[Cell, ...]
    scope: tuple[Any, ...]

    @property
    def text(self) -> str:
        return self.name.text

    @property
    def ok(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.is_ok]


def parse_side(text: str) -> SideName:
    """Read one side as it is written (see the module).

    Raises:
        ConfigError: nothing, a part that cannot be read, or two parts of one kind.

    >>> parse_side("main.db#sweep:last~1")
    SideName(text='main.db#sweep:last~1', store='main.db', sweep='last', before=1, method=None, variant=None)
    """
    if _names_store(text):
        return SideName(text, store=text)
    head, _, rest = text.partition("#")
    name = SideName(text)
    if _names_store(head):
        name = replace(name, store=head)
        parts = rest.split("#")
    else:
        parts = text.split("#")
    for part in parts:
        name = _with(name, part)
    return name


def parse_sides(texts: Sequence[str]) -> list[SideName]:
    """Several sides, of which methods may be written in one text with commas between them; each once."""
    single = [
        part
        for text in texts
        for part in ([text] if _names_store(text.partition("#")[0]) else split_list(text))
    ]
    return [parse_side(text) for text in dict.fromkeys(single)]


def _names_store(text: str) -> bool:
    if "://" in text or text.endswith(_SUFFIXES) or is_text(text):
        return True
    try:
        return Path(text).is_file() and is_store(Path(text))
    except (OSError, ValueError):  # a name that no file can have
        return False


def _with(name: SideName, part: str) -> SideName:
    if found := _SWEEP.match(part):
        if name.sweep is not None or not name.is_matrix:
            raise ConfigError(f"{name.text!r}: write the store, then a sweep, then a method")
        number, before = found.groups()
        return replace(name, sweep=int(number) if number else "last", before=int(before or 0))
    if part.startswith("sweep:"):
        raise ConfigError(f"{name.text!r}: write a sweep as sweep:3, sweep:last or sweep:last~1")
    if part.startswith("variant:") and not _VARIANT.match(part):
        raise ConfigError(
            f"{name.text!r}: write a variant as variant:12, with its number in `harness results`"
        )
    if not part.strip() or not name.is_matrix:
        raise ConfigError(
            f"{name.text!r} is no side of a comparison: write a method, variant:12, sweep:3, sweep:last, "
            "a store, or STORE#sweep:3#METHOD"
        )
    if found := _VARIANT.match(part):
        return replace(name, variant=int(found.group(1)))
    return replace(name, method=part)


# --- what they mean -----------------------------------------------------------------------------------


class Stores:
    """The stores of one comparison, each opened once and read-only; a context manager.

    Files of results are read into a store of their own that is gone at the end.
    """

    def __init__(self, default: str) -> None:
        self._default, self._stack = default, ExitStack()
        self._open: dict[str, Store] = {}
        self._cells: dict[tuple[Any, ...], list[Cell]] = {}

    def __enter__(self) -> Stores:
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def of(self, name: SideName) -> Store:
        """The store that a side is in.

        Raises:
            StoreError: missing, empty, not a store, older or newer than this version.
            ConfigError: a file that holds no results.
        """
        target = name.store or self._default
        if target not in self._open:
            place = str(self._imported(Path(target))) if is_text(target) else target
            self._open[target] = self._stack.enter_context(Store.open_readonly(place))
        return self._open[target]

    def cells(self, name: SideName, models: Sequence[str] | None, sweep: int | None) -> list[Cell]:
        """The cells of a side's store, of these models and this sweep; read once for all sides."""
        key = (name.store or self._default, None if models is None else tuple(models), sweep)
        if key not in self._cells:
            self._cells[key] = all_cells(self.of(name), models, sweep)
        return self._cells[key]

    def _imported(self, file: Path) -> Path:
        from harness.store.exchange_import import import_results

        contents = read_source(file)
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="harness-compare-"))
        path = Path(folder) / "results.db"
        with Store.open(path) as store:
            import_results(store, contents)
        return path


def load_side(name: SideName, stores: Stores, models: Sequence[str] | None = None) -> Side:
    """The cells that a side means.

    Raises:
        UnknownName: no such sweep, method or variant in its store.
        StoreError, ConfigError: the store cannot be opened.
    """
    store = stores.of(name)
    sweep = _sweep_number(store, name)
    found = stores.cells(name, models, sweep)
    if name.store is not None and is_text(name.store):
        for cell in found:  # all of it is imported: that is what was asked for
            cell.origin, cell.place = None, (*cell.place[:-1], None)
    scope = (store.label, sweep)
    if name.method is not None:
        kept = [cell for cell in found if cell.method == name.method]
        if not kept:
            raise UnknownName("method in this store:", name.method, {cell.method for cell in found})
        return Side(name, tuple(kept), scope)
    if name.variant is not None:
        kept = [cell for cell in found if cell.variant == name.variant]
        if not kept:
            known = {f"variant:{cell.variant}" for cell in found}
            raise UnknownName("variant", f"variant:{name.variant}", known, "(harness results --records)")
        return Side(name, tuple(kept), scope)
    return Side(name, tuple(_own_first(found)), scope)


def other_methods(
    a: SideName, stores: Stores, models: Sequence[str] | None = None, *, timed: bool = False
) -> list[SideName]:
    """The sides of every other method that was tried where the method `a` was measured.

    One that failed everywhere is among them, for a gate cannot be judged by it; one that says of itself that
    it does not apply is not.

    Args:
        timed: only those of which something was timed.
    """
    cells = load_side(replace(a, method=None), stores, models).cells
    places = {cell.place for cell in cells if cell.method == a.method and cell.is_ok}
    tried = [cell for cell in cells if cell.place in places and cell.status is not Status.NOT_APPLICABLE]
    if timed:
        tried = [cell for cell in tried if cell.is_ok and cell.kind == "scenario"]
    methods = {cell.method for cell in tried} - {a.method}
    return [replace(a, text=method, method=method) for method in sorted(methods)]


def _sweep_number(store: Store, name: SideName) -> int | None:
    if name.sweep is None:
        return None
    query = select(sweeps.c.id, imports.c.origin).outerjoin(imports, imports.c.sweep_id == sweeps.c.id)
    with store.reading() as connection:
        origins: Mapping[int, str | None] = {row.id: row.origin for row in connection.execute(query)}
    if isinstance(name.sweep, int):
        if name.sweep not in origins:
            raise UnknownName("sweep", f"sweep:{name.sweep}", [f"sweep:{id_}" for id_ in origins])
        return name.sweep
    here = sorted((id_ for id_, origin in origins.items() if origin is None), reverse=True)
    order = here or sorted(origins, reverse=True)
    if name.before >= len(order):
        raise UnknownName(
            "sweep", f"sweep:last~{name.before}", [f"sweep:{id_}" for id_ in order], f"in {store.label}"
        )
    return order[name.before]


def _own_first(found: Sequence[Cell]) -> list[Cell]:
    """Without imported cells of which this store measured the same itself."""
    own = {_identity(cell) for cell in found if cell.origin is None}
    return [cell for cell in found if cell.origin is None or _identity(cell) not in own]


def _identity(cell: Cell) -> tuple[Any, ...]:
    return (cell.method, cell.dtype, *cell.place[:-1])
