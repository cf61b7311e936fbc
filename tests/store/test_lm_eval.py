"""lm-eval's own files in, the same files out; our scores in its form, and back."""

from __future__ import annotations

import json
import math
import shutil

import pytest

from harness.cli.app import run
from harness.errors import ConfigError
from harness.evaluate.intervals import wilson
from harness.records import CellKind, CellResult, Item, Record, Status
from harness.store import queries
from harness.store.exchange_export import Wanted
from harness.store.exchange_import import import_results
from harness.store.exchange_sources import read_source
from harness.store.lm_eval_files import safe_name
from harness.store.lm_eval_read import read_lm_eval
from harness.store.lm_eval_write import export_lm_eval
from harness.store.store import Store
from tests.store.lm_eval_output import evaluate
from tests.store.rows import begin_sweep, make_result, make_variant, write_task
from tests.store.test_exchange import counts, export, fill

NOTE = "interval: value ± 1.96 × lm-eval's standard error"


@pytest.fixture(scope="session")
def genuine(tmp_path_factory):
    """What the installed lm-eval wrote; not to be changed."""
    return evaluate(tmp_path_factory.mktemp("lm-eval"))


@pytest.fixture
def output(genuine, tmp_path):
    """A copy of it."""
    return shutil.copytree(genuine, tmp_path / "output")


