"""The task cells of a variant in one pass: the same results, and what goes wrong stays where it is."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.errors import ConfigError, NumericalFailure
from harness.evaluate import lm as lm_module
from harness.evaluate.index import resolve_tasks
from harness.executors.local import LocalExecutor
from harness.job import Budget, CellJob, VariantJob
from harness.models.info import info_from_config
from harness.records import CellKind, CellResult, Status
from harness.transforming import MadeVariant
from harness.worker import _Variant

from . import together_jobs
from .conftest import VOCAB, make_llama

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" light", " darkness", " the waters under the heaven"]
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
WRITE = """\
task: write
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "light"
generation_kwargs: {{until: ["."], max_gen_toks: 3}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(autouse=True)
def quiet_world(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, words in (("first", "And God said"), ("second", "And God made QQQ"), ("absent", "")):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(f'{{"question": "{words} {n}"}}\n' for n in range(6)))
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data))
    (folder / "write.yaml").write_text(WRITE.format(data=folder / "first.jsonl"))
    return folder


def make_job(names, folder, cache, **changes):
    tasks = resolve_tasks(names, [folder])
    job = VariantJob(
        variant_key="variant",
        label="variant",
        chain=(),
        model=None,
        seed=0,
        dtype="float32",
        device="cpu",
        cells=tuple(CellJob(task.name, CellKind.TASK, task, None) for task in tasks),
        plugins=(),
        budget=Budget(1, 1, 1, 1, 2, None, ""),
        limit=4,
        eval_batch_size=4,
        cache_dir=cache,
        threads=1,
        environment={},
    )
    return replace(job, **changes)


def make_variant(job, tokenizer, model=None):
    model = model or make_llama()
    info = replace(info_from_config(model.config, "small"), scratch=True)  # no reference is asked for
    made = MadeVariant(
        model=model,
        tokenizer=tokenizer,
        info=info,
        device=torch.device("cpu"),
        dtype=torch.float32,
        effect=None,
        records=(),
        no_effect=None,
        is_baseline=True,
        original_bytes=0,
    )
    return _Variant(job, None, made)


@pytest.fixture
def passes(monkeypatch):
    """The numbers of queries that the engine was given, call by call."""
    given = []
    score = lm_module.score_queries

    def counted(model, queries, limits):
        given.append(len(queries))
        return score(model, queries, limits)

    monkeypatch.setattr(lm_module, "score_queries", counted)
    return given


def values(variant):
    found = {}
    for cell in variant.job.cells:
        result = variant.measure(cell)
        assert result.status is Status.OK
        for record in result.records:
            found[cell.key, record.metric] = record.value
        for item in result.items:
            for number, score in enumerate(item.detail.get("loglikelihoods", ())):
                found[cell.key, item.index, number] = score
    return found


def test_one_pass_gives_what_each_would_give_alone(folder, tokenizer, tmp_path, passes):
    job = make_job(["first", "kjv", "second", "write"], folder, tmp_path / "cache", limit=2)
    sent = []
    variant = make_variant(job, tokenizer)
    seconds = variant.score_together(sent.append)
    windows = sum(passes) - 2 * 3 * 2
    assert len(passes) == 1
    assert windows > 2
    assert [(phase.name, phase.cells) for phase in sent] == [("first", 4)]
    assert set(seconds) == {"first", "kjv", "second", "write"}
    assert min(seconds.values()) > 0
    found = values(variant)
    assert len(passes) == 1
    alone = make_variant(replace(job, together=False), tokenizer)
    assert alone.score_together(sent.append) == {}
    assert values(alone) == pytest.approx(found, abs=1e-4)
    assert len(passes) == 4


