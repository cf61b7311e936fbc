"""The parts of the recipe, each against an independent computation."""

from __future__ import annotations

import math
from itertools import islice

import numpy as np
import pytest
import torch

from harness.errors import ConfigError, NumericalFailure
from harness.zoo.architectures import Architecture, build_model
from harness.zoo.corpus import (
    Source,
    fragments,
    split_documents,
    split_sentences,
    token_stream,
    training_batches,
)
from harness.zoo.evaluation import MinimalPair, bits_per_byte, minimal_pair_accuracy
from harness.zoo.tokenizer import train_tokenizer
from harness.zoo.training import Budget, Hyperparameters, learning_rate_factor, train

TEXTS = ["And it came to pass, in the days of old. " * 6, "Who said so? I did.", "é" * 40]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=290, context_tokens=16)


@pytest.fixture(scope="module", params=["llama", "opt"])
def model(request, tokenizer):
    torch.manual_seed(0)
    shape = Architecture(request.param, layers=2, ffn_width=64, width=32, heads=2, context_tokens=16)
    model = build_model(shape, tokenizer).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # random enough to tell tokens apart
    return model


def _bits_by_hand(model, tokenizer, text, window_tokens):
    """One token at a time, without batches or padding."""
    ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
    bits = 0.0
    for position in range(1, len(ids)):
        first = (position - 1) // window_tokens * window_tokens
        with torch.no_grad():
            logits = model(torch.tensor([ids[first:position]])).logits[0, -1].double()
        bits -= torch.log_softmax(logits, -1)[ids[position]].item() / math.log(2)
    return bits


def test_bits_per_byte_agrees_with_a_loop_over_single_tokens(model, tokenizer):
    measured = bits_per_byte(model, tokenizer, TEXTS, window_tokens=16)
    expected = sum(_bits_by_hand(model, tokenizer, text, 16) for text in TEXTS)
    assert measured.bits == pytest.approx(expected, rel=1e-4)
    assert measured.bytes == sum(len(text.encode()) for text in TEXTS)
    assert measured.tokens == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    assert measured.value == pytest.approx(expected / measured.bytes, rel=1e-4)


def test_minimal_pairs_agree_with_the_loop(model, tokenizer):
    pairs = [MinimalPair("I did so.", "so I did."), MinimalPair("in old days", "in days of old")]
    for delimiter in ("", " "):
        expected = [
            _bits_by_hand(model, tokenizer, delimiter + pair.good, 16)
            < _bits_by_hand(model, tokenizer, delimiter + pair.bad, 16)
            for pair in pairs
        ]
        accuracy = minimal_pair_accuracy(model, tokenizer, pairs, delimiter=delimiter)
        assert accuracy == sum(expected) / 2


def test_no_text_cannot_be_evaluated(model, tokenizer):
    with pytest.raises(ConfigError, match="no text"):
        bits_per_byte(model, tokenizer, [])


def test_documents_are_parted_by_two_blank_lines():
    assert split_documents("a\n\nb\n\n\nc\r\n\r\n\r\n\n d \n") == ("a\n\nb", "c", "d")
    assert split_documents(" \n\n\n ") == ()


def test_sentences_lose_only_the_space_between_them():
    line = 'He said, "Go!" Then he went. Was it so? Yes (it was).'
    assert split_sentences(line) == ['He said, "Go!"', "Then he went.", "Was it so?", "Yes (it was)."]


def test_all_fragments_together_are_the_text_again():
    line = "This is the first sentence of it. " * 20
    source = Source("x", (f"A title\n\n{line.strip()}",))
    cut = fragments(source, share=1.0, seed=0)
    assert " ".join(cut.documents) == line.strip()
    assert len(cut.documents) > 1
    assert fragments(source, share=0.0, seed=0).documents == ()


def test_the_stream_parts_and_repeats_documents(tokenizer):
    stream = token_stream(tokenizer, [Source("x", ("I did", "so"), repeats=2)])
    assert tokenizer.decode(stream.tolist()) == "<|endoftext|>".join(["", "I did", "so", "I did", "so", ""])


def test_an_epoch_visits_every_window_once():
    stream = np.arange(1000, dtype=np.uint16)
    batches = training_batches(stream, sequences=3, length=10, seed=0, device=torch.device("cpu"))
    starts = [int(start) for batch in islice(batches, 33) for start in batch[:, 0]]
    assert len(set(starts)) == 99
    assert len({start % 10 for start in starts}) == 1
    batch = next(batches)
    assert batch.shape == (3, 11)
    assert (batch[:, 1:] - batch[:, :-1] == 1).all()


def test_learning_rate_rises_then_falls_to_the_floor():
    rates = [learning_rate_factor(progress / 100, 0.1, 0.02) for progress in range(101)]
    assert rates[0] == 0
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.51)
    assert rates[100] == pytest.approx(0.02)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_diverged_run_is_an_error(model, tokenizer):
    broken = build_model(
        Architecture("llama", layers=1, ffn_width=32, width=32, heads=2, context_tokens=16), tokenizer
    )
    torch.nn.init.constant_(broken.get_input_embeddings().weight, math.nan)
    batches = iter(lambda: torch.ones(2, 17, dtype=torch.long), None)
    with pytest.raises(NumericalFailure, match="diverged"):
        train(broken, batches, Budget(steps=2), Hyperparameters(), log=lambda line: None)
