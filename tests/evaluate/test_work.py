"""How much the engine computes: tokens, places of the last FFN and of the head, plans; no clock."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from harness.evaluate import scorer
from harness.evaluate.crew import ALONE, Crew
from harness.evaluate.encoding import Encoder
from harness.evaluate.forward import Way, forward, make_batch
from harness.evaluate.lm import quiet
from harness.evaluate.lm_tasks import load_task
from harness.evaluate.plan import Limits, Row, batches, plan_rows
from harness.evaluate.scorer import limits_for, score_queries
from harness.evaluate.selection import last_ffn
from harness.models.info import info_from_config

from .conftest import make_llama
from .test_same_as_lm_eval import present, tiny, zoo_tokenizer
from .test_scorer import BEST, check, choices, limits_of

CPU = torch.device("cpu")


class Count:
    """Places (rows times width) that a module gives an output for, call by call."""

    def __init__(self, module: nn.Module) -> None:
        self.calls: list[int] = []
        module.register_forward_hook(self)

    def __call__(self, _, __, output):
        self.calls.append(output.shape[:-1].numel())


def counted(model):
    """Counts for a layer that sees all tokens, one of the last block's FFN, and the head."""
    first, last = {
        "llama": ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"),
        "opt": ("model.decoder.layers.0.self_attn.q_proj", "model.decoder.layers.1.fc2"),
        "gpt2": ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"),
    }[model.config.model_type]
    names = (first, last, "lm_head")
    return [Count(model.get_submodule(name)) for name in names]


@pytest.mark.parametrize("name", ["llama", "tiny_opt", "tiny_gpt2"])
def test_the_last_ffn_and_the_head_see_scored_places_only(name, request):
    model = make_llama() if name == "llama" else request.getfixturevalue(name)
    rows = plan_rows(choices(vocab=model.config.vocab_size), limits_of(model), share=True)
    batch = make_batch(rows, CPU)
    everything, scored = batch.tokens.numel(), sum(len(row.scored_nodes) for row in rows)
    assert scored < everything / 2
    expected = forward(model, batch, Way(tree=True, lean=True, select=False))
    counts = counted(model)
    found = forward(model, batch, BEST)
    assert [count.calls for count in counts] == [[everything], [scored], [scored]]
    assert torch.allclose(found, expected, atol=1e-4)
    assert not any(module._forward_pre_hooks for module in model.modules())
    forward(model, batch, Way(tree=True, lean=True, select=True))
    assert [count.calls[1] for count in counts] == [everything, everything, scored]


def test_every_token_once_and_the_probes_are_few():
    """What the whole of scoring computes: the plan, and besides a few rows to try the way on."""
    model, queries = make_llama(), choices(contexts=60)
    rows = plan_rows(queries, limits_of(model), share=True)
    padded = sum(make_batch(batch, CPU).tokens.numel() for batch in batches(rows, limits_of(model)))
    everything, _, head = counted(model)
    check(make_llama(), queries, score_queries(model, queries, limits_of(model)))
    probed, longest = everything.calls[: -len(list(batches(rows, limits_of(model))))], len(rows[0].tokens)
    assert len(probed) <= 1 + 2 * 3  # the rows in this way, and three branches of each by themselves
    assert sum(everything.calls) == padded + sum(probed)
    assert sum(probed) <= 2 * longest + 2 * 3 * longest
    assert head.calls[len(probed) :] == [
        sum(len(row.scored_nodes) for row in batch) for batch in batches(rows, limits_of(model))
    ]


def test_plain_rows_are_planned_only_where_trees_will_not_do(monkeypatch):
    planned = []

    def watched(queries, limits, *, share):
        planned.append(share)
        return plan_rows(queries, limits, share=share)

    monkeypatch.setattr(scorer, "plan_rows", watched)
    model = make_llama()
    score_queries(model, choices(), limits_of(model))
    assert planned == [True]
    body = model.model.forward
    model.model.forward = lambda input_ids=None, attention_mask=None, **more: body(input_ids)
    assert not score_queries(model, choices(), limits_of(model)).way.tree
    assert planned == [True, True, False]


