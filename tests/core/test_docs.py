"""The generated pages are what the code says now, and the code in the README runs."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from harness.docs import write_pages
from harness.testing import check_method

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.S)


@pytest.mark.parametrize("name", ["methods.md", "cli.md"])
def test_generated_pages_are_current(name, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    write_pages(tmp_path)
    current = (ROOT / "docs" / name).read_text()
    assert (tmp_path / name).read_text() == current, "run: make docs"


def test_the_readme_has_blocks_of_both_kinds():
    assert {language for language, _ in BLOCKS} == {"bash", "python"}


@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "python"])
def test_python_blocks_of_the_readme_run(code, tmp_path):
    from harness.plugins import load_plugins

    file = tmp_path / "from_readme.py"
    file.write_text(code)
    loaded = load_plugins([str(file)])
    (name,) = loaded.reports[-1].methods
    check_method(loaded.method(name))


COMMANDS = [
    line.split("#")[0].strip()
    for language, code in BLOCKS
    if language == "bash"
    for line in code.splitlines()
    if line.split("#")[0].strip()
]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("harness ")])
def test_commands_of_the_readme_are_understood(command):
    """Every command and option exists; what they do is tested elsewhere."""
    import shlex

    name, *arguments = shlex.split(command)[1:]
    import typer

    from harness.cli.app import app

    commands = typer.main.get_command(app).commands
    assert name in commands
    with commands[name].make_context(name, arguments) as context:
        assert context.params


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_of_the_readme_exist(command):
    target = command.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.M)


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_help_is_instant():
    code = textwrap.dedent("""
        import sys, time
        start = time.perf_counter()
        from harness.cli.app import run
        run(["--help"])
        heavy = {"torch", "transformers", "lm_eval", "pandas", "sqlalchemy", "scipy", "numpy"}
        print("LOADED", sorted(heavy & set(sys.modules)), time.perf_counter() - start)
    """)
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
        for _ in range(3)
    ]
    reports = [run.stdout.strip().splitlines()[-1].rsplit(" ", 1) for run in runs]
    assert {loaded for loaded, _ in reports} == {"LOADED []"}
    assert min(float(seconds) for _, seconds in reports) < 0.5
