"""Scoring an in-memory model, against lm-eval's own entry point and against the ways to get it wrong."""

from __future__ import annotations

import copy
import json
import logging
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from harness.errors import ConfigError, NotApplicable, NumericalFailure
from harness.evaluate.engine import evaluate_task, make_reference, wants_reference
from harness.evaluate.index import resolve_tasks
from harness.evaluate.intervals import wilson
from harness.evaluate.lm import InMemoryLM
from harness.evaluate.lm_tasks import load_task
from harness.evaluate.minimal_pairs import minimal_pairs
from harness.evaluate.plan import Query
from harness.evaluate.reference import load_reference
from harness.models.info import info_from_config

from .conftest import POSITIONS, VOCAB, make_llama

CHOICE = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
output_type: {kind}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
{more}
"""
CHOICES = "doc_to_choice: choices\nmetric_list: [{metric: acc}, {metric: acc_norm}]"


@pytest.fixture(autouse=True)
def quiet_world(monkeypatch, tmp_path):
    """No network, and the data sets' cache in this test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path):
    """Small tasks of every kind: pick (twice, in a group), finish, write."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "data.jsonl"
    rng = random.Random(0)
    words = ["light", "day", "night", "water", "earth", "heaven", "beast", "fowl", "seed", "tree"]
    with data.open("w") as file:
        for _ in range(24):
            chosen = rng.sample(words, 4)
            quoted = ", ".join(f'"{word}"' for word in chosen[:3])
            answer = rng.randrange(3)
            file.write(
                f'{{"question": "And God made the {chosen[3]} and the", "choices": [{quoted}], '
                f'"answer": {answer}, "word": "{chosen[answer]}"}}\n'
            )

    def write(name, kind, target, more):
        text = CHOICE.format(name=name, data=data, kind=kind, target=target, more=more)
        (folder / f"{name}.yaml").write_text(text)

    write("pick", "multiple_choice", "answer", CHOICES)
    write("pick_again", "multiple_choice", 0, CHOICES)
    write(
        "finish", "loglikelihood", "\"{{' ' + word}}\"", "metric_list: [{metric: perplexity}, {metric: acc}]"
    )
    generation = (
        "metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]\n"
        "generation_kwargs: {{until: ['\\n'], max_gen_toks: {tokens}}}"
    )
    write("write", "generate_until", "word", generation.format(tokens=5))
    write("write_long", "generate_until", "word", generation.format(tokens=POSITIONS))
    (folder / "both.yaml").write_text(
        "group: both\ntask: [pick, pick_again]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    return folder


def task_of(name, folder=None):
    return resolve_tasks([name], [folder] if folder else [])[0]


def evaluate(name, model, tokenizer, folder=None, limit=None, **more):
    info = more.pop("info", None) or info_from_config(model.config, "small")
    arguments = {"seed": 0, "batch_size": 8, **more}
    return evaluate_task(task_of(name, folder), model, tokenizer, info, limit=limit, **arguments)


def values(evaluation):
    return {record.metric: record.value for record in evaluation.records}


def lm_evals_own(name, model, tokenizer, folder=None, limit=None):
    """The same task by `simple_evaluate` on an unmodified HFLM."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    task = task_of(name, folder)
    manager = TaskManager(include_path=str(task.yaml_path.parent), include_defaults=False)
    lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=5)
    lm.get_model_info = dict  # would ask the hub for the commit of a model that it has not
    results = evaluator.simple_evaluate(
        lm, tasks=[name], task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
    )
    return results["results"]


# --- the numbers are lm-eval's -----------------------------------------------------------------------


def test_bits_per_byte_and_word_perplexity_are_lm_evals(model, tokenizer):
    mine = values(evaluate("kjv", model, tokenizer, limit=3))
    theirs = lm_evals_own("kjv", model, tokenizer, limit=3)["kjv"]
    for metric in ("bits_per_byte", "word_perplexity", "byte_perplexity"):
        assert mine[metric] == pytest.approx(theirs[f"{metric},none"], rel=1e-6)


