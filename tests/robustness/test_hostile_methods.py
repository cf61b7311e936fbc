"""Methods that do their worst: each costs its own cells, with the right status and a clear reason."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from tests.robustness import stored

# Method: status and words of the reason of its cells (all of them), or of those with a label.
OUTCOMES = {
    "exits-with-zero": ("crashed", "ended with exit code 0 without a result"),
    "calls-sys-exit": ("failed", "SystemExit"),
    "presses-ctrl-c": ("failed", "KeyboardInterrupt"),
    "raises-unprintable": ("failed", "_Unprintable"),
    "raises-a-book": ("failed", "ValueError: first words xxx"),
    "segfaults": ("crashed", "SIGSEGV"),
    "kills-itself": ("crashed", "SIGKILL, twice"),
    "leaves-family": ("ok", ""),
    "goes-on-in-two-processes": ("ok", ""),
    "floods": ("failed", "flooded"),
    "closes-output": ("failed", "closed file"),  # loading the baseline beside it prints
    "changes-everything": ("failed", ""),
    "leaves-defaults": ("ok", ""),
    "records-an-object": ("failed", "cannot be stored: CellResult.records['odd'].value must be a number"),
    "records-numpy": ("ok", ""),
    "records-a-lambda": ("failed", "cannot be stored: CellResult.records['odd'].unit must be a text"),
    "sends-code": ("crashed", "the worker sent a message with a builtins.getattr"),
    "writes-everywhere": ("crashed", "the worker sent something that is no message"),
    "closes-everything": ("crashed", ""),
}
# Of these only some cells end so; the others are well.
ONLY = {
    "records-an-object": ("transform",),
    "records-a-lambda": ("transform",),
    "closes-output": ("b1-p4-g1",),
}


@pytest.fixture(scope="module")
def swept(nursery, tmp_path_factory, make_command):
    """One sweep over all of them, with a harmless variant after each of the worst."""
    folder = tmp_path_factory.mktemp("hostile")
    names = []
    for number, name in enumerate(OUTCOMES):
        names += [name, f"scale:factor={0.5 + number / 100}"]
    swept = nursery.sweep(folder, *make_command(",".join(names), "--timeout", 20), FLOOD_MIB="100")
    code = swept.wait(timeout=240)
    assert code == 1, swept.err
    nursery.wait_until_empty()
    return swept


@pytest.mark.parametrize("name", OUTCOMES)
def test_what_becomes_of_it(swept, name):
    status, reason = OUTCOMES[name]
    found = stored.statuses(swept.folder)[name]
    assert set(found) == {"transform", "b1-p4-g1", "tiny_words"}
    for label, (its_status, its_reason) in found.items():
        if label not in ONLY.get(name, found):
            assert its_status == "ok", its_reason
        else:
            assert its_status == status, its_reason
            assert reason in its_reason


def test_none_harms_the_next_variant(swept):
    """Each is followed by a harmless one, whose results are right and on whose records nothing was left."""
    found = stored.statuses(swept.folder)
    harmless = {name: cells for name, cells in found.items() if name.startswith(("scale", "baseline"))}
    assert len(harmless) == len(OUTCOMES) + 1
    assert {status for cells in harmless.values() for status, _ in cells.values()} == {"ok"}
    assert not (swept.folder / "exploited").exists()
    assert (swept.folder / "kills").read_text() == "xx"


def test_the_log_of_a_flood_is_its_beginning_and_its_end(swept):
    [(log,)] = set(
        stored.rows(
            swept.folder,
            "SELECT log_tail FROM cells JOIN variants ON variants.id = variant_id WHERE method = 'floods'",
        )
    )
    assert "first words\n" in log[:1000]  # after the progress of loading
    assert log.endswith("last words")
    assert "[... 104,8" in log  # 100 MiB
    assert len(log) < 5000


def test_the_traceback_of_a_long_message_is_its_beginning_and_its_end(swept):
    query = (
        "SELECT traceback FROM cells JOIN variants ON variants.id = variant_id WHERE method = 'raises-a-book'"
    )
    [(text,)] = set(stored.rows(swept.folder, query))
    assert "in raises_a_book" in text
    assert text.endswith(" last words\n")
    assert len(text) < 50_000


def test_a_segmentation_fault_says_where(swept):
    query = "SELECT log_tail FROM cells JOIN variants ON variants.id = variant_id WHERE method = 'segfaults'"
    assert "in segfaults" in stored.rows(swept.folder, query)[0][0]


def test_numbers_of_numpy_and_torch_are_stored_as_numbers(swept):
    query = "SELECT metric, value, typeof(value) FROM records WHERE metric LIKE 'odd%' ORDER BY metric"
    assert stored.rows(swept.folder, query) == [("odd", 1.5, "real"), ("odder", 2.5, "real")]


def test_a_hang_is_a_timeout_and_its_whole_family_is_gone(nursery, tmp_path, command):
    swept = nursery.sweep(tmp_path, *command("hangs-with-family,scale", "--timeout", 2))
    assert swept.wait() == 1, swept.err
    nursery.wait_until_empty()
    found = stored.statuses(tmp_path)
    assert {status for status, _ in found["hangs-with-family"].values()} == {"timeout"}
    assert all("longer than 2 s" in reason for _, reason in found["hangs-with-family"].values())
    assert {status for status, _ in found["scale"].values()} == {"ok"}


def test_a_family_is_gone_before_the_next_variant_is_timed(nursery, tmp_path, command):
    """What a method left running would make the next one look slow."""
    swept = nursery.sweep(tmp_path, *command("leaves-family,hangs", "--timeout", 4))
    # Not before the second method runs: until the first one's worker has ended, its family may live.
    swept.wait_for_note("hangs")
    names = []
    for pid in nursery.strays():
        with contextlib.suppress(OSError):
            names.append(Path(f"/proc/{pid}/comm").read_text())
    assert "sleep\n" not in names
    swept.wait()
    nursery.wait_until_empty()


def test_a_worker_writes_no_cell_that_it_does_not_owe(nursery, tmp_path, command):
    """Neither another variant's, nor one that is finished, nor one that does not exist."""
    first = nursery.sweep(tmp_path, *command("scale"))
    assert first.wait() == 0, first.err
    keys = stored.rows(
        tmp_path, "SELECT cells.key, variants.key FROM cells JOIN variants ON variants.id = variant_id"
    )
    lines = [*(f"{cell} {variant}" for cell, variant in keys), f"{'0' * 64} {'1' * 64}"]
    (tmp_path / "foreign").write_text("\n".join(lines))
    before = stored.current(tmp_path)
    second = nursery.sweep(tmp_path, *command("forges,scale"))
    assert second.wait() == 0, second.err
    stored.assert_whole(tmp_path)
    after = stored.current(tmp_path)
    assert {key: after[key] for key in before} == before
    assert len(after) == len(before) + 3
