"""Sentence embeddings against one plain call a sentence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.errors import ConfigError, NotApplicable, NumericalFailure
from harness.evaluate.embedding import Embedder, cosine_distance
from harness.models.info import info_from_config

from .conftest import POSITIONS, VOCAB

SENTENCES = [
    "In the beginning God created the heaven and the earth.",
    "And the earth was without form,",
    "and void;",
    "And God said, Let there be light: and there was light.",
    "and void;",
    "And God saw the light, that it was good: and God divided the light from the darkness.",
]


def make_bert(head=False, **changes):
    from transformers import BertConfig, BertForMaskedLM, BertModel

    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.2,
    }
    config = BertConfig(**{**sizes, **changes})
    return (BertForMaskedLM(config) if head else BertModel(config, add_pooling_layer=False)).eval()


@pytest.fixture
def bert():
    return make_bert()


def embedder(model, tokenizer, batch_size=8):
    config = getattr(model, "config", None) or make_bert().config
    return Embedder(model, tokenizer, info_from_config(config, "small-bert"), batch_size=batch_size)


@torch.no_grad()
def plainly(model, tokenizer, sentence):
    """The mean of the last hidden states of one sentence, of length 1."""
    output = model(torch.tensor([tokenizer(sentence)["input_ids"]]), output_hidden_states=True)
    mean = output.hidden_states[-1][0].mean(0)
    return mean / mean.norm()


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_embeddings_are_those_of_single_calls(head, batch_size, tokenizer):
    model = make_bert(head)
    found = embedder(model, tokenizer, batch_size).embed(SENTENCES)
    expected = torch.stack([plainly(model, tokenizer, sentence) for sentence in SENTENCES])
    assert found.vectors.dtype == torch.float32
    torch.testing.assert_close(found.vectors, expected, atol=1e-6, rtol=1e-5)
    assert found.note == ""
    assert cosine_distance(found.vectors, found.vectors).tolist() == [0.0] * len(SENTENCES)


def test_equal_sentences_are_computed_once(bert, tokenizer):
    rows = []
    bert.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    together = embedder(bert, tokenizer)
    together.embed(SENTENCES)
    tried = 1 + 3 + 3  # the first call asks twice for what the model gives; padding is tried on three
    assert sum(rows) <= tried + len(set(SENTENCES))


class Deaf(nn.Module):
    """An encoder that does not hear of padding."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, input_ids, attention_mask=None):
        return self.inner(input_ids)


def test_a_model_that_reads_padding_gets_none(bert, tokenizer):
    found = embedder(Deaf(bert), tokenizer).embed(SENTENCES)
    expected = torch.stack([plainly(bert, tokenizer, sentence) for sentence in SENTENCES])
    torch.testing.assert_close(found.vectors, expected, atol=1e-6, rtol=1e-5)
    assert "padding changes" in found.note


def test_long_sentences_are_cut_and_counted(bert, tokenizer):
    long = " ".join(SENTENCES * 20)
    found = embedder(bert, tokenizer).embed([long, "and void;"])
    assert f"1 sentences of {POSITIONS} tokens or more were cut" in found.note


class Small(nn.Module):
    """Has memory for so many rows at a time."""

    def __init__(self, inner, rows):
        super().__init__()
        self.inner, self.config, self.rows = inner, inner.config, rows

    def forward(self, input_ids, attention_mask=None):
        if len(input_ids) > self.rows:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return self.inner(input_ids, attention_mask)


def test_out_of_memory_halves_the_batch(bert, tokenizer):
    many = [f"And God said unto {number}," for number in range(40)]
    expected = embedder(bert, tokenizer).embed(many).vectors
    torch.testing.assert_close(embedder(Small(bert, 3), tokenizer).embed(many).vectors, expected)
    with pytest.raises(RuntimeError, match="can't allocate"):
        embedder(Small(bert, 0), tokenizer).embed(many)


def test_what_cannot_be_embedded(bert, tokenizer):
    with torch.no_grad():
        bert.encoder.layer[1].output.LayerNorm.weight[0] = float("nan")
    with pytest.raises(NumericalFailure, match="6 of 6 embeddings"):
        embedder(bert, tokenizer).embed(SENTENCES)
    with pytest.raises(ConfigError, match="belongs to another model"):
        embedder(make_bert(vocab_size=4), tokenizer).embed(SENTENCES)
    with pytest.raises(NotApplicable, match="no tokenizer"):
        embedder(bert, None)


def test_the_distance_is_one_minus_cosine():
    a, b = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    expected = 1 - nn.functional.cosine_similarity(a.double(), b.double(), dim=1)
    torch.testing.assert_close(cosine_distance(a, b), expected)