@pytest.mark.parametrize("name", ["pick", "finish", "write"])
def test_other_kinds_are_lm_evals(name, model, tokenizer, folder):
    mine = values(evaluate(name, model, tokenizer, folder))
    theirs = lm_evals_own(name, model, tokenizer, folder)[name]
    metrics = {
        key.partition(",")[0]: v
        for key, v in theirs.items()
        if key.endswith(",none") and "_stderr" not in key
    }
    metrics = {{"perplexity": "target_perplexity"}.get(key, key): value for key, value in metrics.items()}
    assert mine == pytest.approx(metrics, rel=1e-6)


@pytest.mark.parametrize("name", ["pick", "both"])
@pytest.mark.parametrize("file", ["data.jsonl", "pick.yaml"])
def test_a_task_that_was_changed_since_it_was_resolved_is_refused(name, file, folder):
    (task,) = resolve_tasks([name], [folder])
    assert load_task(task, seed=0).tasks
    with (folder / file).open("a") as opened:
        opened.write("\n")
    with pytest.raises(ConfigError, match=rf"{file} of task '{name}' was changed since the sweep began"):
        load_task(task, seed=0)
    assert load_task(resolve_tasks([name], [folder])[0], seed=0).tasks


def test_a_group_is_aggregated_as_lm_eval_does(model, tokenizer, folder):
    evaluation = evaluate("both", model, tokenizer, folder)
    mine, theirs = values(evaluation), lm_evals_own("both", model, tokenizer, folder)
    assert mine["acc"] == pytest.approx(theirs["both"]["acc,none"])
    assert mine["acc/pick"] == pytest.approx(theirs["pick"]["acc,none"])
    assert mine["acc/pick_again"] == pytest.approx(theirs["pick_again"]["acc,none"])
    whole = next(record for record in evaluation.records if record.metric == "acc")
    assert whole.n == 48
    assert whole.lower < whole.value < whole.upper
    items = [item for item in evaluation.items if item.metric == "acc"]
    assert [item.index for item in items] == list(range(48))
    assert [item.detail["task"] for item in items] == ["pick"] * 24 + ["pick_again"] * 24


# --- records and items -------------------------------------------------------------------------------


def test_running_text_has_every_perplexity_by_its_name(model, tokenizer):
    evaluation = evaluate("kjv", model, tokenizer, limit=3)
    units = {record.metric: record.unit for record in evaluation.records}
    assert units == {
        "word_perplexity": "ppl",
        "byte_perplexity": "ppl",
        "bits_per_byte": "bits/byte",
        "nll": "nats/token",
        "token_perplexity": "ppl",
    }
    found = values(evaluation)
    assert found["token_perplexity"] == pytest.approx(math.exp(found["nll"]))
    for record in evaluation.records:
        assert record.lower < record.value < record.upper
        assert "limit=3" in record.note
    perplexity = next(r for r in evaluation.records if r.metric == "token_perplexity")
    assert f"seq_len={POSITIONS}" in perplexity.note
    windows = [item for item in evaluation.items if item.metric == "nll"]
    assert perplexity.n == sum(item.detail["tokens"] for item in windows)
    assert np.mean([item.outcome for item in windows]) == pytest.approx(found["nll"])
    assert sum(item.metric == "bits_per_byte" for item in evaluation.items) == 3


def test_choices_keep_their_log_likelihoods(model, tokenizer, folder):
    evaluation = evaluate("pick", model, tokenizer, folder)
    for item in (item for item in evaluation.items if item.metric == "acc"):
        scores = item.detail["loglikelihoods"]
        assert item.outcome == float(np.argmax(scores) == item.detail["target"])
    acc = next(record for record in evaluation.records if record.metric == "acc")
    right = sum(item.outcome for item in evaluation.items if item.metric == "acc")
    assert (acc.lower, acc.upper) == wilson(int(right), 24)
    assert {item.metric for item in evaluation.items} == {"acc", "acc_norm"}