def test_what_is_asked_twice_is_computed_once(folder, tokenizer, tmp_path, monkeypatch):
    (folder / "again.yaml").write_text((folder / "first.yaml").read_text().replace("first\n", "again\n", 1))
    tokens = Counter()
    forward = torch.nn.Embedding.forward

    def counted(module, ids):
        if module.num_embeddings == VOCAB:
            tokens[names] += ids.numel()
        return forward(module, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", counted)
    for names in (("first",), ("first", "again")):
        job = make_job(names, folder, tmp_path / "cache")
        variant = make_variant(job, tokenizer)
        variant.score_together(lambda _: None)
        values(variant)
    assert tokens["first",] == tokens["first", "again"]


def test_a_task_without_its_data_fails_alone(folder, tokenizer, tmp_path, passes):
    job = make_job(["first", "absent", "second"], folder, tmp_path / "cache")
    (folder / "absent.jsonl").unlink()
    variant = make_variant(job, tokenizer)
    variant.score_together(lambda _: None)
    first, absent, second = job.cells
    assert variant.measure(first).status is Status.OK
    with pytest.raises(ConfigError, match="data of task 'absent' cannot be loaded"):
        variant.measure(absent)
    assert variant.measure(second).status is Status.OK
    assert len(passes) == 1


def test_a_nan_fails_the_task_that_it_is_in(folder, tokenizer, tmp_path, passes):
    model = make_llama(tie_word_embeddings=False)
    (q,) = (
        set(tokenizer(" Q")["input_ids"])
        - set(tokenizer("And God said And God made")["input_ids"])
        - {tokenizer(" ")["input_ids"][0]}
    )
    with torch.no_grad():
        model.model.embed_tokens.weight[q] = float("nan")
    job = make_job(["first", "second"], folder, tmp_path / "cache")
    variant = make_variant(job, tokenizer, model)
    variant.score_together(lambda _: None)
    assert variant.measure(job.cells[0]).status is Status.OK
    with pytest.raises(NumericalFailure, match="log-likelihoods are NaN"):
        variant.measure(job.cells[1])


def test_where_the_pass_fails_each_is_scored_by_itself(folder, tokenizer, tmp_path, monkeypatch):
    score = lm_module.score_queries

    def fails_on_much(model, queries, limits):
        if len(queries) > 12:
            raise RuntimeError("too much at once")
        return score(model, queries, limits)

    monkeypatch.setattr(lm_module, "score_queries", fails_on_much)
    job = make_job(["first", "second"], folder, tmp_path / "cache")
    variant = make_variant(job, tokenizer)
    assert variant.score_together(lambda _: None) == {}
    assert {key[0] for key in values(variant)} == {"first", "second"}


def test_a_single_task_has_nothing_to_be_scored_with(folder, tokenizer, tmp_path):
    sent = []
    job = make_job(["first"], folder, tmp_path / "cache")
    assert make_variant(job, tokenizer).score_together(sent.append) == {}
    assert not sent


def test_how_it_was_computed_stands_in_the_note(folder, tokenizer, tmp_path):
    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_llama()
            self.config = self.inner.config

        def forward(self, tokens, attention_mask=None, position_ids=None, use_cache=None):
            return self.inner(tokens)

        def get_output_embeddings(self):
            return self.inner.lm_head

    job = make_job(["first", "second"], folder, tmp_path / "cache")
    result = make_variant(job, tokenizer, Bare()).measure(job.cells[0])
    (acc,) = [record for record in result.records if record.metric == "acc"]
    assert acc.note.startswith("limit=4, shared prefixes are computed again for each request: ")
    assert make_variant(job, tokenizer).measure(job.cells[0]).records[0].note == "limit=4"


# --- the executor ------------------------------------------------------------------------------------


def run(target, timeout_s):
    """Statuses by cell of a worker with four cells."""
    found = []

    def take(job, message):
        if isinstance(message, CellResult):
            found.append((message.key, message.status))

    job = make_job([], Path("."), Path("."))
    job = replace(job, cells=tuple(CellJob(name, CellKind.TASK, None, None) for name in "abcd"))
    target = f"{together_jobs.__name__}:{target.__name__}"
    LocalExecutor(1, timeout_s, target=target).run([job], take)
    return found


ALL = [(name, Status.OK) for name in "abcd"]


def test_a_worker_that_dies_scoring_together_loses_no_cell():
    assert run(together_jobs.dies_together, 30.0) == ALL


def test_together_cells_have_the_time_of_all_of_them():
    assert run(together_jobs.is_slow_together, 0.75) == ALL


def test_a_pass_that_takes_longer_than_all_its_cells_is_given_up():
    assert run(together_jobs.never_ends_together, 0.5) == ALL


# --- what a further variant costs --------------------------------------------------------------------


def test_a_further_variant_imports_nothing_large_and_costs_less_than_a_second(tmp_path):
    """Besides loading, transforming, measuring and scoring; in processor time, for the machine is shared."""
    from harness.config import SweepConfig
    from harness.executors.calling import call_in_worker
    from harness.planning import plan_sweep, variant_job

    config = SweepConfig(
        methods=("rtn",), models=("zoo:llama-6m",), tasks=("grammar", "kjv"), limit=2, device="cpu"
    )
    plan = plan_sweep(config)
    variant = next(each for each in plan.grid.variants if not each.chain.is_baseline)
    keys = frozenset(cell.key for cell in variant.cells if cell.scenario is None)
    job = replace(variant_job(plan, variant, keys), cache_dir=tmp_path, threads=1)
    fixed_s, imported, statuses = call_in_worker(together_jobs.costs_of_a_worker, job, timeout_s=120)
    assert statuses == ["ok"] * 3
    assert fixed_s < 1.0
    large = (
        "torch._dynamo",
        "torch._inductor",
        "transformers.models",
        "lm_eval",
        "datasets",
        "harness_plugins",
    )
    assert [name for name in imported if name.startswith(large)] == []


def test_a_worker_need_not_build_the_table_of_renamed_weights():
    """Hundreds of patterns, which take a tenth of a second where the first checkpoint is loaded."""
    from harness.executors.calling import call_in_worker

    assert call_in_worker(together_jobs.conversions_are_known, timeout_s=120)
