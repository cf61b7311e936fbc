"""`harness results import` of files that somebody changed: the rows or one clear error, all or nothing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import strategies as st

from harness.store import queries
from harness.store.store import Store
from tests.fuzz.exploring import HOSTILE, examples, explore, run_cleanly
from tests.store.test_exchange import fill

FILE = Path("rows.jsonl")
IMPORT = ["results", "import", str(FILE), "--db", "into.db"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    with Store.open(folder / "results.db") as store:
        fill(store)
    file = folder / "rows.jsonl"
    assert run_cleanly(["results", "export", str(file), "--db", str(folder / "results.db")])[0] == 0
    return file.read_bytes()


def _import(content):
    for beside in Path().glob("into.db*"):
        beside.unlink()
    FILE.write_bytes(content)
    code, *_ = run_cleanly(IMPORT)
    if code == 0:
        for verb in (["results", "--db", "into.db"], ["compare", "baseline", "rtn", "--db", "into.db"]):
            run_cleanly(verb)
    elif Path("into.db").exists():
        with Store.open_readonly("into.db") as store:
            assert queries.sweeps(store).empty
    return code


def test_the_unchanged_file_is_imported(exported):
    assert _import(exported) == 0


@examples
def test_flipped_and_cut_bytes(exported, count):
    flips = st.lists(st.tuples(st.integers(0, len(exported) - 1), st.integers(1, 255)), max_size=5)

    def holds(damage):
        changes, cut = damage
        data = bytearray(exported)
        for place, change in changes:
            data[place] ^= change
        _import(bytes(data[:cut]))

    explore(st.tuples(flips, st.none() | st.integers(0, len(exported))), holds, count // 3)


@examples
def test_changed_values(exported, count):
    lines = [json.loads(line) for line in exported.decode().splitlines()]
    values = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from(HOSTILE),
        st.just([]), st.just({}), st.just([[]]), st.just({"$float": "nan"}), st.just({"$float": 5}),
    )  # fmt: skip
    place = st.tuples(st.integers(0, len(lines) - 1), st.integers(0, 1000), values)

    def holds(changes):
        changed = json.loads(json.dumps(lines))
        for line, where, value in changes:
            _put(changed, line, where, value)
        text = "\n".join(json.dumps(line) for line in changed)
        _import(text.encode("utf-8", "surrogatepass"))

    explore(st.lists(place, min_size=1, max_size=3), holds, count // 3)


def _put(lines, number, where, value):
    """Put a value at some place in a line, down to its leaves."""
    places = [(lines, number)]
    stack = [lines[number]]
    while stack:
        inside = stack.pop()
        keys = (
            list(inside)
            if isinstance(inside, dict)
            else range(len(inside))
            if isinstance(inside, list)
            else ()
        )
        for key in keys:
            places.append((inside, key))
            stack.append(inside[key])
    container, key = places[where % len(places)]
    container[key] = value


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"\0", b"{}", b"[]", b"5", b"[" * 100_000, gzip.compress(b"x" * 10**6)]
)
def test_what_is_no_export(content):
    assert _import(content) == 2


def test_a_packed_bomb_is_refused_in_bounded_memory(exported):
    packed = Path("rows.jsonl.gz")
    packed.write_bytes(gzip.compress(exported.splitlines()[0] + b"\n" + b'"' + b" " * 200_000_000))
    code, _, said = run_cleanly(["results", "import", str(packed), "--db", "into.db"])
    assert code == 2, said