def test_choices_without_their_context_are_no_further_choices(model, tokenizer, folder):
    """For `acc_mutual_info` lm-eval asks for each choice twice; the divergence is of those in their place."""
    plain = evaluate("pick", model, tokenizer, folder)
    path = folder / "pick.yaml"
    path.write_text(path.read_text().replace("{metric: acc},", "{metric: acc}, {metric: acc_mutual_info},"))
    both = evaluate("pick", model, tokenizer, folder)
    mine, theirs = ([i for i in each.items if i.metric == "acc"] for each in (both, plain))
    for item, other in zip(mine, theirs, strict=True):
        scores = other.detail["loglikelihoods"]
        assert item.detail["loglikelihoods"] == pytest.approx(scores, abs=1e-4)
    assert {item.metric for item in both.items} == {"acc", "acc_norm", "acc_mutual_info"}


def test_grammar_has_one_record_for_each_phenomenon(model, tokenizer):
    evaluation = evaluate("grammar", model, tokenizer, limit=45)
    found = values(evaluation)
    of_phenomena = [value for name, value in found.items() if name.startswith("acc_")]
    assert len(of_phenomena) == 15
    assert found["acc"] == pytest.approx(np.mean(of_phenomena))  # three pairs of each
    items = [item for item in evaluation.items if item.metric == "acc"]
    assert len(items) == 45
    assert {item.detail["group"] for item in items} == {name[4:] for name in found} - {""}
    good, bad = items[0].detail["loglikelihoods"]
    assert items[0].outcome == float(good > bad)


def test_a_text_that_a_model_writes_is_kept(model, tokenizer, folder):
    evaluation = evaluate("write", model, tokenizer, folder, limit=4)
    assert [item.metric for item in evaluation.items] == ["exact_match"] * 4
    assert all(isinstance(item.detail["response"], str) for item in evaluation.items)


def test_a_target_perplexity_has_losses_for_items(model, tokenizer, folder):
    evaluation = evaluate("finish", model, tokenizer, folder)
    losses = [item.outcome for item in evaluation.items if item.metric == "target_nll"]
    assert values(evaluation)["target_perplexity"] == pytest.approx(math.exp(np.mean(losses)))


def test_against_the_baseline(model, tokenizer, info, tmp_path):
    task, path = task_of("kjv"), tmp_path / "reference.safetensors"
    assert wants_reference(task)
    assert not wants_reference(task_of("grammar"))
    common = {"limit": 2, "seed": 0, "batch_size": 8}
    make_reference(task, model, tokenizer, info, path=path, **common)
    reference = load_reference(path)
    same = values(evaluate_task(task, model, tokenizer, info, reference=reference, **common))
    assert same["mean_kl"] == pytest.approx(0, abs=1e-6)
    assert same["top1_agreement"] == 1.0
    variant = make_llama()
    with torch.no_grad():
        variant.model.layers[0].self_attn.o_proj.weight.zero_()
    evaluation = evaluate_task(task, variant, tokenizer, info, reference=reference, **common)
    found = {record.metric: record for record in evaluation.records}
    assert found["mean_kl"].unit == "nats/token"
    assert found["mean_kl"].lower > 0.01
    assert 0 < found["top1_agreement"].value < 1
    windows = [item for item in evaluation.items if item.metric == "mean_kl"]
    weights = [item.detail["tokens"] for item in windows]
    assert found["mean_kl"].n == sum(weights)
    mean = np.average([item.outcome for item in windows], weights=weights)
    assert found["mean_kl"].value == pytest.approx(mean)
    # Another limit is another text: never compared in silence.
    with pytest.raises(ConfigError, match="made from other tokens"):
        evaluate_task(task, model, tokenizer, info, reference=reference, **{**common, "limit": 3})


# --- the very object ---------------------------------------------------------------------------------


