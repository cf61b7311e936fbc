"""The half-depth student: surgery, the three losses, and that it learns from its teacher."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from harness_plugins.distillation._student import (
    drop_token_types_and_pooler,
    keep_layers,
    spread,
)
from harness_plugins.distillation.distilbert import (
    METHOD,
    DistilBertOptions,
    layers_to_keep,
    triple_loss,
)
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, BertModel, DynamicCache, StaticCache

from harness.errors import ConfigError, NotApplicable
from harness.measure.generation import decode_logits_match
from harness.models.info import info_from_config
from harness.nn.anatomy import blocks_of
from harness.nn.losses import Outputs, TokenMasking, cosine_loss, outputs_of, soft_target_loss
from harness.testing import make_context, tiny_model
from harness.training import TrainSettings

DECODERS = ["llama", "opt", "gpt2"]
TOKENIZER = SimpleNamespace(mask_token_id=4, all_special_ids=[0, 1, 2, 3, 4])


def _tokens(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(5, 256, (batch, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def _logits(model, tokens, **kwargs):
    return model(input_ids=tokens, **kwargs).logits


def _untrained(model, **options):
    context = make_context(model, tokenizer=TOKENIZER)
    return METHOD.transform(model, DistilBertOptions(steps=0, **options), context)


# --- which layers ---------------------------------------------------------------------------------


def test_twelve_layers_become_the_papers_six():
    assert spread(12, 6) == (0, 2, 4, 7, 9, 11)


@pytest.mark.parametrize("layers", range(1, 25))
def test_the_spread_rises_strictly_from_first_to_last(layers):
    for kept in range(1, layers + 1):
        chosen = spread(layers, kept)
        assert len(chosen) == kept
        assert list(chosen) == sorted(set(chosen))
        assert chosen[0] == 0
        assert kept == 1 or chosen[-1] == layers - 1
    assert spread(layers, layers) == tuple(range(layers))


def test_options_choose_the_layers():
    assert layers_to_keep(12, DistilBertOptions()) == (0, 2, 4, 7, 9, 11)
    assert layers_to_keep(5, DistilBertOptions()) == (0, 4)
    assert layers_to_keep(1, DistilBertOptions()) == (0,)
    assert layers_to_keep(6, DistilBertOptions(layer_map="first", layers=3)) == (0, 1, 2)
    written = DistilBertOptions.parse({"layer_map": "0-3-5"})
    assert layers_to_keep(6, written) == (0, 3, 5)
    assert DistilBertOptions.parse(written.canonical()) == written


@pytest.mark.parametrize(
    "options", [{"layer_map": (2, 1)}, {"layer_map": (0, 6)}, {"layer_map": (1, 1)}, {"layers": 7}]
)
def test_maps_that_do_not_fit_are_refused(options):
    parsed = DistilBertOptions.parse(options)
    with pytest.raises(ConfigError):
        layers_to_keep(6, parsed)
    info = info_from_config(tiny_model("llama", layers=6).config, "six")
    assert METHOD.applies(info, parsed)


@pytest.mark.parametrize(
    ("bad", "name"),
    [({"T": 0}, "T"), ({"a_cos": -1}, "a_cos"), ({"layers": 0}, "layers"), ({"init": "x"}, "init")],
)
def test_bad_options_are_named(bad, name):
    with pytest.raises(ConfigError, match=name):
        DistilBertOptions.parse(bad)


# --- surgery --------------------------------------------------------------------------------------


def test_bert_base_loses_forty_percent_of_its_parameters():
    """109,482,240 -> 66,362,880, as published; on the meta device, nothing is allocated."""
    with torch.device("meta"):
        model = BertModel(BertConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 109_482_240
    keep_layers(model, layers_to_keep(12, DistilBertOptions()))
    drop_token_types_and_pooler(model)
    after = sum(parameter.numel() for parameter in model.parameters())
    assert after == 66_362_880
    assert after / 109_482_240 == pytest.approx(0.606, abs=0.001)


@pytest.mark.parametrize("family", [*DECODERS, "bert"])
def test_keeping_every_layer_changes_no_logit(family):
    model, tokens = tiny_model(family), _tokens(30)
    before = _logits(model, tokens)
    result = _untrained(model, layers=2)
    bound = 1e-6 if family == "bert" else 0.0  # BERT: token types are folded into positions
    assert (_logits(result, tokens) - before).abs().max() <= bound


@pytest.mark.parametrize("family", [*DECODERS, "bert"])
def test_the_student_is_the_chosen_layers_of_the_teacher(family):
    teacher = tiny_model(family, layers=5)
    student = keep_layers(copy.deepcopy(teacher), (0, 2, 4))
    kept, original = blocks_of(student), blocks_of(teacher)
    assert len(kept) == student.config.num_hidden_layers == 3
    for (_, block), index in zip(kept, (0, 2, 4), strict=True):
        for name, parameter in original[index][1].named_parameters():
            assert torch.equal(block.get_parameter(name), parameter)
    # Reference: the teacher with the other blocks made transparent.
    for index in (1, 3):
        original[index][1].forward = lambda hidden_states, *_args, **_kwargs: hidden_states
    tokens = _tokens(20)
    assert torch.equal(
        _logits(student, tokens, **_no_cache(family)), _logits(teacher, tokens, **_no_cache(family))
    )


def _no_cache(family: str) -> dict[str, bool]:
    return {} if family == "bert" else {"use_cache": False}


@pytest.mark.parametrize("family", DECODERS)
def test_the_cache_has_one_layer_for_each_that_is_left(family):
    """Kept attention modules must be renumbered: they name their slot in the cache."""
    student = _untrained(tiny_model(family, layers=4), layer_map=(1, 3))
    tokens = _tokens(20)
    expected = _logits(student, tokens)
    growing = DynamicCache(config=student.config)
    static = StaticCache(config=student.config, max_cache_len=20)
    for cache, width in ((growing, None), (static, 20)):
        assert len(cache.layers) == 2
        pieces = []
        for step in range(20):
            mask = torch.ones(2, width or step + 1)
            positions = torch.tensor([[step]])
            pieces.append(
                _logits(
                    student,
                    tokens[:, step : step + 1],
                    past_key_values=cache,
                    attention_mask=mask,
                    position_ids=positions,
                )
            )
        assert (torch.cat(pieces, 1) - expected).abs().max() <= 1e-4
        assert len(cache.layers) == 2
    assert decode_logits_match(student, tokens[:, :7], 8) <= 1e-5


def test_a_student_saves_and_loads(tmp_path):
    from transformers import LlamaForCausalLM

    student = _untrained(tiny_model("llama", layers=4))
    student.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(_logits(loaded, _tokens(20)), _logits(student, _tokens(20)))


@pytest.mark.parametrize("prefixed", [True, False])
def test_without_token_types_single_sentences_are_embedded_as_before(prefixed):
    model = tiny_model("bert" if prefixed else "encoder")
    tokens = _tokens(30)
    with torch.no_grad():
        before = model(input_ids=tokens)[0]
        drop_token_types_and_pooler(model)
        after = model(input_ids=tokens)[0]
        half = model.to(torch.bfloat16)(input_ids=tokens)[0]
    assert (after - before).abs().max() <= 1e-5
    assert half.dtype == torch.bfloat16
    assert not any("token_type_emb" in name or "pooler" in name for name in model.state_dict())


@pytest.mark.parametrize("family", DECODERS)
def test_a_random_student_is_new_and_the_same_each_time(family):
    first, again = (_untrained(tiny_model(family, layers=4), init="random") for _ in range(2))
    teacher = tiny_model(family, layers=4)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
    embedding = teacher.get_input_embeddings().weight
    assert not torch.equal(first.get_input_embeddings().weight, embedding)
    assert first.get_output_embeddings().weight is first.get_input_embeddings().weight
    assert len(blocks_of(first)) == 2


def test_a_random_student_of_a_changed_model_is_refused():
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(128, 256, bias=True)
    with pytest.raises(NotApplicable, match="init=random"):
        _untrained(model, init="random", layers=2)


# --- losses ---------------------------------------------------------------------------------------


def test_soft_targets_equal_the_written_formula():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    temperature, total = 2.5, 0.0
    for b in range(2):
        for t in range(3):
            p = [math.exp(float(z) / temperature) for z in teacher[b, t]]
            q = [math.exp(float(z) / temperature) for z in student[b, t]]
            total += sum(
                x / sum(p) * math.log((x / sum(p)) / (y / sum(q))) for x, y in zip(p, q, strict=True)
            )
    expected = temperature**2 * total / 6
    assert float(soft_target_loss(student, teacher, temperature)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("temperature", "bound"), [(1000.0, 0.01), (100.0, 0.04)])
def test_hot_soft_targets_match_logits(temperature, bound):
    """With the factor T² the gradient tends to (z_s - z_t) / N for zero-mean logits (Hinton 2015)."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        3 * torch.randn(1, 4, 1000, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    student, teacher = (z - z.mean(-1, keepdim=True) for z in (student, teacher))
    student.requires_grad_()
    soft_target_loss(student, teacher, temperature).backward()
    expected = (student - teacher).detach() / 1000 / 4  # mean over four positions
    assert (student.grad - expected).norm() / expected.norm() <= bound


