"""``harness export``: from a store to a folder, and everything that must be refused on the way."""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from sqlalchemy import update
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.config import SweepConfig
from harness.errors import ConfigError
from harness.export.folder import replacing_folder
from harness.export.remaking import find_variant
from harness.store.store import Store
from harness.store.tables import sweeps, variants
from tests.export.conftest import sweep

RTN = "rtn:group_size=32"
METHOD = """
import torch
from harness import Method, Options, hookimpl
from harness.nn.surgery import block_linears

@torch.no_grad()
def halve(model, options, context):
    for _, linear in block_linears(model):
        linear.weight.mul_({factor})
    return model

@hookimpl
def register_methods():
    return [Method(name="halve", options=Options, transform=halve)]
"""


def manifest_in(folder):
    return json.loads((folder / "harness.json").read_text())


def records_of(harness, metric):
    return [row for row in harness("results", "--format", "json").rows if row["metric"] == metric]


def test_a_variant_becomes_a_checkpoint_with_its_row_inside(harness, swept, tmp_path):
    done = harness("export", "rtn:bits=4:group_size=32", "out")  # 4 bits are the default: the label says less
    assert done.code == 0, done.err
    assert "compressed-tensors pack-quantized: 14 x W4A16 g32 asym" in done.out
    assert "max difference 0, rms 0 of the spread (at most 0.001), same top token at 100.0%" in done.out
    out = tmp_path / "out"
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.config.quantization_config.quant_method == "compressed-tensors"
    assert {type(m).__module__.split(".")[0] for m in loaded.modules()} <= {"torch", "transformers"}
    manifest = manifest_in(out)
    assert manifest["variant"]["method"] == "rtn:group_size=32"
    assert manifest["variant"]["chain"][0]["options"]["group_size"] == 32
    assert len(manifest["variant"]["content_key"]) == 64
    assert manifest["measured"]["versions"]["torch"] == torch.__version__
    (cell,) = manifest["measured"]["cells"]
    assert {"stored_bits_per_weight", "weight_bytes"} <= {record["metric"] for record in cell["records"]}
    again = manifest["checkpoint"]["made_again"]["probe_output_change"]
    assert again["measured"] == pytest.approx(again["now"])
    assert manifest["checkpoint"]["changed_since_measured"] == []
    (record,) = records_of(harness, "disk_bytes")
    assert record["value"] == (out / "model.safetensors").stat().st_size
    assert (record["unit"], record["mode"]) == ("B", "compressed-tensors pack-quantized")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")] == []


def test_no_host_name_or_path_leaves_the_machine(harness, template, tmp_path):
    shutil.copytree(template / "tiny", tmp_path / "tiny")
    (tmp_path / "own.py").write_text(METHOD.format(factor=0.5))
    sweep(harness, "halve", "--plugin", tmp_path / "own.py", "--db", tmp_path / "results.db")
    assert harness("export", "halve", "out").code == 0
    for file in (tmp_path / "out").iterdir():
        if file.suffix == ".json":
            text = file.read_text()
            assert str(tmp_path) not in text, file.name
            assert "/root" not in text
            assert len(platform.node()) < 4 or platform.node() not in text
    assert "--db" not in manifest_in(tmp_path / "out")["measured"]["command"]


def test_a_second_export_replaces_the_first_only_if_told(harness, swept, tmp_path):
    assert harness("export", "rtn:bits=8", "out", "--seed", 0).code == 0
    eight = (tmp_path / "out" / "model.safetensors").stat().st_size
    refused = harness("export", "rtn:group_size=32", "out")
    assert (refused.code, "--force replaces it" in refused.err) == (2, True)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == eight
    assert harness("export", "rtn:group_size=32", "out", "--force").code == 0
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < eight
    # One size a variant: the newest export's.
    assert harness("export", "rtn:bits=8", "other", "--seed", 0, "--layout", "dense").code == 0
    assert sorted(row["mode"] for row in records_of(harness, "disk_bytes")) == [
        "compressed-tensors pack-quantized", "simulated",
    ]  # fmt: skip


