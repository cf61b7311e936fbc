"""Files that others made: whatever is wrong is one line with the line's number, and nothing else happens."""

from __future__ import annotations

import gzip
import json

import pytest

from harness.errors import ConfigError
from harness.store import exchange_text, queries
from harness.store.exchange_export import Wanted, export_results
from harness.store.exchange_import import import_results
from harness.store.exchange_read import read_results
from harness.store.store import Store
from tests.store.test_exchange import fill


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    with Store.open(folder / "results.db") as store:
        fill(store)
        export_results(store, folder / "rows.jsonl", Wanted())
    return (folder / "rows.jsonl").read_text().splitlines()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "rows.jsonl"


def refused(file, lines):
    file.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
    with pytest.raises(ConfigError) as error:
        read_results(file)
    message = str(error.value)
    assert message.startswith(str(file))
    assert "\n" not in message
    assert len(message) < 600
    return message.removeprefix(str(file))


def place(lines, name):
    """The index of the first row of a section."""
    return next(index for index, line in enumerate(lines) if line.startswith(f'["{name}"'))


def columns(lines, name):
    declared = [json.loads(line) for line in lines if line.startswith('{"table"')]
    return next(each["columns"] for each in declared if each["table"] == name)


def changed(lines, name, column, value):
    """The lines with one value of the first row of a section replaced, and its line's number."""
    index = place(lines, name)
    row = json.loads(lines[index])
    row[1 + columns(lines, name).index(column)] = value
    return [*lines[:index], json.dumps(row), *lines[index + 1 :]], index + 1


@pytest.mark.parametrize(
    ("name", "column", "value"),
    [
        ("machines", "facts", []),
        ("machines", "facts", None),
        ("sweeps", "machine", 2),
        ("sweeps", "machine", 0),
        ("sweeps", "machine", True),
        ("sweeps", "machine", 1.0),
        ("sweeps", "status", "exploded"),
        ("sweeps", "started_at", "yesterday"),
        ("sweeps", "cells_planned", -1),
        ("sweeps", "cells_planned", 2**31),
        ("sweeps", "manifest", {"gpu": "a text"}),
        ("sweeps", "manifest", {"gpu": {"sm_clock_mhz": "fast"}}),
        ("sweeps", "manifest", {"time_utc": "noon"}),
        ("sweeps", "manifest", {"versions": {"torch": 2}}),
        ("sweeps", "config", "--methods gptq"),
        ("variants", "key", "a:b"),
        ("variants", "key", "../../etc/passwd"),
        ("variants", "key", ""),
        ("variants", "chain", []),
        ("variants", "chain", [1]),
        ("variants", "chain", [{"name": "gptq", "options": 3}]),
        ("variants", "chain", [{"options": {}}]),
        ("variants", "model_info", [1]),
        ("variants", "seed", 2**63),
        ("variants", "seed", "0"),
        ("variants", "synthetic", 1),
        ("variants", "method", "x" * 10_001),
        ("variants", "method", "nul\0"),
        ("variants", "method", "half\ud800"),
        ("effects", "position", -1),
        ("effects", "bytes_after", 0.5),
        ("effects", "sparsity", "0.5"),
        ("cells", "sweep", 3),
        ("cells", "used_by", [9]),
        ("cells", "used_by", 1),
        ("cells", "key", "'; DROP TABLE cells; --"),
        ("cells", "kind", "weather"),
        ("cells", "status", "fine"),
        ("cells", "scenario", "/etc/passwd"),
        ("cells", "seconds", -1.0),
        ("cells", "seconds", None),
        ("cells", "seconds", {"$float": "inf"}),
        ("records", "metric", None),
        ("records", "value", "1"),
        ("records", "value", True),
        ("records", "value", {"$float": "huge"}),
        ("records", "value", {"$float": []}),
        ("records", "n", 1e3),
        ("samples", "position", 2**31),
        ("items", "detail", [1]),
        ("items", "position", 2**63),
        ("kernels", "calls", -3),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_its_line(lines, file, name, column, value):
    text, line = changed(lines, name, column, value)
    message = refused(file, text)
    assert message.startswith(f", line {line}: {name}")


def test_a_cell_names_what_its_kind_is_about(lines, file):
    index = next(n for n, line in enumerate(lines) if '"scenario", null, "b' in line)
    text = [
        *lines[:index],
        lines[index].replace('"scenario", null,', '"scenario", "kjv",'),
        *lines[index + 1 :],
    ]
    assert refused(file, text) == f", line {index + 1}: a scenario cell must name a scenario only"


def test_nothing_stands_twice(lines, file):
    for name, match in (
        ("machines", "the same machine twice"),
        ("sweeps", "the same sweep twice"),
        ("cells", "the cell of line"),
        ("effects", "position 0 was on line"),
        ("items", "was on line"),
        ("samples", "was on line"),
        ("kernels", "was on line"),
    ):
        index = place(lines, name)
        message = refused(file, [*lines[: index + 1], lines[index], *lines[index + 1 :]])
        assert message.startswith(f", line {index + 2}: ")
        assert match in message
    declared = next(n for n, line in enumerate(lines) if line.startswith('{"table"'))
    assert "declared twice" in refused(file, [*lines[: declared + 1], lines[declared]])


def test_rows_hang_on_something(lines, file):
    header = [line for line in lines if line.startswith("{")]
    for name in ("effects", "cells", "records", "samples", "items", "kernels"):
        known = [lines[place(lines, "machines")], *[line for line in lines if line.startswith('["sweeps"')]]
        message = refused(file, [*header, *known, lines[place(lines, name)]])
        assert "stands below no row of" in message
    # A record's readings do not stand below the next cell.
    cell, sample = place(lines, "cells"), place(lines, "samples")
    assert "below no row of records" in refused(file, [*lines[: cell + 1], lines[sample]])


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("nonsense", "not JSON (Expecting value at character 1)"),
        ('["records", ', "not JSON"),
        ('["records", NaN]', "NaN is not JSON"),
        ('["records", -Infinity]', "-Infinity is not JSON"),
        ('["records", 1e999]', "too large for a number"),
        ('["records", ' + "9" * 5000 + "]", "Exceeds the limit"),
        ("[" * 100_000 + "]" * 100_000, "nested more than 32 deep"),
        ('["machines", ' + '{"a":' * 40 + "1" + "}" * 40 + "]", "nested more than 32 deep"),
        ('{"table": "records", "table": "cells"}', "a name stands twice"),
        ('{"table": "secrets", "columns": []}', "the table 'secrets' is unknown to this harness; upgrade"),
        ('{"table": "records", "columns": "all"}', "expected"),
        ("7", "neither a table's columns nor a row"),
        ("[]", "neither a table's columns nor a row"),
        ("[[]]", "neither a table's columns nor a row"),
        ('["sweep_cells", 1, 1]', "whose columns were not declared"),
        ('["records", 1, 2]', "2 values for 8 columns"),
    ],
)  # fmt: skip
def test_a_malformed_line_is_named(lines, file, line, what):
    message = refused(file, [*lines, line])
    assert message.startswith(f", line {len(lines) + 1}: ")
    assert what in message