def test_equal_predictions_cost_nothing():
    logits = torch.randn(2, 5, 11)
    hidden = torch.randn(2, 5, 8)
    for shift in (0.0, 3.0):
        assert float(soft_target_loss(logits + shift, logits, 2.0)) <= 1e-6
    assert float(cosine_loss(3 * hidden, hidden)) == pytest.approx(0, abs=1e-6)
    assert float(cosine_loss(-hidden, hidden)) == pytest.approx(2, abs=1e-6)


def test_at_the_start_a_full_depth_student_only_pays_for_the_task():
    model, tokens = tiny_model("llama"), _tokens(30)
    labels = F.pad(tokens[:, 1:], (0, 1), value=-100)
    with torch.no_grad():
        out = outputs_of(model, tokens)
        same = outputs_of(copy.deepcopy(model), tokens)
        options = DistilBertOptions(a_task=0)
        assert float(triple_loss(out, same, labels, options)) <= 1e-5
        task = triple_loss(out, same, labels, DistilBertOptions(a_ce=0, a_cos=0, a_task=2))
        reference = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert float(task) == pytest.approx(2 * float(reference), rel=1e-6)


def test_the_three_parts_add_up():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        Outputs(torch.randn(2, 4, 9, generator=generator), torch.randn(2, 4, 6, generator=generator))
        for _ in range(2)
    )
    labels = torch.tensor([[1, -100, 3, 4], [-100, -100, -100, 0]])
    options = DistilBertOptions(T=3.0, a_ce=0.7, a_task=1.3, a_cos=0.4)
    chosen = labels != -100
    expected = (
        0.7 * soft_target_loss(student.logits, teacher.logits, 3.0)
        + 1.3 * F.cross_entropy(student.logits[chosen], labels[chosen])
        + 0.4 * cosine_loss(student.hidden, teacher.hidden)
    )
    assert torch.allclose(triple_loss(student, teacher, labels, options), expected)
    nothing = torch.full_like(labels, -100)
    assert torch.isfinite(triple_loss(student, teacher, nothing, options))


