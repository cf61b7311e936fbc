"""Requests in tokens: the same as lm-eval's own, and kept by content."""

from __future__ import annotations

import copy

import pytest

from harness.cache import ContentCache
from harness.errors import ConfigError
from harness.evaluate.encoding import Encoder, tokenizer_identity

from .conftest import POSITIONS, make_llama

PAIRS = [
    ("In the beginning", " God created"),
    ("In the beginning ", "God created"),  # the space belongs to the next word
    ("In the beginning", " God"),
    ("", "And the earth was without form"),
    ("And God said, ", " Let"),
    ("the waters " * 200, "under the heaven"),  # longer than the model
    ("<end>In the beginning", " God"),
    ("", "<end>In the beginning"),
    ("In the b", "eginning God created the heaven"),  # a token lies across the border
]
TEXTS = ["And the evening and the morning were the first day. " * 30, "And God", ""]


def encoder(tokenizer, cache=None):
    return Encoder(tokenizer, POSITIONS, tokenizer.eos_token_id, cache)


@pytest.fixture
def theirs(tokenizer):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=make_llama(), tokenizer=copy.deepcopy(tokenizer), max_length=POSITIONS)


class _Request:
    def __init__(self, *args):
        self.args = args


@pytest.mark.parametrize("adds_start", [False, True])
def test_pairs_are_lm_evals(tokenizer, theirs, adds_start, monkeypatch):
    if adds_start:
        tokenizer = copy.deepcopy(tokenizer)
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<end> $A", special_tokens=[("<end>", tokenizer.eos_token_id)]
        )
        theirs.tokenizer = tokenizer
        assert tokenizer("God")["input_ids"][0] == tokenizer.eos_token_id
    asked = []
    monkeypatch.setattr(theirs, "_loglikelihood_tokens", lambda requests, **_: asked.extend(requests) or [])
    theirs.loglikelihood([_Request(*pair) for pair in PAIRS], disable_tqdm=True)
    expected = [(tuple(c + rest)[-(POSITIONS + 1) :], len(rest)) for _, c, rest in asked]
    found = encoder(tokenizer).pairs(PAIRS)
    assert [(query.tokens, query.scored) for query in found] == expected
    across = list(found[-1].tokens)
    assert across != tokenizer("".join(PAIRS[-1]))["input_ids"][-len(across) :]
    assert tokenizer.decode(across[: -found[-1].scored]).endswith(PAIRS[-1][0])


def test_windows_of_texts_are_lm_evals(tokenizer, theirs, monkeypatch):
    asked = []

    def noted(requests, **_):
        asked.extend((tuple(c + rest), len(rest)) for _, c, rest in requests)
        return [(0.0, True)] * len(requests)

    monkeypatch.setattr(theirs, "_loglikelihood_tokens", noted)
    theirs.loglikelihood_rolling([_Request(text) for text in TEXTS], disable_tqdm=True)
    found = encoder(tokenizer).texts(TEXTS)
    assert [(query.tokens, query.scored) for group in found for query in group] == asked
    assert len(found[0]) > 1
    assert found[2] == []
    scored = sum(query.scored for query in found[0])
    assert scored == len(tokenizer(TEXTS[0])["input_ids"])


def test_what_cannot_be_scored_is_one_clear_line(tokenizer):
    with pytest.raises(ConfigError, match="nothing to score: ''"):
        encoder(tokenizer).pairs([("In the beginning", "")])
    with pytest.raises(ConfigError, match=f"the model has {POSITIONS} positions"):
        encoder(tokenizer).pairs([("In", " the waters" * POSITIONS)])


def test_requests_are_tokenised_once_for_all_variants(tokenizer, tmp_path):
    cache = ContentCache(tmp_path)
    first = encoder(tokenizer, cache)
    pairs, texts = first.pairs(PAIRS), first.texts(TEXTS)
    assert len(list(tmp_path.rglob("*.pt"))) == 2

    same = copy.deepcopy(tokenizer)
    same._encode_plus = same._batch_encode_plus = None  # to tokenise again would fail
    assert encoder(same, cache).pairs(PAIRS) == pairs
    assert encoder(same, cache).texts(TEXTS) == texts
    with pytest.raises(TypeError):
        encoder(same, cache).pairs(PAIRS[:2])


def test_what_a_call_leaves_behind_is_not_in_the_key(tokenizer):
    used = copy.deepcopy(tokenizer)
    used.pad_token = used.eos_token
    before, written = tokenizer_identity(used), used.backend_tokenizer.to_str()
    used(list(TEXTS), padding=True, truncation=True, max_length=4)
    assert used.backend_tokenizer.to_str() != written
    assert tokenizer_identity(used) == before


def test_everything_that_decides_the_tokens_is_in_the_key(tokenizer, tmp_path):
    cache = ContentCache(tmp_path)
    encoder(tokenizer, cache).pairs(PAIRS)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["beginning"])
    assert tokenizer_identity(other) != tokenizer_identity(tokenizer)
    changed = [
        encoder(other, cache),
        Encoder(tokenizer, POSITIONS - 1, tokenizer.eos_token_id, cache),
        Encoder(tokenizer, POSITIONS, 5, cache),
    ]
    for number, each in enumerate(changed, start=2):
        each.pairs(PAIRS)
        assert len(list(tmp_path.rglob("*.pt"))) == number
    assert changed[0].pairs(PAIRS[:1]) != encoder(tokenizer, cache).pairs(PAIRS[:1])


def test_a_tokenizer_that_is_a_program_is_not_kept(tokenizer, tmp_path):
    class Program:
        """Splits at letters; its content cannot be told."""

        def __call__(self, texts, **_):
            return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

        def decode(self, _):
            return "<end>"

    assert tokenizer_identity(Program()) is None
    (query,) = Encoder(Program(), 8, 1, ContentCache(tmp_path)).pairs([("ab", "cd")])
    assert (query.tokens, query.scored) == ((97, 98, 99, 100), 2)
    assert not list(tmp_path.rglob("*"))
