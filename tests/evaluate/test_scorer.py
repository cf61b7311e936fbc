"""Scores of planned queries, against a plain call of the model on each sequence alone."""

from __future__ import annotations

import random
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from harness.evaluate import scorer
from harness.evaluate.forward import PLAIN, Way
from harness.evaluate.plan import Limits, Query, plan_rows
from harness.evaluate.scorer import limits_for, score_queries
from harness.models.info import info_from_config

from .conftest import VOCAB, make_llama

BEST = Way(tree=True, lean=True, select=True, tail=True)


def choices(seed=0, contexts=12, longest=40, vocab=VOCAB):
    """Contexts of different lengths with three continuations each, some alike, some of one token."""
    rng = random.Random(seed)
    queries = []
    for _ in range(contexts):
        context = [rng.randrange(1, vocab) for _ in range(rng.randint(2, longest))]
        for _ in range(3):
            rest = [rng.randrange(1, vocab) for _ in range(rng.choice([1, 1, 4, 9]))]
            queries.append(Query((*context, *rest), len(rest)))
    return [*queries, queries[0]]


def alone(model, queries):
    """Log-likelihood and greediness of each by itself."""
    found = []
    for query in queries:
        with torch.no_grad():
            logits = model(torch.tensor([query.input])).logits[0, -query.scored :].float()
        targets = torch.tensor(query.tokens[-query.scored :])
        log_p = logits.log_softmax(-1).gather(1, targets[:, None]).sum()
        found.append((float(log_p), bool((logits.argmax(-1) == targets).all())))
    return found


def check(model, queries, scores, tolerance=1e-4):
    expected = alone(model, queries)
    assert scores.log_likelihoods == pytest.approx([score for score, _ in expected], abs=tolerance)
    assert scores.greedy.tolist() == [greedy for _, greedy in expected]


def limits_of(model, batch_size=8):
    return limits_for(info_from_config(model.config, "small"), torch.device("cpu"), batch_size)


@pytest.mark.parametrize("name", ["llama", "tiny_opt", "tiny_gpt2"])
def test_every_family_in_the_best_way(name, request):
    model = make_llama() if name == "llama" else request.getfixturevalue(name)
    queries = choices(vocab=model.config.vocab_size)
    scores = score_queries(model, queries, limits_of(model))
    assert (scores.way, scores.note) == (BEST, None)
    check(model, queries, scores)


def test_grouped_query_heads_and_eager_attention():
    model = make_llama(num_key_value_heads=2)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        scores = score_queries(model, choices(), limits_of(model))
        assert scores.way == BEST
        check(model, choices(), scores)


def test_what_greedy_decoding_finds_is_marked(model):
    queries = []
    for query in choices(contexts=4):
        tokens = list(query.input)
        with torch.no_grad():
            for _ in range(3):
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        queries.append(Query(tuple(tokens), 3))
        queries.append(Query((*tokens[:-1], (tokens[-1] + 1) % VOCAB), 3))
    scores = score_queries(model, queries, limits_of(model))
    assert scores.greedy.tolist() == [True, False] * (len(queries) // 2)
    check(model, queries, scores)


def test_of_equal_logits_the_first_is_greedy(model):
    with torch.no_grad():
        model.lm_head.weight = nn.Parameter(torch.zeros(VOCAB, 32))
    scores = score_queries(model, [Query((3, 0), 1), Query((3, 1), 1)], limits_of(model))
    assert scores.greedy.tolist() == [True, False]
    assert scores.log_likelihoods == pytest.approx([-np.log(VOCAB)] * 2)


def test_a_model_that_knows_no_masks_is_scored_sequence_by_sequence(model):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, tokens):
            return SimpleNamespace(logits=self.inner(tokens).logits)

    scores = score_queries(Bare(), choices(), limits_of(model))
    assert scores.way == PLAIN
    check(model, choices(), scores)


