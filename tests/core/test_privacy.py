from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.privacy import in_texts, without_identity, without_passwords


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("cannot read /home/jane/models/x.bin, sorry", "cannot read <path>/x.bin, sorry"),
        ("'/home/jane/models'", "'<path>/models'"),
        ("~/models/x and ~jane/models/x", "<path>/x and <path>/x"),
        ("--text=/data/kjv.txt", "--text=<path>/kjv.txt"),
        ("-I/home/jane/include", "-I<path>/include"),
        ("cannot write /home/jane: full", "cannot write <path>: full"),
        ("/Users/jane/ and /home/jane/x", "<path> and <path>/x"),
        ("see:/opt/x/y", "see:<path>/y"),
        ("file:///home/jane/x", "<path>/x"),
        ("[/a/b,/c/d]", "[<path>/b,<path>/d]"),
        ("postgresql://me:s3cret@host/db", "postgresql://me:***@host/db"),
        # What is no place on a machine stays.
        ("12 tokens/s at b1-p8/g3, a/b/c", "12 tokens/s at b1-p8/g3, a/b/c"),
        ("./model ../x/y", "./model ../x/y"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("meta-llama/Llama-3.1-8B@main", "meta-llama/Llama-3.1-8B@main"),
        (r"model\.layers\.\d+\.(q|k)_proj", r"model\.layers\.\d+\.(q|k)_proj"),
        ("/", "/"),
    ],
)
def test_places(text, kept):
    assert without_identity(text) == kept


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"HF_TOKEN=hf_{'aB3' * 11} harness sweep", "HF_TOKEN=hf_*** harness sweep"),
        ("pip install git+https://ghp123@host/x", "pip install git+https://***@host/x"),
        ("https://me:ghp123@host/x", "https://me:***@host/x"),
        (
            "https://host/x@main and postgresql://me@host/db",
            "https://host/x@main and postgresql://me@host/db",
        ),
        ("huggingface_hub.hf_hub_download, hf_transfer", "huggingface_hub.hf_hub_download, hf_transfer"),
    ],
)
def test_tokens(text, kept):
    assert without_passwords(text) == kept
    assert without_passwords(kept) == kept


def test_a_password_is_hidden_in_a_text_without_a_path_too():
    assert without_identity("cannot log in (user=me password=s3cret") == "cannot log in (user=me password=***"


def test_names_of_machines_are_whole_words():
    assert without_identity("box-17 and box-171 on box-17", ["box-17"]) == "<host> and box-171 on <host>"
    assert without_identity("a vm in kvm", ["vm"]) == "a vm in kvm", "too short to be told from a word"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("postgresql+psycopg://me:s3cret@host/db", "postgresql+psycopg://me:***@host/db"),
        ("postgresql://me:s3/cr@et@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me@host/db?password=s3cret&x=1", "postgresql://me@host/db?password=***&x=1"),
        ("sweep --db 'postgresql://me:s3cret@h/d' -q", "sweep --db 'postgresql://me:***@h/d' -q"),
        ("postgresql://me@host:5432/db", "postgresql://me@host:5432/db"),
        ("gptq:bits=3 at 10:30", "gptq:bits=3 at 10:30"),
    ],
)  # fmt: skip
def test_passwords(text, kept):
    assert without_passwords(text) == kept


@settings(max_examples=300, deadline=None)
@given(st.text("ab/~.:>< -'@", max_size=40))
def test_twice_changes_nothing_more(text):
    once = without_identity(text, ["abba"])
    assert without_identity(once, ["abba"]) == once


def test_every_text_of_a_value():
    assert in_texts({"a": ["b", 1, None, True, ("c",)]}, str.upper) == {"A": ["B", 1, None, True, ["C"]]}