@pytest.fixture
def harness(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HARNESS_DB", raising=False)

    def harness(*arguments):
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, said.err

    return harness


def results_file(output):
    (file,) = output.rglob("results_*.json")
    return file


def samples_file(output, task):
    (file,) = output.rglob(f"samples_{task}_*.jsonl")
    return file


def imported(store, place):
    return import_results(store, read_source(place))


def change(output, how):
    """Change the results file by a function of its content."""
    file = results_file(output)
    content = json.loads(file.read_text())
    how(content)
    file.write_text(json.dumps(content))
    return file


# --- in -----------------------------------------------------------------------------------------------


def test_scores_are_records_of_an_imported_baseline(output, sqlite_store):
    (done,) = imported(sqlite_store, output)
    assert (done.sweeps, done.added) == (1, 5)
    frame = queries.results(sqlite_store)
    assert set(frame["task"]) == {"tiny_group", "tiny_words", "tiny_again", "tiny_text", "tiny_written"}
    assert set(frame["origin"]) == {results_file(output).name}
    assert set(zip(frame["method"], frame["dtype"], frame["device"], strict=True)) == {
        ("baseline", "float32", "cpu")
    }
    assert frame["model"].iloc[0].endswith("/model")
    theirs = json.loads(results_file(output).read_text())["results"]
    values = {(row.task, row.metric): row for row in frame.itertuples()}
    assert values["tiny_words", "acc"].value == theirs["tiny_words"]["acc,none"]
    assert values["tiny_group", "acc"].value == theirs["tiny_group"]["acc,none"]
    assert values["tiny_text", "word_perplexity"].value == theirs["tiny_text"]["word_perplexity,none"]
    assert set(values) >= {("tiny_written", "exact_match,first"), ("tiny_written", "exact_match,letters")}
    assert values["tiny_words", "acc"].unit == "fraction"


def test_intervals_are_computed_from_samples_and_else_from_the_standard_error(output, sqlite_store, tmp_path):
    imported(sqlite_store, output)
    row = queries.results(sqlite_store, tasks=["tiny_words"]).iloc[0]
    assert (row["lower"], row["upper"]) == wilson(round(row["value"] * 6), 6)
    assert (row["n"], row["note"]) == (6, "interval computed from 6 samples")
    samples_file(output, "tiny_words").unlink()
    with Store.open(tmp_path / "without.db") as store:
        imported(store, output)
        row = queries.results(store, tasks=["tiny_words"]).iloc[0]
    error = json.loads(results_file(output).read_text())["results"]["tiny_words"]["acc_stderr,none"]
    assert row["upper"] - row["value"] == pytest.approx(1.96 * error)
    assert (row["n"], row["note"]) == (6, NOTE)


def test_items_are_the_documents_of_the_samples(output, sqlite_store):
    imported(sqlite_store, output)
    frame = queries.results(sqlite_store)
    cells = {row.task: row.cell for row in frame.itertuples()}
    for task, metrics in (
        ("tiny_words", {"acc"}),
        ("tiny_text", {"word_perplexity", "byte_perplexity"}),
        ("tiny_written", {"exact_match,first", "exact_match,letters"}),
    ):
        items = sqlite_store.items(cells[task])
        assert {item.metric for item in items} == metrics
        assert {item.index for item in items if item.metric in metrics} == set(range(6))
    assert sqlite_store.items(cells["tiny_group"]) == []
    lines = [json.loads(line) for line in samples_file(output, "tiny_words").read_text().splitlines()]
    items = sqlite_store.items(cells["tiny_words"])
    assert [item.outcome for item in items] == [line["acc"] for line in lines]
    assert [item.detail["doc_hash"] for item in items] == [line["doc_hash"] for line in lines]


def test_importing_again_changes_nothing(output, sqlite_store):
    imported(sqlite_store, output)
    before = counts(sqlite_store)
    (done,) = imported(sqlite_store, results_file(output))
    assert (done.added, done.known, done.sweeps) == (0, 5, 0)
    assert counts(sqlite_store) == before


def test_a_model_that_lm_eval_changed_is_no_baseline(output, sqlite_store):
    def quantized(content):
        content["config"]["model_args"] += ",load_in_4bit=True,peft=./adapter"

    imported(sqlite_store, change(output, quantized))
    frame = queries.results(sqlite_store)
    assert set(frame["method"]) == {"lm-eval:load_in_4bit=True:peft=./adapter"}
    assert frame["options"].iloc[0] == {"load_in_4bit": "True", "peft": "./adapter"}


# --- beside our own rows ------------------------------------------------------------------------------


def own_scores(store, genuine):
    """The same model and task through the harness' own engine."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from harness.evaluate.engine import evaluate_task
    from harness.evaluate.index import resolve_tasks
    from harness.models.info import info_from_config

    folder = genuine.parent / "model"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    (task,) = resolve_tasks(["tiny_words"], [genuine.parent])
    found = evaluate_task(
        task, model, AutoTokenizer.from_pretrained(folder), info_from_config(model.config, "m"),
        limit=None, seed=0, batch_size=4,
    )  # fmt: skip
    variant = make_variant(
        model=str(folder), method="baseline", family="baseline", device_name="",
        chain=[{"name": "baseline", "options": {}}],
    )  # fmt: skip
    sweep = begin_sweep(store, variant, manifest={"workload": {"tasks": {"tiny_words": task.revision}}})
    write_task(store, sweep, make_result(records=found.records, items=found.items), task="tiny_words")
    return found


def test_our_rows_and_theirs_are_paired_by_their_documents(genuine, output, harness, tmp_path):
    with Store.open(tmp_path / "ours.db") as store:
        own_scores(store, genuine)
    # Their documents in another order: the place says nothing.
    file = samples_file(output, "tiny_words")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for place, line in enumerate(reversed(lines)):
        line["doc_id"] = place
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, err = harness("compare", "ours.db", output, "--metrics", "acc", "--format", "json")
    assert code == 0, err
    (row,) = json.loads(out)
    assert (row["cell"], row["basis"], row["n"], row["flips"]) == ("tiny_words", "items", 6, 0)
    assert "only in b" in err  # tasks that we did not score
    # Another document: these are not the same items.
    lines[0]["doc_hash"] = lines[0]["doc_hash"][::-1]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    change(output, lambda content: content.pop("task_hashes"))
    code, _, err = harness("compare", "ours.db", output, "--metrics", "acc")
    assert code == 2
    assert "differ in items: 6 and 6 with 5 in common" in err


# --- out ----------------------------------------------------------------------------------------------


def test_lm_evals_files_come_back_byte_by_byte(output, store, tmp_path):
    imported(store, output)
    done = export_lm_eval(store, tmp_path / "back", Wanted(), with_host=True)
    assert (done.files, done.tasks, done.samples, done.left_out) == (1, 5, 6 * 4 + 6, 0)
    files = sorted(file.relative_to(output) for file in output.rglob("*.json*"))
    assert files == sorted(
        file.relative_to(tmp_path / "back") for file in (tmp_path / "back").rglob("*.json*")
    )
    for file in files:
        assert (tmp_path / "back" / file).read_bytes() == (output / file).read_bytes()


def test_only_some_tasks_of_lm_evals_come_back(output, sqlite_store, tmp_path):
    imported(sqlite_store, output)
    export_lm_eval(sqlite_store, tmp_path / "back", Wanted(tasks=["tiny_words"]))
    (read,) = read_lm_eval(tmp_path / "back")
    assert [cell.values["task"] for cell in read.variants[0].children] == ["tiny_words"]


@pytest.fixture
def scored(tmp_path):
    """A store with scores of every kind that we have, beside a time and a failure."""
    with Store.open(tmp_path / "scored.db") as store:
        sweep = begin_sweep(store, make_variant(), manifest={"sweep_uid": "s", "device": "cpu"})
        records = (
            Record("acc", 0.75, "fraction", 0.3, 0.95, 4, note="limit=4"),
            Record("exact_match,strict-match", 0.5, "fraction", None, None, 4),
            Record("acc/tiny_part", 1.0, "fraction", n=2),
            Record("target_perplexity", math.inf, "ppl", n=4),
            Record("token_perplexity", 12.5, "ppl", 12.0, 13.0, 64),
        )
        items = [
            Item(i, "acc", float(i != 2), {"loglikelihoods": [-1.5, -2.5], "target": 0}) for i in range(4)
        ]
        items += [
            Item(i, "exact_match,strict-match", float(i % 2), {"response": "ü\ud83d\ude00"}) for i in range(4)
        ]
        items += [Item(i, "target_nll", (math.nan, math.inf, 2.0, 3.0)[i]) for i in range(4)]
        items += [Item(i, "nll", 2.5, {"tokens": 16}) for i in range(4)]
        write_task(store, sweep, make_result(records=records, items=tuple(items)), task="tiny")
        write_task(store, sweep, make_result("b", records=records[:1], items=()), task="../../etc/x y")
        speed = make_result("c", records=(Record("latency", 1.0, "s", samples=(1.0,)),), items=())
        store.write_cell(sweep, speed, kind=CellKind.SCENARIO, task=None, scenario="b1-p8-g2")
        write_task(store, sweep, CellResult("d", "variant-a", Status.OOM, reason="full"), task="large")
        store.close_sweep(sweep, "finished", {})
        yield store


def test_our_scores_come_back_as_they_were(scored, store, tmp_path):
    done = export_lm_eval(scored, tmp_path / "out", Wanted())
    assert (done.files, done.tasks, done.left_out) == (1, 2, 2)
    imported(store, tmp_path / "out")
    wanted = {"statuses": ["ok"], "tasks": ["tiny", "../../etc/x y"]}
    assert export(store, tmp_path / "back.jsonl", **wanted) == export(scored, tmp_path / "a.jsonl", **wanted)


def test_a_hostile_name_stays_inside_the_folder(scored, tmp_path):
    (tmp_path / "deep").mkdir()
    export_lm_eval(scored, tmp_path / "deep" / "out", Wanted())
    files = [file for file in tmp_path.rglob("*") if file.is_file() and "scored.db" not in file.name]
    assert files
    assert all(file.is_relative_to(tmp_path / "deep" / "out") for file in files)
    assert safe_name("..") != ".."
    assert safe_name("a/b") != safe_name("a:b")
    assert len(safe_name("x" * 5000)) < 150
    assert len(safe_name("语" * 5000).encode()) < 150


def test_a_task_may_be_called_as_lm_eval_lets_it(output, sqlite_store):
    """lm-eval takes the name of a task into the name of its file as it is."""
    file = samples_file(output, "tiny_words")
    file.rename(file.with_name(file.name.replace("tiny_words", "é: tiny")))

    def renamed(content):
        content["results"]["é: tiny"] = content["results"].pop("tiny_words")
        content["configs"]["é: tiny"] = content["configs"].pop("tiny_words")

    change(output, renamed)
    imported(sqlite_store, output)
    frame = queries.results(sqlite_store, tasks=["é: tiny"])
    assert len(sqlite_store.items(int(frame["cell"].iloc[0]))) == 6


def test_lm_evals_own_tools_read_our_files(scored, tmp_path, monkeypatch):
    """Its table, its naming of files, and the reader of data sets that it publishes samples with."""
    from datasets import load_dataset
    from lm_eval.utils import (
        get_file_task_name,
        get_results_filenames,
        get_sample_results_filenames,
        make_table,
    )

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    export_lm_eval(scored, tmp_path / "out", Wanted(tasks=["tiny"]))
    content = json.loads(results_file(tmp_path / "out").read_text())
    table = make_table(content)
    assert "|acc" in table.replace(" ", "")
    assert "0.75" in table
    files = [str(file) for file in (tmp_path / "out").rglob("*.json*")]
    assert len(get_results_filenames(files)) == len(get_sample_results_filenames(files)) == 1
    (samples,) = get_sample_results_filenames(files)
    assert get_file_task_name(samples.rpartition("/")[2]) == "tiny"
    rows = load_dataset("json", data_files=samples, split="train", cache_dir=str(tmp_path / "cache"))
    acc = [row["acc"] for row in rows if row["filter"] == "none"]
    assert acc == [1.0, 1.0, 0.0, 1.0]
    assert [row["target_nll"] for row in rows if row["filter"] == "none"] == [None, None, 2.0, 3.0]
    assert {row["filter"] for row in rows} == {"none", "strict-match", "windows"}


def test_a_standard_error_is_lm_evals(scored, tmp_path):
    from lm_eval.api.metrics import mean_stderr

    export_lm_eval(scored, tmp_path / "out", Wanted(tasks=["tiny"]))
    entry = json.loads(results_file(tmp_path / "out").read_text())["results"]["tiny"]
    assert entry["acc_stderr,none"] == pytest.approx(mean_stderr([1.0, 1.0, 0.0, 1.0]))
    assert entry["perplexity,none"] == "N/A"


def test_nothing_is_written_over(scored, tmp_path, harness):
    export = ("results", "export", "out", "--layout", "lm-eval", "--db", "scored.db")
    code, out, err = harness(*export)
    assert (code, out) == (0, "out: 1 results file, 2 tasks, 12 samples\n")
    assert "2 cells without scores left out" in err
    code, _, err = harness(*export)
    assert code == 2
    assert "out is there and not an empty folder" in err
    code, _, err = harness(*export[:2], "new", *export[3:], "--methods", "none")
    assert code == 2
    assert not (tmp_path / "new").exists()


# --- what is refused ----------------------------------------------------------------------------------


def _set(*path, value):
    def how(content):
        *parents, last = path
        for name in parents:
            content = content[name]
        content[last] = value

    return how


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (_set("results", value={}), "results: Dictionary should have at least 1 item"),
        (_set("results", value=[]), "not lm-eval's results"),
        (_set("results", "tiny_words", value=3), "results.tiny_words: Input should be a valid dictionary"),
        (_set("results", value={"a\0b": {}}), "results"),
        (_set("date", value=1e300), "date: Input should be less than"),
        (_set("date", value="now"), "date: Input should be a valid number"),
        (_set("config", "random_seed", value=2**70), "config.random_seed"),
        (_set("config", value=[]), "config: Input should be a valid dictionary"),
        (_set("n-samples", "tiny_words", "effective", value=-1), "n-samples.tiny_words.effective"),
        (_set("model_name", value="x" * 5000), "model_name: String should have at most 1000"),
        (_set("task_hashes", "tiny_words", value="0" * 64), "the samples of tiny_words are not those of"),
        (lambda content: content["results"].pop("tiny_words") and content["configs"].pop("tiny_words"),
         "belongs to no task of"),
    ],
)  # fmt: skip
def test_a_wrong_results_file_is_one_error_and_nothing_is_imported(output, harness, how, said, tmp_path):
    change(output, how)
    code, out, err = harness("results", "import", output, "--db", "new.db")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert "results_" in err
    assert not (tmp_path / "new.db").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: : Input should be a valid dictionary"),
        ('{"doc_id": -1}', "line 2: doc_id: Input should be greater than"),
        ('{"doc_id": "0"}', "line 2: doc_id: Input should be a valid integer"),
        ('{"doc_id": 0, "filter": "none"}', "line 2: document 0 was on line 1 already"),
        ('{"doc_id": 1e999}', "line 2: 1e999 is too large for a number"),
        ('{"doc_id": 1, "metrics": ["a"], "a": ' + "[" * 100 + "]" * 100 + "}", "line 2: nested more than"),
        ('{"doc_id": 1, "doc_hash": "../x"}', "line 2: doc_hash: String should match pattern"),
    ],
)
def test_a_wrong_sample_is_named_by_its_line(output, harness, line, said, tmp_path):
    file = samples_file(output, "tiny_words")
    file.write_text(f"{file.read_text().splitlines()[0]}\n{line}\n")
    code, _, err = harness("results", "import", output, "--db", "new.db")
    assert code == 2
    assert f"{file.name}, {said}" in err
    assert not (tmp_path / "new.db").exists()


def test_numbers_that_are_none_and_numbers_that_are_huge(output, sqlite_store):
    def how(content):
        entry = content["results"]["tiny_words"]
        entry |= {"acc,none": math.nan, "acc_stderr,none": "N/A", "big,none": 10**400, "empty,none": " "}
        content["task_hashes"] = {}

    change(output, how)
    imported(sqlite_store, output)
    row = queries.results(sqlite_store, tasks=["tiny_words"]).iloc[0]
    assert (row["metric"], math.isnan(row["value"]), row["note"]) == ("acc", True, None)


def test_samples_alone_and_other_folders_are_refused(output, harness, tmp_path):
    for place, said in (
        (samples_file(output, "tiny_words"), "name the results_*.json beside it"),
        (output.parent, None),
        ("none.json", "does not exist"),
    ):
        code, _, err = harness("results", "import", place, "--db", "new.db")
        assert (code, said is None or said in err) == ((0, True) if said is None else (2, True))
    (tmp_path / "empty").mkdir()
    code, _, err = harness("results", "import", "empty")
    assert "holds no results_*.json of lm-eval" in err


def test_escape_codes_in_names_move_no_cursor(output, harness):
    change(output, lambda content: content.update(model_name="m\x1b[2J", task_hashes={}))
    assert harness("results", "import", output)[0] == 0
    _, out, err = harness("results")
    assert "\x1b" not in out + err


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("results", "tiny", "acc,none"), 0.99, "acc of tiny is 0.99 in results and 0.75 under harness"),
        (("harness", "rows"), None, "harness holds no rows"),
        (("harness", "version"), 99, "is of version 99 of the format"),
    ],
)
def test_our_part_and_lm_evals_must_agree(scored, tmp_path, place, value, said):
    export_lm_eval(scored, tmp_path / "out", Wanted())
    change(tmp_path / "out", _set(*place, value=value))
    with pytest.raises(ConfigError, match=said):
        read_lm_eval(tmp_path / "out")


def test_a_changed_outcome_in_a_sample_is_named(scored, tmp_path):
    export_lm_eval(scored, tmp_path / "out", Wanted(tasks=["tiny"]))
    file = samples_file(tmp_path / "out", "tiny")
    file.write_text(file.read_text().replace('"acc": 0.0', '"acc": 1.0', 1))
    with pytest.raises(ConfigError, match=r"line 3: acc is 1.0 in the sample and 0.0 under harness"):
        read_lm_eval(tmp_path / "out")


# --- from another store -------------------------------------------------------------------------------


def test_another_store_is_imported_with_all_that_explains_it(harness, tmp_path):
    with Store.open(tmp_path / "theirs.db") as store:
        fill(store)
        expected = export(store, tmp_path / "a.jsonl", with_host=True)
    code, out, err = harness("results", "import", "theirs.db", "--db", "mine.db")
    assert (code, out, err) == (0, "theirs.db: 5 cells imported, 2 new sweeps\n", "")
    with Store.open_readonly(tmp_path / "mine.db") as store:
        assert export(store, tmp_path / "b.jsonl", with_host=True) == expected
        assert set(queries.results(store)["origin"]) == {"theirs.db"}
    assert harness("results", "import", "theirs.db", "--db", "mine.db")[1].startswith(
        "theirs.db: nothing new"
    )
    assert "left out that this store measured itself" in harness(
        "results", "import", "theirs.db", "--db", "theirs.db"
    )[1]  # fmt: skip
    code, _, err = harness("results", "import", "none.db", "--db", "new.db")
    assert code == 2
    assert "no results store at" in err
    assert not (tmp_path / "new.db").exists()


def test_a_store_on_a_server_is_imported_by_its_url(store, target, harness, tmp_path):
    fill(store)
    code, out, _ = harness("results", "import", target, "--db", "mine.db")
    assert code == 0
    assert out.endswith(": 5 cells imported, 2 new sweeps\n")