def test_the_folder_must_be_new_or_empty(harness, swept, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for folder, says in (
        ("mine", "holds files that no export wrote"),
        ("file", "is a file"),
        ("nowhere/out", "does not exist"),
        ("link", "is a link"),
    ):
        for force in ((), ("--force",)):
            done = harness("export", RTN, folder, *force)
            assert (done.code, done.out) == (2, "")
            assert says in done.err
            assert len(done.err.splitlines()) == 1
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert harness("export", RTN, "empty").code == 0


def test_what_is_meant_must_be_clear(harness, swept):
    several = harness("export", "rtn:bits=8", "out")
    assert (several.code, "several variants" in several.err, "seed 1" in several.err) == (2, True, True)
    assert "several" in harness("export", "rtn", "out").err
    assert "did you mean 'rtn:bits=8'" in harness("export", "rtn:bits=3", "out").err
    unknown = harness("export", "99", "out")
    assert (unknown.code, "unknown variant '99'" in unknown.err) == (2, True)
    assert (
        "unknown model of 'rtn:bits=8' 'zoo:opt-4m'"
        in harness("export", "rtn:bits=8", "out", "--model", "zoo:opt-4m").err
    )
    assert (
        "unknown layout 'gguf'"
        in harness("export", "rtn:bits=8", "out", "--seed", "1", "--layout", "gguf").err
    )
    assert "name a variant and a folder" in harness("export").err
    listed = harness("export", "--list")
    assert listed.code == 0
    assert listed.out.count("rtn:bits=8 ") == 2
    assert harness("export", "rtn:bits=8", "out", "--seed", "1").code == 0
    assert "no results store at" in harness("export", "1", "other", "--db", "none.db").err


def test_a_changed_plugin_is_refused_or_said(harness, swept, tmp_path):
    (tmp_path / "own.py").write_text(METHOD.format(factor=0.5))
    sweep(harness, "halve", "--plugin", "own.py")
    (tmp_path / "own.py").write_text(METHOD.format(factor=0.25))
    refused = harness("export", "halve", "out")
    assert (refused.code, "the source of halve" in refused.err) == (2, True)
    assert "--allow-changed" in refused.err
    assert not (tmp_path / "out").exists()
    allowed = harness("export", "halve", "out", "--allow-changed")
    assert allowed.code == 0
    assert "CHANGED" in allowed.out
    assert "source of halve" in manifest_in(tmp_path / "out")["checkpoint"]["changed_since_measured"][0]


def test_a_plugin_that_moved_is_the_same(harness, swept, tmp_path):
    (tmp_path / "own.py").write_text(METHOD.format(factor=0.5))
    sweep(harness, "halve", "--plugin", "own.py")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "own.py", tmp_path / "elsewhere" / "own.py")
    assert harness("export", "halve", "out").code == 2
    assert harness("export", "halve", "out", "--plugin", "elsewhere/own.py").code == 0


def test_changed_model_files_and_versions_are_named(harness, swept, tmp_path):
    with Store.open("results.db") as store, store.writing() as connection:
        found = find_variant(store, RTN)
        manifest = {
            **found.sweep["manifest"],
            "versions": {**found.sweep["manifest"]["versions"], "torch": "1.0"},
        }
        connection.execute(
            update(sweeps).where(sweeps.c.id == found.row["sweep_id"]).values(manifest=manifest)
        )
        connection.execute(update(variants).where(variants.c.id == found.id).values(key="another"))
    assert "torch (1.0 then" in harness("export", RTN, "out").err
    config = tmp_path / "tiny" / "config.json"
    config.write_text(config.read_text().replace('"initializer_range": 0.02', '"initializer_range": 0.03'))
    assert "the model's files" in harness("export", RTN, "out").err
    assert not (tmp_path / "out").exists()


def test_a_variant_that_was_never_made_is_refused(harness, swept):
    done = harness("export", "fp8", "out")
    assert (done.code, "E5M2" in done.err, "--layout dense" in done.err) == (2, True, True)
    with Store.open("results.db") as store, store.writing() as connection:
        connection.exec_driver_sql("update cells set status = 'failed', reason = 'no luck'")
    assert "was never made: its transform is failed (no luck)" in harness("export", "fp8", "other").err


def test_an_imported_variant_is_refused(harness, swept):
    assert harness("results", "export", "rows.jsonl").code == 0
    assert harness("results", "import", "rows.jsonl", "--db", "other.db").code == 0
    done = harness("export", RTN, "out", "--db", "other.db")
    assert (done.code, "measured elsewhere" in done.err) == (2, True)