@pytest.mark.parametrize("kind", ["window", "no_mask", "no_positions", "refuses"])
def test_attention_that_does_not_honour_a_tree_is_found_out(kind):
    """Each is right for a sequence and wrong, in its own way, for a tree."""
    model = make_llama()
    body = model.model.forward

    def forward(input_ids=None, attention_mask=None, position_ids=None, **more):
        length = input_ids.shape[1]
        if kind == "refuses" and attention_mask is not None:
            raise RuntimeError("only padding masks,\nplease")
        if kind == "no_positions":
            position_ids = None
        if kind == "no_mask":
            attention_mask = None
        if kind == "window":  # a token sees the 40 places before it, wherever these belong
            near = torch.ones(length, length).triu(-40).tril().bool()
            band = torch.zeros(1, 1, length, length).masked_fill(~near, torch.finfo(torch.float32).min)
            attention_mask = band if attention_mask is None else torch.minimum(attention_mask, band)
        return body(input_ids, attention_mask=attention_mask, position_ids=position_ids, **more)

    model.model.forward = forward
    scores = score_queries(model, choices(), limits_of(model))
    assert scores.way == Way(tree=False, lean=True, select=True, tail=True)
    assert "shared prefixes are computed again for each request" in scores.note
    assert ("only padding masks, please" in scores.note) == (kind == "refuses")
    check(model, choices(), scores)


