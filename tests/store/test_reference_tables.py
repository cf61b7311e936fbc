"""The tables of the README, and the rows and the settings in `reference/` that they come from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harness.config import load_config
from harness.errors import ConfigError
from harness.records import CellKind, Record, Scenario, Status
from harness.reference_page import PAGE, reference_page_section, update_reference_page
from harness.reference_tables import (
    BEGIN,
    CLAIMS,
    END,
    reference_files,
    reference_section,
    timed_files,
    update_readme,
    with_section,
)
from harness.store.exchange_export import Wanted, export_results
from harness.store.exchange_import import import_results
from harness.store.exchange_read import read_results
from harness.store.store import Store
from tests.store.rows import begin_sweep, make_result, make_variant

ROOT = Path(__file__).parents[2]
MANIFEST = {
    "time_utc": "2026-01-02T03:04:05+00:00",
    "measuring_version": 2,
    "device": "cuda",
    "device_name": "a GPU",
    "versions": {"torch": "2.11"},
    "sweep_uid": "one",
}
SHAPES = [Scenario(batch, 512, 64).label for batch in (1, 8, 64)]


def timed(name, milliseconds, ratio=None):
    latency = milliseconds / 1000
    records = [Record(f"{name}_latency", latency, "s", latency * 0.99, latency * 1.01, n=9, mode="compiled")]
    if ratio is not None:
        records.append(
            Record(f"{name}_speedup", ratio, "x", ratio - 0.01, ratio + 0.01, mode="compiled, paired")
        )
    return records


@pytest.fixture
def checkout(tmp_path):
    """A checkout with a README and rows of a baseline and a method, with a failure and a refusal."""
    about = {
        "model": "shape:llama-7b",
        "device": "cuda",
        "device_name": "a GPU",
        "dtype": "bfloat16",
        "synthetic": True,
    }
    base = make_variant(
        "base", method="baseline", family="baseline", chain=[{"name": "baseline", "options": {}}], **about
    )
    gptq = make_variant("gptq", method="gptq", **about)
    with Store.open(tmp_path / "results.db") as store:
        sweep = begin_sweep(store, base, gptq, manifest=MANIFEST)
        for key, speed in (("base", 1.0), ("gptq", 2.0)):
            for shape in SHAPES[:2]:
                ratio = None if key == "base" else speed
                records = (*timed("decode", 8 / speed, ratio), *timed("prefill", 16 * speed, ratio and 0.5))
                if ratio:
                    why = Record("verdict", 1.0, "count", note="Prefill takes twice as long.")
                    records += (why,)
                result = make_result(f"{key}-{shape}", key, records=records, items=())
                store.write_cell(sweep, result, kind=CellKind.SCENARIO, task=None, scenario=shape)
            failed = make_result(
                f"{key}-big", key, Status.OOM, records=(), items=(),
                reason="CUDA out of memory. Tried to allocate 70 GiB | *now*",
            )  # fmt: skip
            store.write_cell(sweep, failed, kind=CellKind.SCENARIO, task=None, scenario=SHAPES[2])
            weights = Record("weight_bytes", 13.48e9 / speed, "B")
            transform = make_result(f"{key}-transform", key, records=(weights,), items=())
            store.write_cell(sweep, transform, kind=CellKind.TRANSFORM, task=None, scenario=None)
        scored = make_result(
            "scored", "gptq", records=(Record("acc", 0.75, "fraction", 0.7, 0.8, n=4),), items=()
        )
        store.write_cell(sweep, scored, kind=CellKind.TASK, task="grammar", scenario=None)
        (tmp_path / "reference").mkdir()
        export_results(store, tmp_path / "reference" / "gpu.jsonl", Wanted(), leave_out=("samples", "items"))
    (tmp_path / "docs").mkdir()
    for page in ("README.md", PAGE):
        (tmp_path / page).write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nThe end.\n")
    return tmp_path


def tables_of(page: Path) -> list[str]:
    text = page.read_text()
    assert text.startswith(f"# Title\n\n{BEGIN}\n")
    assert text.endswith(f"{END}\n\nThe end.\n")
    return text.split(BEGIN)[1].split(END)[0].splitlines()


def test_the_readme_has_one_table_of_the_model_that_most_is_known_of(checkout):
    update_readme(checkout)
    readme = checkout / "README.md"
    lines = tables_of(readme)
    assert "**a GPU**, bfloat16, torch 2.11, 2026-01-02 (measuring version 2, timed as compiled" in lines[1]
    assert "shape:llama-7b: random weights, so speed and memory only" in lines[1]
    assert "shape:llama-7b, prompts of 512 tokens; of the methods the speed-up over the baseline:" in lines
    rows = [line for line in lines if line.startswith("|")]
    assert rows[0] == (
        "| method | weights | decode, batch 1 | decode, batch 8 | prefill, batch 1 | prefill, batch 8 |"
    )
    decode, prefill = "8 [7.92, 8.08] ms", "16 [15.84, 16.16] ms"
    assert rows[2] == f"| baseline | 13.48 GB | {decode} | {decode} | {prefill} | {prefill} |"
    faster, slower = "2 [1.99, 2.01] x", "0.5 [0.49, 0.51] x"
    assert rows[3] == f"| gptq | 6.74 GB | {faster} | {faster} | {slower} | {slower} |"
    assert len(rows) == 4
    assert "(docs/reference.md)" in lines[-1]
    text = readme.read_text()
    update_readme(checkout)
    assert readme.read_text() == text


def test_the_page_has_everything(checkout):
    update_reference_page(checkout)
    lines = tables_of(checkout / PAGE)
    assert "## a GPU" in lines
    assert "### shape:llama-7b" in lines
    rows = [line for line in lines if line.startswith("|")]
    assert rows[0] == "| method | b1-p512-g64 | b8-p512-g64 |", "no method could run the third shape"
    timed = "4 [3.96, 4.04] ms (2 [1.99, 2.01] x)"
    assert rows[3] == f"| gptq | {timed} | {timed} |"
    assert "| gptq | 6.74 GB | 0.75 [0.7, 0.8] |" in rows
    assert "| gptq | decode | 512 | none | gptq is faster at every measured batch size (1 to 8) |" in rows
    assert lines.index("- gptq, b1-p512-g64: Prefill takes twice as long.") < lines.index("Not measured:")
    assert "- shape:llama-7b b64-p512-g64: oom (CUDA out of memory): baseline, gptq" in lines


def test_a_page_without_rows_of_a_device_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("# Title\n")
    update_reference_page(tmp_path)
    assert not (tmp_path / "docs").exists()


def test_one_batch_size_is_shown_where_there_is_no_other(checkout):
    file = checkout / "reference" / "gpu.jsonl"
    lines = [line for line in file.read_text().splitlines() if "b8-p512" not in line]
    file.write_text("\n".join(lines) + "\n")
    rows = [line for line in reference_section([file]).splitlines() if line.startswith("|")]
    assert rows[0] == "| method | weights | decode, batch 1 | prefill, batch 1 |"
    assert rows[3] == "| gptq | 6.74 GB | 2 [1.99, 2.01] x | 0.5 [0.49, 0.51] x |"
    assert "break-even" not in reference_page_section([file])


def test_without_any_file_the_readme_says_so(tmp_path):
    assert reference_files(tmp_path) == []
    assert reference_section([]).startswith("No rows are in `reference/` yet;")


def test_the_readme_needs_the_markers_once(checkout):
    for readme in ("# Title\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n"):
        with pytest.raises(ConfigError, match="the README needs these two lines once"):
            with_section(readme, "x")


def test_stored_texts_draw_nothing(checkout):
    file = checkout / "reference" / "gpu.jsonl"
    hostile = "<img src=x> | [a](javascript:b) `c` *d*"
    file.write_text(file.read_text().replace('"gptq", [', f'"{hostile}", ['))
    for section, least in ((reference_section([file]), 1), (reference_page_section([file]), 4)):
        assert hostile not in section
        assert "<img" not in section.replace("\\<", "")
        tables = re.findall(r"(?:^\|.*\n?)+", section, flags=re.M)
        assert len(tables) >= least
        for table in tables:
            columns = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
            assert len(columns) == 1, "no column was added"


# --- what is committed ----------------------------------------------------------------------------------


def test_the_readme_shows_the_rows_that_are_committed():
    readme = (ROOT / "README.md").read_text()
    files = timed_files(ROOT)
    assert with_section(readme, reference_section(files)) == readme, "run: make docs"
    page = (ROOT / PAGE).read_text()
    assert with_section(page, reference_page_section(files), PAGE) == page, "run: make docs"
    for file in files:
        assert f"reference/{file.name}" in readme
        assert f"../reference/{file.name}" in page


def test_committed_rows_can_be_imported_and_name_nobody(tmp_path):
    for file in reference_files(ROOT):
        # What decides claims is compared item by item.
        left_out = {"samples", "items", "effects", "kernels"}
        left_out -= {"items"} if file.name.startswith(CLAIMS) else set()
        with Store.open(tmp_path / f"{file.name}.db") as store:
            [done] = import_results(store, [read_results(file)])
            assert done.added > 0
            export_results(store, tmp_path / file.name, Wanted(), leave_out=sorted(left_out))
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), "not as results export writes it"
        assert file.stat().st_size < 1_500_000


def test_the_settings_are_what_the_tables_promise():
    configs = [load_config(file, {}) for file in sorted(ROOT.glob("reference/h100*.yaml"))]
    methods = {name for config in configs for name in config.methods}
    models = {name for config in configs for name in config.models}
    assert methods == {"baseline", "rtn", "gptq", "smoothquant"}
    assert models == {"shape:llama-7b", "zoo:llama-6m", "zoo:opt-4m"}
    for config in configs:
        assert (config.batch_sizes, config.prompt_lens) == ((1, 8, 64), (512, 2048))
        assert config.timeout_s < 600


def test_the_settings_make_a_plan():
    from harness.planning import plan_sweep

    statuses = {}
    for file in sorted(ROOT.glob("reference/*.yaml")):
        plan = plan_sweep(replace_device(load_config(file, {})))
        for variant in plan.grid.variants:
            for cell in variant.cells:
                where = (variant.model.info.label, cell.label)
                statuses.setdefault(where, set()).add(cell.decision.status if cell.decision else "measured")
    assert statuses["shape:llama-7b", "b64-p2048-g16"] == {"measured"}
    assert statuses["zoo:opt-4m", "b8-p512-g16"] == {"measured"}
    assert statuses["zoo:llama-6m", "b1-p2048-g16"] == {Status.NOT_APPLICABLE}
    assert statuses["zoo:llama-6m", "kjv"] == {"measured"}
    assert ("shape:llama-7b", "kjv") not in statuses


def replace_device(config):
    return config.model_copy(update={"device": "cpu"})


def test_commands_of_the_reference_page_are_understood():
    import shlex

    import typer

    from harness.cli.app import app

    page = (ROOT / "reference" / "README.md").read_text()
    commands = re.findall(r"^harness (.+)$", page.replace("\\\n", ""), flags=re.M)
    assert len(commands) == 21
    for command in commands:
        name, *arguments = shlex.split(command)
        found = typer.main.get_command(app).commands[name]
        if arguments[0] in getattr(found, "commands", {}):
            found, arguments = found.commands[arguments[0]], arguments[1:]
        with found.make_context(name, arguments) as context:
            assert context.params
    for file in re.findall(r"--config (\S+)", page):
        assert (ROOT / file).is_file()