def test_too_small_a_tolerance_ends_with_1_and_leaves_nothing(harness, swept, tmp_path):
    done = harness("export", "rtn:bits=8:a_bits=8", "out", "--tolerance", "1e-9")
    assert (done.code, "is not the variant" in done.err, "as asked for" in done.err) == (1, True, True)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    assert records_of(harness, "disk_bytes") == []


def _check_chain(harness, folder, chain, model):
    sweep(harness, chain, model=model)
    done = harness("export", chain, "out")
    assert done.code == 0, done.err
    assert "W4A16 g64 asym" in done.out
    assert "same top token at 100.0% of 128 places" in done.out
    assert [step["name"] for step in manifest_in(folder / "out")["variant"]["chain"]] == [
        "smoothquant",
        "gptq",
    ]


def test_a_chain(harness, template, tmp_path):
    shutil.copytree(template / "tiny", tmp_path / "tiny")
    _check_chain(harness, tmp_path, "smoothquant+gptq:clip=absmax:group_size=64", "./tiny")


@pytest.mark.slow
def test_a_chain_on_the_bundled_model_with_its_tokenizer(harness, tmp_path):
    _check_chain(harness, tmp_path, "smoothquant+gptq:group_size=64", "zoo:llama-6m")
    out = tmp_path / "out"
    ids = AutoTokenizer.from_pretrained(out)("In the beginning", return_tensors="pt")["input_ids"]
    assert AutoModelForCausalLM.from_pretrained(out)(ids).logits.shape[-1] == 4096
    assert (out / "generation_config.json").exists()


# --- all or nothing ----------------------------------------------------------------------------------


def test_a_full_disk_leaves_what_was_there(harness, swept, tmp_path, monkeypatch):
    assert harness("export", RTN, "out").code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedConfig.save_pretrained", full)
    done = harness("export", RTN, "out", "--force")
    assert (done.code, "became full" in done.err) == (2, True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_disk_without_room_is_found_before_anything_is_written(harness, swept, tmp_path, monkeypatch):
    little = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("harness.export.folder.shutil.disk_usage", lambda folder: little)
    done = harness("export", RTN, "out")
    assert (done.code, "nothing was written" in done.err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_a_signal_leaves_nothing(harness, swept, tmp_path, monkeypatch):

    def ask_to_stop(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("transformers.PreTrainedConfig.save_pretrained", ask_to_stop)
    done = harness("export", RTN, "out")
    assert (done.code, "nothing was written" in done.err) == (143, True)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "harness.json").write_text("old")
    rename, calls = os.rename, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "the disk is ill")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="ill"), replacing_folder(tmp_path / "out", needed_bytes=0) as partial:
        (partial / "harness.json").write_text("new")
    assert (tmp_path / "out" / "harness.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("before", [None, "empty", "an export"])
@pytest.mark.parametrize("meanwhile", ["files", "an export", "a file"])
def test_what_comes_into_the_folder_meanwhile_stays(before, meanwhile, tmp_path):
    out = tmp_path / "out"
    if before is not None:
        out.mkdir()
    if before == "an export":
        (out / "harness.json").write_text("old")

    def come():
        if out.exists():
            shutil.rmtree(out)
        if meanwhile == "a file":
            out.write_text("mine")
        elif meanwhile == "files":
            out.mkdir()
            (out / "notes.txt").write_text("mine")
        else:  # as a second export does
            with replacing_folder(out, needed_bytes=0) as second:
                (second / "harness.json").write_text("mine")

    def export():
        with replacing_folder(out, needed_bytes=0) as partial:
            (partial / "harness.json").write_text("new")
            come()

    with pytest.raises(ConfigError, match="meanwhile"):
        export()
    (kept,) = [out] if out.is_file() else out.iterdir()
    assert kept.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_have_the_usual_modes(harness, swept, tmp_path):
    assert harness("export", RTN, "out").code == 0
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
    assert all(file.stat().st_mode & 0o777 == 0o666 & ~umask for file in (tmp_path / "out").iterdir())
    assert load_file(tmp_path / "out" / "model.safetensors")


def test_a_stored_configuration_is_still_a_configuration(harness, swept):
    with Store.open_readonly("results.db") as store:
        SweepConfig(**find_variant(store, RTN).sweep["config"])