def test_tied_weights_that_a_method_untied_stay_untied(model, tokenizer):
    """lm-eval ties the weights of a model in memory, which would score another model than was timed."""
    before = values(evaluate("kjv", model, tokenizer, limit=1))
    head = nn.Linear(32, VOCAB, bias=False)
    head.weight = nn.Parameter(model.lm_head.weight.detach() * 0.25)
    model.lm_head = head
    after = values(evaluate("kjv", model, tokenizer, limit=1))
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert after["bits_per_byte"] != pytest.approx(before["bits_per_byte"], rel=1e-3)


def test_any_module_that_gives_logits_can_be_scored(model, tokenizer, info, folder):
    class Wrapped(nn.Module):
        """No `device`, no `config`, no `generate`, weights in a buffer: as a method may leave it."""

        def __init__(self, inner):
            super().__init__()
            self.register_buffer("scale", torch.ones(1))
            self.forward_inner = inner.forward

        def forward(self, tokens):
            return SimpleNamespace(logits=self.forward_inner(tokens).logits * self.scale)

    wrapped = Wrapped(model)
    expected = values(evaluate("kjv", model, tokenizer, limit=1))
    assert values(evaluate("kjv", wrapped, tokenizer, limit=1, info=info)) == pytest.approx(expected)
    with pytest.raises(NotApplicable, match="Wrapped has no generate"):
        evaluate("write", wrapped, tokenizer, folder, info=info)


def test_a_model_in_half_precision_is_summed_in_float32(tokenizer):
    model = make_llama().to(torch.bfloat16)
    exact = values(evaluate("kjv", copy.deepcopy(model).float(), tokenizer, limit=2))
    found = values(evaluate("kjv", model, tokenizer, limit=2))
    assert found["bits_per_byte"] == pytest.approx(exact["bits_per_byte"], rel=5e-3)
    assert found["nll"] == pytest.approx(exact["nll"], rel=5e-3)


def test_log_probabilities_are_taken_in_float32(tokenizer):
    model = make_llama().to(torch.bfloat16)
    lm = InMemoryLM(model, tokenizer, info_from_config(model.config, "small"), batch_size=1)
    for sentence in (minimal_pairs()[0].good, minimal_pairs()[0].bad):
        ids = torch.tensor([[0, *tokenizer(sentence)["input_ids"]]])
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits
        exact, rough = (
            float(each.log_softmax(-1).gather(2, ids[:, 1:, None]).sum()) for each in (logits.float(), logits)
        )
        scores = lm.score([Query(tuple(ids[0].tolist()), ids.shape[1] - 1)])
        assert scores.log_likelihoods[0] == pytest.approx(exact, rel=1e-5)
        assert rough != pytest.approx(exact, rel=1e-4)


def test_a_tokenizer_without_an_end_gains_no_token(model, tokenizer, folder):
    """lm-eval would add a padding token, whose embedding does not exist."""
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = bare.pad_token = None
    assert len(bare) == VOCAB
    assert values(evaluate("write", model, bare, folder)) == values(
        evaluate("write", model, tokenizer, folder)
    )


def test_dropout_is_off_and_the_mode_is_restored(tokenizer):
    model = make_llama(attention_dropout=0.5)
    expected = values(evaluate("kjv", model, tokenizer, limit=1))
    model.train()
    assert values(evaluate("kjv", model, tokenizer, limit=1)) == expected
    assert model.training


def test_same_seed_same_numbers_at_any_batch_size(model, tokenizer, folder):
    first = evaluate("pick", model, tokenizer, folder)
    assert evaluate("pick", model, tokenizer, folder) == first
    assert values(evaluate("pick", model, tokenizer, folder, batch_size=1)) == values(first)
    one, many = (evaluate("kjv", model, tokenizer, limit=2, batch_size=size) for size in (1, 16))
    assert values(one) == pytest.approx(values(many), rel=1e-5)


def test_nothing_leaks(model, tokenizer, folder, capfd):
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    expected = (random.random(), np.random.rand(), float(torch.rand(1)))
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    level = logging.getLogger("lm_eval").level
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("kjv", "write", "pick"):
        evaluate(name, model, tokenizer, folder, limit=2)
    assert (random.random(), np.random.rand(), float(torch.rand(1))) == expected
    assert logging.getLogger("lm_eval").level == level
    assert (len(tokenizer), tokenizer.pad_token, tokenizer.model_max_length) == (VOCAB, None, POSITIONS)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert capfd.readouterr() == ("", "")  # a worker's log is for what went wrong