def test_masking_follows_the_recipe():
    masking = TokenMasking(4, (0, 1, 2, 3, 4), 256, torch.Generator().manual_seed(0))
    tokens = torch.randint(0, 256, (64, 1000), generator=torch.Generator().manual_seed(1))
    corrupted, labels = masking(tokens)
    chosen = labels != -100
    assert float(chosen.float().mean()) == pytest.approx(0.15, abs=0.005)
    assert torch.equal(labels[chosen], tokens[chosen])
    assert torch.equal(corrupted[~chosen], tokens[~chosen])
    assert not chosen[tokens < 5].any()
    masked = (corrupted[chosen] == 4).float().mean()
    unchanged = (corrupted[chosen] == tokens[chosen]).float().mean()
    assert float(masked) == pytest.approx(0.8, abs=0.02)
    assert float(unchanged) == pytest.approx(0.1, abs=0.02)
    assert not torch.equal(masking(tokens)[1], labels)  # drawn anew


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bert"])
def test_a_student_moves_towards_its_teacher(family):
    model = tiny_model(family, layers=4)
    with torch.no_grad():  # random blocks hardly matter at their usual size
        for _, block in blocks_of(model):
            for parameter in block.parameters():
                parameter.mul_(6 if parameter.ndim == 2 else 1)
        model.get_output_embeddings().weight.mul_(10)
    teacher, start = copy.deepcopy(model), _untrained(copy.deepcopy(model))
    settings = TrainSettings(batch_size=4, seq_len=16)
    context = make_context(model, tokenizer=TOKENIZER, settings=settings)
    student = METHOD.transform(model, DistilBertOptions(a_task=0.0, steps=40, lr=1e-3), context)
    tokens = _tokens(16, batch=8)
    with torch.no_grad():
        target = outputs_of(teacher, tokens)
        before, after = (
            soft_target_loss(outputs_of(m, tokens).logits, target.logits, 2.0) for m in (start, student)
        )
    assert after < 0.92 * before
    assert context.trained_steps == 40
    assert [record.metric for record in context.records] == ["distillation_loss"]
    assert not any(parameter.requires_grad for parameter in context.teacher().parameters())


