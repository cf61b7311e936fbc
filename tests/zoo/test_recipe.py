"""The recipe from text files to a checkpoint with its card, on tiny text and a tiny model."""

from __future__ import annotations

import gzip
import json
import lzma
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.zoo.recipe import main

TINY = ["--layers=1", "--width=32", "--heads=2", "--ffn-width=64", "--context-tokens=32", "--vocab-size=300"]
TINY += ["--batch-sequences=4", "--device=cpu"]
WORDS = ("the", "of", "a", "king", "said", "unto", "him", "that", "house", "day", "land", "and", "great")


@pytest.fixture(scope="module")
def text_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=12)).capitalize() + "." for _ in range(400)]
    (folder / "plain.txt").write_text("\n".join(lines[:200]) + "\n\n\n" + lines[200], "utf-8")
    (folder / "packed.txt.xz").write_bytes(lzma.compress("\n".join(lines[200:300]).encode()))
    (folder / "dev.txt.gz").write_bytes(gzip.compress("\n\n\n".join(lines[300:]).encode()))
    pairs = [{"sentence_good": line, "sentence_bad": line[::-1]} for line in lines[:20]]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), "utf-8")
    (folder / "empty.txt").write_text(" \n\n\n \n", "utf-8")
    return folder


def _run(text_files, out, *extra, arch="llama"):
    files = ["--text", str(text_files / "plain.txt"), "--text", str(text_files / "packed.txt.xz")]
    return main(["--arch", arch, *files, "--out", str(out), *TINY, *extra])


@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_text_becomes_a_checkpoint_with_a_card(text_files, tmp_path, arch):
    out = tmp_path / "tiny"
    evaluation = ["--eval-text", str(text_files / "dev.txt.gz")]
    evaluation += ["--minimal-pairs", str(text_files / "pairs.jsonl")]
    extra = [*evaluation, "--steps", "30", "--learning-rate", "1e-2", "--checkpoint-steps", "0,50%,20"]
    assert _run(text_files, out, *extra, arch=arch) == 0

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.float16
    assert len(tokenizer) <= 300
    assert sorted(path.name for path in out.glob("step-*")) == ["step-0", "step-15", "step-20"]
    schedule = json.loads((out / "schedule.json").read_text("utf-8"))
    assert schedule["steps"] == 30
    assert schedule["checkpoint_steps"] == [0, 15, 20]
    assert schedule["tokens"] == 30 * 4 * 32
    losses = [entry["loss_nats"] for entry in schedule["history"]]
    assert losses[-1] < losses[0] - 0.5
    bits, bare, spaced = json.loads((out / "recipe.json").read_text("utf-8"))["results"]
    assert 0 < bits["value"] < 4
    assert bare["n"] == spaced["n"] == 20
    card = (out / "README.md").read_text("utf-8")
    assert "--text plain.txt --text packed.txt.xz" in card
    assert str(text_files) not in card
    assert str(tmp_path) not in card


def test_the_same_seed_gives_the_same_weights(text_files, tmp_path):
    for name in ("first", "second"):
        assert _run(text_files, tmp_path / name, "--steps", "3") == 0
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second


def test_a_budget_in_seconds_ends_the_run(text_files, tmp_path):
    assert _run(text_files, tmp_path / "timed", "--seconds", "0.2") == 0
    assert json.loads((tmp_path / "timed" / "schedule.json").read_text("utf-8"))["steps"] > 0


def test_an_earlier_tokenizer_is_reused(text_files, tmp_path):
    assert _run(text_files, tmp_path / "first", "--steps", "1") == 0
    assert _run(text_files, tmp_path / "second", "--steps", "1", "--tokenizer", str(tmp_path / "first")) == 0
    files = [tmp_path / name / "tokenizer.json" for name in ("first", "second")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "absent.txt"], "no such text file"),
        (["--text", "EMPTY"], "no text in"),
        (["--text", "PAIRS", "--eval-text", "absent.txt"], "no such text file"),
        (["--text", "PAIRS", "--minimal-pairs", "absent.jsonl"], "no such file of minimal pairs"),
        (["--text", "PAIRS", "--minimal-pairs", "EMPTY"], "no minimal pairs in"),
        (["--text", "PAIRS", "--minimal-pairs", "PLAIN"], "cannot read minimal pairs"),
        (["--text", "PAIRS", "--checkpoint-steps", "soon"], "neither a number of steps"),
        (["--text", "PAIRS", "--checkpoint-steps", "120%"], "lies outside the run"),
        (["--text", "PAIRS", "--context-tokens", "100000"], "too few for sequences"),
        (["--text", "PAIRS", "--heads", "5"], "not divisible by 5 heads"),
        (["--text", "PAIRS", "--vocab-size", "10"], "at least 258 tokens"),
        (["--text", "PAIRS", "--tokenizer", "absent"], "no tokenizer.json"),
        ([], "no training text"),
    ],
)
def test_what_cannot_be_used_is_one_clear_line(text_files, tmp_path, capsys, arguments, message):
    places = {"EMPTY": "empty.txt", "PAIRS": "pairs.jsonl", "PLAIN": "plain.txt"}
    arguments = [str(text_files / places[word]) if word in places else word for word in arguments]
    code = main(["--arch", "llama", "--steps", "1", "--out", str(tmp_path / "x"), *TINY, *arguments])
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()