@pytest.mark.parametrize("far", ["rows of their own", "one branch of the largest", "a row without a fork"])
def test_a_window_that_only_the_deepest_sequences_reach_is_found_out(far):
    """Given a mask, transformers leaves a model's own window out; the largest row, of many short branches,
    lies within it."""
    from transformers import MistralConfig, MistralForCausalLM

    config = make_llama().config
    sizes = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "num_attention_heads")}
    windowed = MistralConfig(
        **sizes, intermediate_size=64, num_hidden_layers=2, num_key_value_heads=2, sliding_window=16,
        max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM(windowed).eval()
    rng = random.Random(0)

    def tokens(count):
        return tuple(rng.randrange(100, 200) for _ in range(count))

    def forked(start, longest, branches):
        return [Query((*start, *tokens(longest - len(start))), 2) for _ in range(branches)]

    queries = forked((1, *tokens(7)), 11, 60)
    if far == "one branch of the largest":
        queries += [Query((*queries[30].tokens[:9], *tokens(50)), 2)]
    elif far == "rows of their own":
        for first in (2, 3):
            queries += forked((first, *tokens(40)), 43, 2)
    else:
        queries += forked((2,), 60, 1)
    for first in range(4, 12):
        queries += forked((first, *tokens(9)), 12, 2)
    limits = Limits(row_tokens=256, batch_tokens=1024)
    assert max(plan_rows(queries, limits, share=True)[0].depths) == (57 if far.startswith("one") else 9)
    scores = score_queries(model, queries, limits)
    assert not scores.way.tree
    assert "differ by" in scores.note
    check(model, queries, scores)


def test_a_head_that_mixes_places_gets_them_all(model):
    class Smoothing(nn.Module):
        """Adds the logits of the place before: wrong if given a selection."""

        def __init__(self, head):
            super().__init__()
            self.head = head

        def forward(self, hidden):
            logits = self.head(hidden)
            return logits + 0.5 * nn.functional.pad(logits[:, :-1], (0, 0, 1, 0))

    model.set_output_embeddings(Smoothing(model.lm_head))
    scores = score_queries(model, choices(), limits_of(model))
    assert scores.way == PLAIN
    check(model, choices(), scores)


def test_a_cache_that_changes_what_attention_sees_is_kept(model):
    """A method may work through the cache (quantized keys): leaving it out would score another model."""
    body = model.model.forward

    def forward(input_ids=None, use_cache=None, **more):
        output = body(input_ids, use_cache=use_cache, **more)
        if use_cache is not False:
            output.last_hidden_state = output.last_hidden_state * 1.5
        return output

    model.model.forward = forward
    scores = score_queries(model, choices(), limits_of(model))
    assert not scores.way.lean
    check(model, choices(), scores)


def test_swapped_attention_is_scored_as_it_is(model):
    from harness.nn.attention import use_local_attention
    from harness.nn.masks import Band

    use_local_attention(model, [Band("sliding", 8)] * 2)
    scores = score_queries(model, choices(), limits_of(model))
    check(model, choices(), scores)


def test_a_nan_stays_one(model):
    with torch.no_grad():
        model.lm_head.weight = nn.Parameter(torch.full((VOCAB, 32), float("nan")))
    scores = score_queries(model, choices(contexts=2), limits_of(model))
    assert np.isnan(scores.log_likelihoods).all()
    assert not scores.greedy.any()


def test_nothing_is_left_on_the_model(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    score_queries(model, choices(), limits_of(model))
    assert not model.lm_head._forward_pre_hooks
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_nothing_to_score_is_nothing(model):
    scores = score_queries(model, [], limits_of(model))
    assert len(scores.log_likelihoods) == len(scores.greedy) == 0


# --- memory ------------------------------------------------------------------------------------------


class Small:
    """A device that holds so many tokens of a forward pass; the rest is the model's own."""

    def __init__(self, monkeypatch, tokens, error):
        self.tokens, self.error, self.sizes = tokens, error, []
        self.forward = scorer.forward
        monkeypatch.setattr(scorer, "forward", self)

    def __call__(self, model, batch, way):
        self.sizes.append(batch.tokens.numel())
        if batch.tokens.numel() > self.tokens:
            raise self.error
        return self.forward(model, batch, way)


ERRORS = [
    torch.cuda.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
]


@pytest.mark.parametrize("error", ERRORS)
def test_a_batch_that_does_not_fit_is_halved(error, model, monkeypatch):
    queries = choices()
    expected = score_queries(model, queries, limits_of(model))
    small = Small(monkeypatch, 120, error)
    found = score_queries(model, queries, limits_of(model))
    assert found.log_likelihoods == pytest.approx(expected.log_likelihoods, abs=1e-4)
    assert max(small.sizes) > 120
    # After it has shrunk it stays small: no batch is tried at the size that failed.
    assert len(small.sizes) < 40


def test_a_tree_that_does_not_fit_is_taken_apart(model, monkeypatch):
    context = tuple(range(1, 30))
    queries = [Query((*context, *range(n, n + 8)), 8) for n in range(40, 100, 10)]
    expected = score_queries(model, queries, limits_of(model))
    Small(monkeypatch, 40, ERRORS[0])
    found = score_queries(model, queries, limits_of(model))
    assert found.log_likelihoods == pytest.approx(expected.log_likelihoods, abs=1e-4)


@pytest.mark.parametrize("error", ERRORS)
def test_a_sequence_that_does_not_fit_names_its_batch(error, model, monkeypatch):
    Small(monkeypatch, 5, error)
    with pytest.raises(type(error), match=r"batch \d+ of 1 rows with \d+ tokens does not fit"):
        score_queries(model, choices(), limits_of(model))


def test_any_other_error_is_passed_on(model, monkeypatch):
    Small(monkeypatch, 5, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        score_queries(model, choices(), limits_of(model))


def test_the_batch_does_not_grow_past_what_was_asked(model):
    info = info_from_config(model.config, "small")
    assert limits_for(info, torch.device("cpu"), 1).batch_tokens == info.max_positions
    assert limits_for(info, torch.device("cpu"), 10**6).batch_tokens == 1024
    assert limits_for(info, torch.device("cuda"), 10**6).batch_tokens == 16384


# --- several batches at once -------------------------------------------------------------------------


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3  # as it was found
    torch.set_num_threads(before)


def test_threads_share_the_batches(model, three_threads, monkeypatch):
    seen = set()
    forward = scorer.forward

    def watched(*arguments):
        seen.add(threading.get_ident())
        assert torch.get_num_threads() == 1
        return forward(*arguments)

    monkeypatch.setattr(scorer, "forward", watched)
    monkeypatch.setattr(scorer, "_FEWEST_TOKENS", 64)
    queries = choices(contexts=40)
    scores = score_queries(model, queries, limits_of(model))
    assert (scores.way, scores.note) == (BEST, None)
    assert threading.get_ident() not in seen
    check(model, queries, scores)
    again = score_queries(model, queries, limits_of(model))
    assert again.log_likelihoods.tolist() == scores.log_likelihoods.tolist()


def test_memory_runs_out_in_a_thread(model, three_threads, monkeypatch):
    queries = choices(contexts=30)
    expected = score_queries(model, queries, limits_of(model))
    Small(monkeypatch, 120, ERRORS[1])
    found = score_queries(model, queries, limits_of(model))
    assert found.log_likelihoods == pytest.approx(expected.log_likelihoods, abs=1e-4)


def test_a_module_that_remembers_its_input_gets_one_batch_at_a_time(model, three_threads):
    class Forgetful(nn.Module):
        """Leaves the hidden states in an attribute, and takes them from there a moment later."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden):
            self.last = hidden
            time.sleep(0.05)
            return self.inner(self.last)

    model.set_output_embeddings(Forgetful(model.lm_head))
    queries = choices(contexts=20)
    scores = score_queries(model, queries, limits_of(model))
    assert "one batch at a time" in scores.note
    check(model, queries, scores)