def test_the_default_length_is_the_budget_of_the_sweep():
    model = tiny_model("llama")
    context = make_context(model)
    METHOD.transform(model, DistilBertOptions(), context)
    assert context.trained_steps == context.settings.steps
    assert METHOD.needs_of(DistilBertOptions()) == {"training", "teacher"}
    assert METHOD.needs_of(DistilBertOptions(steps=0)) == frozenset()


@pytest.mark.parametrize("family", ["llama", "encoder"])
def test_random_weights_are_only_made_shallower(family):
    """An encoder needs no head for masked tokens when nothing is trained."""
    model = tiny_model(family)
    info = info_from_config(model.config, f"shape:{family}", synthetic=True)
    context = make_context(model, info)
    assert len(blocks_of(METHOD.transform(model, DistilBertOptions(), context))) == 1
    assert context.trained_steps == 0


def test_it_says_where_it_does_not_fit():
    info = info_from_config(tiny_model("llama").config, "x", scratch=True)
    assert "teacher" in METHOD.applies(info, DistilBertOptions())
    bare = tiny_model("encoder")
    with pytest.raises(NotApplicable, match="no head"):
        METHOD.transform(bare, DistilBertOptions(), make_context(bare))
    masked = tiny_model("bert")
    with pytest.raises(NotApplicable, match="mask token"):
        METHOD.transform(masked, DistilBertOptions(), make_context(masked))


@pytest.mark.slow
def test_half_the_layers_take_at_most_063_of_the_time():
    """Random BERT-base shapes, one sequence of 128 tokens, CPU; the shares of runs are interleaved."""
    import time

    torch.manual_seed(0)
    full = BertForMaskedLM(BertConfig()).eval()
    half = drop_token_types_and_pooler(keep_layers(copy.deepcopy(full), spread(12, 6)))
    tokens = _tokens(128, batch=1)
    best = {"full": math.inf, "half": math.inf}
    with torch.no_grad():
        for _ in range(6):
            for name, model in (("full", full.bert), ("half", half.bert)):
                start = time.perf_counter()
                model(input_ids=tokens)
                best[name] = min(best[name], time.perf_counter() - start)
    assert best["half"] <= 0.63 * best["full"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_half_the_layers_are_at_least_16_times_faster_in_a_graph():
    from triton.testing import do_bench

    times = {}
    for layers in (12, 6):
        model = BertModel(BertConfig(num_hidden_layers=layers)).eval().cuda().bfloat16()
        tokens = _tokens(128, batch=1).cuda()
        mask = torch.ones(1, 1, 128, 128, dtype=torch.bool, device="cuda")
        with torch.no_grad():
            for _ in range(3):
                model(input_ids=tokens, attention_mask=mask)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                model(input_ids=tokens, attention_mask=mask)
        times[layers] = do_bench(graph.replay)
    assert times[12] / times[6] >= 1.6