def test_columns_of_a_later_harness_are_refused(lines, file):
    index = next(n for n, line in enumerate(lines) if line.startswith('{"table": "records"'))
    text = [*lines[:index], lines[index].replace('"note"', '"colour"'), *lines[index + 1 :]]
    assert "the column 'colour' of records is unknown to this harness; upgrade" in refused(file, text)


def test_columns_that_an_earlier_harness_did_not_have_are_empty(lines, file, tmp_path):
    """Of a nullable column; one that every row needs is named."""
    index = next(n for n, line in enumerate(lines) if line.startswith('{"table": "records"'))
    for column, fits in (("mode", True), ("unit", False)):
        where = 1 + columns(lines, "records").index(column)
        text = []
        for line in lines:
            row = json.loads(line)
            if line.startswith('["records"'):
                del row[where]
                line = json.dumps(row)
            text.append(line)
        declared = json.loads(lines[index])
        declared["columns"].remove(column)
        text[index] = json.dumps(declared)
        if fits:
            file.write_text("\n".join(text))
            with Store.open(tmp_path / "results.db") as store:
                import_results(store, [read_results(file)])
                assert queries.results(store)["mode"].isna().all()
        else:
            assert "records.unit: Field required" in refused(file, text)


def test_another_version_and_other_files(lines, file, tmp_path):
    header = json.loads(lines[0])
    later = json.dumps({**header, "version": 2})
    message = refused(file, [later, *lines[1:]])
    assert message == " is of version 2 of the format, this harness reads up to 1; upgrade: pip install " \
        "--upgrade transformer-harness"  # fmt: skip
    for wrong in (0, True, "1", None, 1.5):
        assert "version of the format is missing" in refused(file, [json.dumps({**header, "version": wrong})])
    for text in (["{}"], ['{"a": 1}', *lines], lines[1:], ["[1]"]):
        assert ", line 1: not a harness results file" in refused(file, text)
    file.write_bytes(b"")
    with pytest.raises(ConfigError, match="is empty"):
        read_results(file)
    file.write_bytes(b"\xff\xfe\0")
    with pytest.raises(ConfigError, match="line 1: not text in UTF-8"):
        read_results(file)
    with pytest.raises(ConfigError, match="does not exist"):
        read_results(tmp_path / "missing.jsonl")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_results(tmp_path)


def test_damaged_archives(lines, tmp_path):
    file = tmp_path / "rows.jsonl.gz"
    packed = gzip.compress("\n".join(lines).encode())
    for content in (b"plain text", packed[:-20], packed[:40] + b"\0" * 40 + packed[80:]):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match="is no gzip file, or a damaged one"):
            read_results(file)


def test_an_archive_that_unpacks_to_too_much(file, tmp_path, monkeypatch):
    monkeypatch.setattr(exchange_text, "MAX_LINE", 10_000)
    monkeypatch.setattr(exchange_text, "MAX_CHARACTERS", 100_000)
    bomb = tmp_path / "bomb.jsonl.gz"
    bomb.write_bytes(gzip.compress(b'{"format": "harness results", "version": 1}\n' + b"\n" * 1_000_000))
    with pytest.raises(ConfigError, match="the file holds more than 100,000 characters"):
        read_results(bomb)
    file.write_text("[" + " " * 20_000)
    with pytest.raises(ConfigError, match="line 1: longer than 10,000 characters"):
        read_results(file)


def test_texts_that_look_like_statements_stay_texts(lines, tmp_path, store):
    """In every text that may hold anything, through the store and out again."""
    evil = '\'); DROP TABLE cells; -- "%s" {0} ${HOME} <script> =1+1 [red] \x1b[31m'
    text = lines
    for name, column in (
        ("variants", "model"), ("variants", "method"), ("cells", "reason"), ("records", "metric"),
        ("records", "note"), ("effects", "module"), ("kernels", "name"), ("variants", "device_name"),
    ):  # fmt: skip
        text, _ = changed(text, name, column, evil)
    file = tmp_path / "evil.jsonl"
    file.write_text("\n".join(text) + "\n")
    import_results(store, [read_results(file)], evil)
    frame = queries.results(store)
    assert set(frame["origin"]) == {evil}
    assert evil in set(frame["method"])
    export_results(store, tmp_path / "again.jsonl", Wanted())
    again = sorted((tmp_path / "again.jsonl").read_text().splitlines())
    assert again == sorted(text)