def test_work_on_real_tasks():
    """HellaSwag and PIQA: hardly more than half of HFLM's tokens; two in three of them at the head."""
    tasks = present(["hellaswag_local", "piqa_local"])
    model, tokenizer = tiny("llama"), zoo_tokenizer()
    with quiet():
        leaves = [leaf for task in tasks for leaf in load_task(task, seed=0).tasks.values()]
        for leaf in leaves:
            leaf.build_all_requests(limit=100, rank=0, world_size=1)
    requests = [request.args for leaf in leaves for request in leaf.instances]
    queries = Encoder(tokenizer, 1024, 0).pairs(requests)
    limits = limits_for(info_from_config(model.config, "tiny"), CPU, 16)
    limits = Limits(1024, 1024, limits.batch_scored, pair_cost=1 / 512)  # as for a model of 256 channels
    rows = plan_rows(queries, limits, share=True)
    theirs = sum(len(query.input) for query in queries)
    padded = sum(make_batch(batch, CPU).tokens.numel() for batch in batches(rows, limits))
    pairs = sum(len(row.tokens) ** 2 for row in rows)
    scored = sum(len(row.scored_nodes) for row in rows)
    assert padded <= 0.55 * theirs
    assert scored <= 0.66 * padded
    assert pairs <= 122 * padded


# --- what else keeps the cores busy ------------------------------------------------------------------


@pytest.mark.parametrize(("longest", "width"), [(127, 128), (125, 128), (128, 128), (124, 124), (129, 129)])
def test_keys_are_aligned_where_that_is_near(longest, width):
    tree = Row([1] * longest, [*range(longest)], [(0, longest - 1, -1), (longest - 1, longest, 0)], [(1, 2)])
    batch = make_batch([tree], CPU)
    assert batch.tokens.shape == (1, width)
    assert batch.mask.shape == (1, 1, width, width)
    chain = Row([1] * longest, [*range(longest)], [(0, longest, -1)], [(1, 2)])
    assert make_batch([chain], CPU).tokens.shape == (1, longest)


@pytest.mark.parametrize("width", [1, 32])
def test_an_ffn_that_wants_all_places_gets_them(width):
    """It scales by what an earlier block has said of each place; the head may have a selection."""
    model = make_llama()
    first, last = model.model.layers[0].mlp, model.model.layers[-1].mlp
    said = {}

    def say(_, __, output):
        said[threading.get_ident()] = output[..., :width]

    def scale(_, __, output):
        return output * (1 + said[threading.get_ident()])

    first.register_forward_hook(say)
    last.register_forward_hook(scale)
    scores = score_queries(model, choices(), limits_of(model))
    assert (scores.way, scores.note) == (Way(tree=True, lean=True, select=True), None)
    check(model, choices(), scores)


def test_a_model_of_no_known_family_has_no_last_ffn():
    assert last_ffn(nn.Linear(2, 2)) is None
    model = make_llama()
    del model.model.layers[-1].mlp
    assert last_ffn(model) is None
    model.model.layers = nn.ModuleList()
    assert last_ffn(model) is None


def test_a_call_that_fails_is_raised_when_all_have_ended():
    ended = []

    def call(number):
        if number == 0:
            raise ValueError("the first")
        threading.Event().wait(0.05)
        ended.append(number)
        return number

    with ThreadPoolExecutor(2) as pool:
        crew = Crew(pool, 2)
        with pytest.raises(ValueError, match="the first"):
            crew.all(call, [(0,), (1,), (2,)])
        assert sorted(ended) == [1, 2]
        assert crew.all(call, [(3,), (1,)]) == [3, 1]
        assert crew.under_way == 3
    assert ALONE.all(call, [(2,)]) == [2]
    assert ALONE.under_way == 1
