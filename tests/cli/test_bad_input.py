"""Bad input: one clear line, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import sqlite3
import sys

import pytest

from harness.cli.app import run
from harness.models.loading import ZOO_DIR
from harness.store.tables import VERSION_TABLE

SWEEP = ("sweep", "--methods", "rtn")


def _files(folder):
    # SQLite keeps its shared-memory and log files beside a store that was only read.
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(("-shm", "-wal")))


def _refused(capsys, tmp_path, arguments, *messages):
    before = _files(tmp_path)
    code = run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 2, captured
    first, *rest = captured.err.strip().splitlines()
    assert not [line for line in rest if not line.startswith("see: ")], captured.err
    assert first.startswith("error: ")
    assert "Traceback" not in captured.err
    for message in messages:
        assert message in first
    assert _files(tmp_path) == before
    return first


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HARNESS_DB", raising=False)
    # The fork server imports for seconds; input is checked without it.
    monkeypatch.setattr("harness.executors.server.start_fork_server", lambda: None)


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (("sweep",), ("no method is named",)),
        (("sweep", "--methods", "gptqq"), ("unknown method 'gptqq'", "did you mean 'gptq'")),
        (("sweep", "--methods", "gptq:bitz=3"), ("unknown option 'bitz'", "did you mean 'bits'")),
        (("sweep", "--methods", "gptq:bits=5"), ("gptq: bits",)),
        (("sweep", "--methods", "magnitude-prune:sparsity=1.5"), ("sparsity", "less than 1")),
        ((*SWEEP, "--models", "./missing"), ("'./missing' does not exist",)),
        ((*SWEEP, "--models", "zoo:../../x"), ("unknown zoo model '../../x'",)),
        ((*SWEEP, "--models", "package:.."), ("the name of an installed package",)),
        ((*SWEEP, "--models", "../x"), ("model directory '../x' does not exist",)),
        ((*SWEEP, "--models", "a/b/c"), ("model directory 'a/b/c' does not exist",)),
        ((*SWEEP, "--models", "a--b/c"), ("neither a hub id",)),
        ((*SWEEP, "--models", "C:\\x"), ("unknown model source 'C'", "a directory is ./name")),
        (
            (*SWEEP, "--models", f"zoo:opt-4m,{ZOO_DIR / 'opt-4m'}"),
            ("models 'zoo:opt-4m' and", "have the same content; name one of them"),
        ),
        ((*SWEEP, "--models", "org/name@a b"), ("a branch, a tag or a commit must follow the @",)),
        ((*SWEEP, "--models", ""), ("--models: names no model",)),
        ((*SWEEP, "--models", "zoo:llama-6m+outliers:k=nan"), ("k='nan' cannot be read",)),
        ((*SWEEP, "--timeout", "inf"), ("--timeout",)),
        ((*SWEEP, "--seed", "-1"), ("--seed",)),
        ((*SWEEP, "--methods", "gptq:damp=inf"), ("damp", "finite")),
        ((*SWEEP, "--methods", ":"), ("a name is missing",)),
        ((*SWEEP, "--models", "zoo:lama"), ("unknown zoo model 'lama'",)),
        ((*SWEEP, "--models", "shape:llama-7c"), ("did you mean 'llama-7b'",)),
        ((*SWEEP, "--tasks", "kjw"), ("kjw", "did you mean 'kjv'")),
        ((*SWEEP, "--config", "none.yaml"), ("none.yaml does not exist",)),
        ((*SWEEP, "--plugin", "none.py"), ("there is no such file",)),
        ((*SWEEP, "--batch-sizes", "x"), ("--batch-sizes", "whole numbers")),
        ((*SWEEP, "--limit", "0"), ("--limit",)),
        ((*SWEEP, "--dtype", "int3"), ("--dtype",)),
        ((*SWEEP, "--include-path", "none"), ("--include-path none is no directory",)),
        ((*SWEEP, "--text", "none.txt"), ("none.txt does not exist",)),
        ((*SWEEP, "--frsh"), ("--frsh",)),
        ((*SWEEP, "--jobs", "x"), ("--jobs",)),
        (("sweeep",), ("sweeep",)),
        (("results",), ("results.db", "harness sweep")),
        (("results", "--sweep", "x", "--db", "x.db"), ("",)),
        (("results", "--status", "okk"), ("unknown status 'okk'", "did you mean 'ok'")),
        (("results", "export", "x.jsonl", "--status", "okk"), ("unknown status 'okk'",)),
        (("methods", "gtpq"), ("did you mean 'gptq'",)),
        (("new", "My Method"), ("lower-case words",)),
        (("new", "gptq"), ("exists already",)),
        (("compare", "a", "b", "--fail-on", "acc"), ("--fail-on 'acc'", "acc<-0.01")),
    ],
)
def test_one_clear_line(capsys, tmp_path, arguments, messages):
    _refused(capsys, tmp_path, arguments, *messages)


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_a_text_without_text(capsys, tmp_path, content):
    (tmp_path / "blank.txt").write_text(content)
    _refused(capsys, tmp_path, (*SWEEP, "--text", "blank.txt"), "the text file blank.txt is empty")


def test_a_folder_that_is_written_like_a_hub_id(capsys, tmp_path):
    (tmp_path / "org" / "name").mkdir(parents=True)
    _refused(capsys, tmp_path, (*SWEEP, "--models", "org/name"), "write ./org/name", "org/name@main")
    (tmp_path / "plain").mkdir()
    _refused(capsys, tmp_path, (*SWEEP, "--models", "plain"), "written ./plain")


def test_cuda_without_a_device(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    _refused(capsys, tmp_path, (*SWEEP, "--device", "cuda"), "no CUDA device", "--device cpu")


def test_a_directory_that_is_no_checkpoint(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    _refused(capsys, tmp_path, (*SWEEP, "--models", "./empty"), "no config.json")


def test_unreadable_yaml(capsys, tmp_path):
    (tmp_path / "sweep.yaml").write_text("methods: [gptq\n")
    _refused(capsys, tmp_path, ("sweep", "--config", "sweep.yaml"), "sweep.yaml is not YAML")


def test_a_store_that_is_no_store(capsys, tmp_path):
    (tmp_path / "results.db").write_bytes(b"this is no database" * 100)
    before = (tmp_path / "results.db").read_bytes()
    _refused(capsys, tmp_path, (*SWEEP, "--tasks", "none"), "results.db")
    assert (tmp_path / "results.db").read_bytes() == before


def test_a_store_of_a_newer_version(capsys, tmp_path):
    from harness.store.store import Store

    Store.open(tmp_path / "results.db").close()
    with sqlite3.connect(tmp_path / "results.db") as connection:
        connection.execute(f"update {VERSION_TABLE} set version_num = '9999'")
    connection.close()
    _refused(capsys, tmp_path, (*SWEEP, "--tasks", "none"), "written by a newer harness")
    _refused(capsys, tmp_path, ("results",), "written by a newer harness")


@pytest.mark.parametrize(
    "arguments", [["models", "--format", "csv"], ["--version"], ["methods", "--nonsense"]]
)
def test_closed_streams_are_no_error(monkeypatch, arguments):
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    code = run(arguments)
    for stream in (sys.stdout, sys.stderr):
        stream.close()
    assert code == (2 if "--nonsense" in arguments else 0)


@pytest.mark.parametrize("name", ["json", "torch", "typing-extensions"])
def test_a_new_method_hides_no_module(capsys, tmp_path, name):
    _refused(capsys, tmp_path, ("new", name), "would hide the module", "choose another name")


def test_a_folder_of_the_name_is_no_module(tmp_path, monkeypatch):
    (tmp_path / "my_method").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run(["new", "my-method"]) == 0


def test_an_interrupt_while_the_command_line_is_imported_is_no_traceback(monkeypatch):
    from harness.__main__ import main

    class Interrupted:
        def find_spec(self, name, *_):
            if name == "harness.cli.app":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "harness.cli.app")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 130