def test_progress_bars_work_again_afterwards(model, tokenizer, capfd):
    from tqdm import tqdm

    evaluate("kjv", model, tokenizer, limit=1)
    list(tqdm(range(2)))
    assert "2/2" in capfd.readouterr().err


# --- what cannot be scored ---------------------------------------------------------------------------


def test_a_broken_model_is_not_scored_as_perfect(model, tokenizer, folder):
    """`argmax` of NaN is 0, which is the right answer of `pick_again` and of every minimal pair."""
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    for name in ("pick_again", "grammar", "kjv", "finish"):
        with pytest.raises(NumericalFailure, match="NaN"):
            evaluate(name, model, tokenizer, folder, limit=2)


ROLLING = """
task: roll
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""


def running_text(folder, texts):
    data = folder / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "roll.yaml").write_text(ROLLING.format(data=data))


def test_an_empty_document_counts_for_nothing(model, tokenizer, folder):
    running_text(folder, ["In the beginning God created the heaven", "", "And the earth was without form"])
    found = evaluate("roll", model, tokenizer, folder)
    expected = lm_evals_own("roll", model, tokenizer, folder)["roll"]
    for record in found.records[:3]:
        assert record.value == pytest.approx(expected[f"{record.metric},none"], rel=1e-5)
        assert record.lower < record.value < record.upper
    assert [item.index for item in found.items if item.metric == "bits_per_byte"] == [0, 2]
    running_text(folder, ["", ""])
    with pytest.raises(NumericalFailure, match="byte_perplexity of roll is nan"):
        evaluate("roll", model, tokenizer, folder)


def test_a_document_whose_own_perplexity_is_beyond_all_numbers(model, tokenizer, folder):
    """One long word without a space, among many of ordinary length."""
    letters = random.Random(0)
    word = "".join(letters.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(300))
    running_text(folder, ["In the beginning God created the heaven and the earth. " * 300, word])
    found = evaluate("roll", model, tokenizer, folder)
    record, outcomes = found.records[0], [i.outcome for i in found.items if i.metric == "word_perplexity"]
    assert (record.metric, record.lower, record.upper) == ("word_perplexity", None, None)
    assert math.isfinite(record.value)
    assert outcomes[1] == math.inf


def test_a_perplexity_beyond_all_numbers_is_a_numerical_failure(model, tokenizer):
    with torch.no_grad():
        model.model.norm.weight.mul_(1e5)
    with pytest.raises(NumericalFailure, match=r"perplexity of kjv is inf|is infinite"):
        evaluate("kjv", model, tokenizer, limit=1)


def test_a_tie_is_not_right(model, tokenizer):
    with torch.no_grad():
        model.lm_head.weight.zero_()  # tied: every token is equally likely
    found = evaluate("grammar", model, tokenizer, limit=15)
    equal = [i for i in found.items if i.metric == "acc" and len(set(i.detail["loglikelihoods"])) == 1]
    assert equal
    assert all(item.outcome == 0.0 for item in equal)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "encoder"}, "is an encoder"),
        ({"synthetic": True}, "random weights: speed and memory only"),
    ],
)
def test_models_that_no_text_can_be_scored_with(change, message, model, tokenizer, info):
    from dataclasses import replace

    with pytest.raises(NotApplicable, match=message):
        evaluate("kjv", model, tokenizer, info=replace(info, **change))


def test_tokenizers_that_do_not_fit(model, tokenizer, info):
    with pytest.raises(NotApplicable, match="no tokenizer"):
        evaluate("kjv", model, None)
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = bare.eos_token = None
    with pytest.raises(NotApplicable, match="neither a beginning- nor an end-of-text token"):
        evaluate("kjv", model, bare)
    small = make_llama(vocab_size=64)
    with pytest.raises(ConfigError, match="tokenizer belongs to another model"):
        evaluate("kjv", small, tokenizer, limit=1)


def test_a_text_longer_than_the_model_is_refused(model, tokenizer, folder):
    with pytest.raises(NotApplicable, match=f"up to {POSITIONS} tokens; the model has {POSITIONS}"):
        evaluate("write_long", model, tokenizer, folder)


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens"])
def test_how_many_tokens_a_task_asks_for_may_be_said_by_any_name(name, model, tokenizer, folder):
    asked = (folder / "write.yaml").read_text().replace("max_gen_toks: 5", f"{name}: 4")
    (folder / "write.yaml").write_text(asked)
    found = evaluate("write", model, tokenizer, folder, limit=2)
    assert len(found.items) == 2
    (folder / "write.yaml").write_text(asked.replace(f"{name}: 4", f"{name}: {POSITIONS}"))
    with pytest.raises(NotApplicable, match=f"up to {POSITIONS} tokens; the model has {POSITIONS}"):
        evaluate("write", model, tokenizer, folder, limit=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be loaded: there are none"),
        ('{"question": "one"\n', "cannot be loaded: .*JSON parse error"),
    ],
)
def test_data_that_cannot_be_read_say_what_is_wrong_with_them(content, message, folder, model, tokenizer):
    (folder / "data.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=message):
        evaluate("pick", model, tokenizer, folder)


def test_a_split_that_is_not_there_is_named_as_a_key(folder, model, tokenizer):
    path = folder / "pick.yaml"
    path.write_text(path.read_text().replace("test_split: test", "test_split: absent"))
    with pytest.raises(ConfigError, match="task 'pick' cannot be built: KeyError: 'absent'"):
        evaluate("pick", model, tokenizer, folder)


def test_an_item_group_that_no_document_has(folder, model, tokenizer):
    path = folder / "pick.yaml"
    path.write_text(f"{path.read_text()}\nmetadata: {{item_group: absent}}\n")
    with pytest.raises(ConfigError, match="documents of task 'pick' have no field 'absent'"):
        evaluate("pick", model, tokenizer, folder)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("dataset_path: no/such_set\ntest_split: test", ConfigError, "data set .no/such_set. is not"),
        ("dataset_path: json\noutput_type: dance", ConfigError, "task 'odd' cannot be built"),
        ("custom_dataset: !function absent.load", ConfigError, "data of task 'odd' cannot be loaded"),
    ],
)
def test_a_task_that_cannot_be_loaded_is_one_clear_line(text, error, message, folder, model, tokenizer):
    (folder / "odd.yaml").write_text(f"task: odd\n{text}\n")
    with pytest.raises(error, match=message) as caught:
        evaluate("odd", model, tokenizer, folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [("unsafe_code: true", "executes generated code"), ("doc_to_image: question", "images or sound")],
)
def test_tasks_that_are_not_for_here(line, message, folder, model, tokenizer):
    path = folder / "pick.yaml"
    path.write_text(f"{path.read_text()}\n{line}\n")
    with pytest.raises(NotApplicable, match=message):
        evaluate("pick", model, tokenizer, folder)


def test_documents_that_are_no_running_text(model, tokenizer, info, tmp_path):
    with pytest.raises(NotApplicable, match="scores no running text"):
        make_reference(
            task_of("grammar"), model, tokenizer, info, limit=1, seed=0, batch_size=1, path=tmp_path / "r"
        )


@pytest.mark.parametrize("name", ["tiny_opt", "tiny_gpt2"])
def test_other_families(name, request, tokenizer):
    model = request.getfixturevalue(name)
    model.resize_token_embeddings(VOCAB)
    found = values(evaluate("kjv", model, tokenizer, limit=1))
    assert found["bits_per_byte"] == pytest.approx(
        lm_evals_own("kjv", model, tokenizer, limit=1)["kjv"]["bits_per_byte,none"], rel=1e-6
    )
