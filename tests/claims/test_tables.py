"""The board as Markdown, and the page that shows the committed rows."""

from __future__ import annotations

import re
from pathlib import Path

from harness.claims import Outcome, board, loses_less
from harness.claims.tables import PAGE, board_section, reference_board, short_board, update_claims_page
from harness.cli.app import run
from harness.plugins import load_plugins
from harness.reference_tables import BEGIN, END, reference_files
from tests.claims.rows import MODEL, begin, claim, scored

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / PAGE).read_text()


def rows_of(store):
    sweep = begin(store)
    scored(store, sweep, "good", 0.1)
    scored(store, sweep, "bad", 0.3)
    better, worse = (
        loses_less(a, than=b, model=MODEL, task="text") for a, b in (("good", "bad"), ("bad", "good"))
    )
    absent = loses_less("good", than="absent", model=MODEL, task="text")
    claims = [
        claim(better, id="better", says="Good | better."),
        claim(worse, id="worse"),
        claim(absent, id="absent"),
    ]
    return board(store, claims)


def test_every_outcome_is_shown_alike(store):
    section = board_section(rows_of(store))
    assert section.startswith("1 holds, 1 does not hold, 1 is not decidable.")
    lines = {line.split(":")[0].strip("| "): line for line in section.splitlines() if line.startswith("| ")}
    assert "| holds |" in lines["better"]
    assert "| does not hold |" in lines["worse"]
    assert "| not decidable | not measured" in lines["absent"]
    for name in ("better", "worse"):
        assert "nats/token, above 0 claimed (p below 0.0001)" in lines[name]
        assert lines[name].endswith("| a CPU |")
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 6 for line in lines.values()), "no text adds a column"


def test_the_short_board_leads_to_the_long_one(store):
    short = short_board(rows_of(store))
    assert len([line for line in short.splitlines() if line.startswith("|")]) == 2 + 3
    assert "[docs/claims.md](docs/claims.md)" in short


def test_the_page_is_what_the_committed_rows_say(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / PAGE).write_text(TEXT)
    (tmp_path / "reference").symlink_to(ROOT / "reference")
    update_claims_page(tmp_path)
    assert (tmp_path / PAGE).read_text() == TEXT, "run: make docs"
    outcomes = {row.decision.outcome for row in reference_board(reference_files(ROOT))}
    assert outcomes == set(Outcome), "the board shows all three"


def test_a_checkout_without_the_page_is_left_alone(tmp_path):
    update_claims_page(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_example_of_the_page_is_a_claim(tmp_path):
    [code] = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)
    file = tmp_path / "mine.py"
    file.write_text(code)
    assert load_plugins([str(file)]).reports[-1].claims == ("eight-bits-lose-less-than-four",)


def test_the_commands_of_the_page_are_understood(capsys):
    commands = [
        line.split("#")[0].split() for line in TEXT.splitlines() if line.startswith("harness reproduce")
    ]
    assert len(commands) >= 5
    for _, *arguments in commands:
        assert run([*arguments, "--help"]) == 0


def test_the_markers_stand_once():
    assert (TEXT.count(BEGIN), TEXT.count(END)) == (1, 1)
