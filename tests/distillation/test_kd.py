"""Hinton's distillation: its loss and gradient against the formulas, who teaches whom, what is refused."""

from __future__ import annotations

import pytest
import torch
from harness_plugins.distillation import kd
from harness_plugins.distillation.kd import METHOD, KdOptions, distillation_loss, likeliest
from torch.nn import functional as F

from harness.chain import Chain, Step, parse_chain
from harness.errors import ConfigError, NotApplicable, UnknownName
from harness.grid import refusal
from harness.models.info import info_from_config
from harness.nn.anatomy import blocks_of
from harness.plugins import load_plugins
from harness.testing import TinyTokenizer, make_context, tiny_model
from harness.training import TrainSettings

SETTINGS = TrainSettings(steps=3, lr=1e-3, batch_size=2, seq_len=16)
ALL = torch.zeros(1, 4, dtype=torch.int64)


def _logits(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def _soft(student, teacher, **options):
    """The soft term alone."""
    labels = torch.zeros(student.shape[:-1], dtype=torch.int64)
    return distillation_loss(student, teacher, labels, KdOptions(lam=0, **options))[0]


# --- the loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [0.5, 1.0, 2.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_the_papers(T, dtype):
    student, teacher = _logits(2, 5, 11, seed=1, dtype=dtype), _logits(2, 5, 11, seed=2, dtype=dtype)
    labels = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(3))
    labels[0, 1] = labels[1, 4] = -100
    total, positions = 0.0, 0
    for b in range(2):
        for t in range(5):
            if labels[b, t] == -100:
                continue
            p = torch.softmax(teacher[b, t].double() / T, 0)
            q = torch.softmax(student[b, t].double() / T, 0)
            hard = -torch.log_softmax(student[b, t].double(), 0)[labels[b, t]]
            total += float(T**2 * (p * (p / q).log()).sum() + 0.7 * hard)
            positions += 1
    loss, dropped = distillation_loss(student, teacher, labels, KdOptions(T=T, lam=0.7))
    assert float(loss) == pytest.approx(total / positions, rel=1e-4)
    assert float(dropped) == 0
    plain, _ = distillation_loss(student, teacher, labels, KdOptions(T=T, lam=0.0, t2_scale=False))
    scaled, _ = distillation_loss(student, teacher, labels, KdOptions(T=T, lam=0.0))
    assert float(scaled) == pytest.approx(T**2 * float(plain), rel=1e-5)


@pytest.mark.parametrize(("T", "error"), [(1000.0, 0.01), (100.0, 0.04)])
def test_at_high_temperature_the_gradient_is_the_difference_of_the_logits(T, error):
    """(student - teacher) / N for zero-mean logits: section 2.1 of the paper. Without T² it vanishes."""
    teacher, student = (_logits(1, 1, 1000, seed=seed) for seed in (1, 2))
    teacher, student = teacher - teacher.mean(), (student - student.mean()).requires_grad_()
    (gradient,) = torch.autograd.grad(_soft(student, teacher, T=T), student)
    expected = (student - teacher).detach() / 1000
    assert float((gradient - expected).norm() / expected.norm()) <= error


@pytest.mark.parametrize("T", [1.0, 4.0])
def test_the_gradient_is_that_of_the_cross_entropy_with_the_teacher(T):
    teacher, student = _logits(1, 6, 40, seed=1), _logits(1, 6, 40, seed=2).requires_grad_()
    (gradient,) = torch.autograd.grad(_soft(student, teacher, T=T), student)
    wide = student.detach().double().requires_grad_()
    target = (teacher.double() / T).softmax(-1)
    cross_entropy = -(target * (wide / T).log_softmax(-1)).sum(-1).mean() * T**2
    (expected,) = torch.autograd.grad(cross_entropy, wide)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("topk", [None, 5])
def test_as_cross_entropy_the_loss_is_larger_by_the_teachers_entropy(topk):
    student, teacher = (_logits(1, 6, 40, seed=seed).requires_grad_() for seed in (1, 2))
    labels = torch.zeros(1, 6, dtype=torch.int64)
    losses, gradients = [], []
    for loss in ("kl", "ce"):
        value, _ = distillation_loss(student, teacher, labels, KdOptions(T=3.0, loss=loss, topk=topk))
        losses.append(value)
        gradients.append(torch.autograd.grad(value, student)[0])
    kept = teacher.detach().double()
    kept = kept if topk is None else kept.topk(topk, dim=-1).values
    entropy = torch.distributions.Categorical(logits=kept / 3.0).entropy().mean()
    assert float((losses[1] - losses[0]).detach()) == pytest.approx(9 * float(entropy), rel=1e-5)
    assert torch.equal(*gradients)


def test_training_data_without_anything_to_predict_is_refused(monkeypatch):
    model = tiny_model("llama")
    context = make_context(model, settings=SETTINGS)
    monkeypatch.setattr(
        kd, "prediction_task", lambda *_: lambda tokens: (tokens, torch.full_like(tokens, -100))
    )
    with pytest.raises(NotApplicable, match="no token to predict"):
        METHOD.transform(model, KdOptions(), context)


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_who_says_the_same_has_nothing_to_learn(shift):
    teacher = _logits(1, 4, 30)
    student = (teacher + shift).requires_grad_()
    loss = _soft(student, teacher, T=2.0)
    (gradient,) = torch.autograd.grad(loss, student)
    assert abs(loss.item()) <= (1e-9 if shift == 0 else 1e-6)  # a shift rounds in float32
    assert float(gradient.abs().max()) <= (1e-9 if shift == 0 else 1e-6)


def test_a_teacher_that_is_certain_is_the_true_token():
    student = _logits(1, 4, 9)
    labels = torch.tensor([[3, 1, 8, 0]])
    teacher = 1e3 * F.one_hot(labels, 9).float()
    loss, _ = distillation_loss(student, teacher, labels, KdOptions(T=1.0, lam=0.0))
    assert float(loss) == pytest.approx(float(F.cross_entropy(student[0], labels[0])), abs=1e-6)


def test_places_without_a_label_count_in_neither_term():
    student, teacher = _logits(1, 4, 9, seed=1), _logits(1, 4, 9, seed=2)
    labels = torch.tensor([[3, -100, 8, -100]])
    loss, _ = distillation_loss(student, teacher, labels, KdOptions())
    kept, _ = distillation_loss(student[:, [0, 2]], teacher[:, [0, 2]], labels[:, [0, 2]], KdOptions())
    assert float(loss) == pytest.approx(float(kept), rel=1e-6)
    student.requires_grad_()
    nothing, _ = distillation_loss(student, teacher, torch.full((1, 4), -100), KdOptions())
    nothing.backward()
    assert nothing.item() == 0
    assert not student.grad.any()


def test_the_likeliest_tokens_by_hand():
    teacher = torch.tensor([[[4.0, 1.0, 3.0, 0.0]]])
    student = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    p = torch.softmax(torch.tensor([4.0, 3.0]) / 2, 0)
    q = torch.softmax(torch.tensor([1.0, 3.0]) / 2, 0)
    full = torch.softmax(teacher[0, 0] / 2, 0)
    loss, dropped = distillation_loss(
        student, teacher, torch.zeros(1, 1, dtype=torch.int64), KdOptions(topk=2, lam=0)
    )
    assert float(loss) == pytest.approx(float(4 * (p * (p / q).log()).sum()), rel=1e-5)
    assert float(dropped) == pytest.approx(float(full[1] + full[3]), rel=1e-5)
    same, kept, none = likeliest(student[0], teacher[0], 99, 2.0)  # more than there are
    assert same.shape == kept.shape == (1, 4)
    assert float(none) == pytest.approx(0, abs=1e-6)


# --- who teaches whom -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_student_is_half_as_deep_and_starts_anew(family, dtype):
    model, original = tiny_model(family, layers=4).to(dtype), tiny_model(family, layers=4)
    context = make_context(model, tokenizer=TinyTokenizer, settings=SETTINGS)
    student = METHOD.transform(model, KdOptions(), context)
    assert len(blocks_of(student)) == 2
    assert context.trained_steps == 3
    assert not student.training
    assert {parameter.dtype for parameter in student.parameters()} == {dtype}
    ours, theirs = student.get_input_embeddings().weight, original.get_input_embeddings().weight
    assert (ours.float() - theirs).abs().mean().item() > 0.01


def test_the_teacher_is_the_untouched_model_without_dropout(monkeypatch):
    """The model given may be changed already: what teaches is the original."""
    model = tiny_model("opt")
    context = make_context(model, settings=SETTINGS)
    teachers, teacher = [], context.teacher
    monkeypatch.setattr(context, "teacher", lambda name: teachers.append(teacher(name)) or teachers[-1])
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    METHOD.transform(model, KdOptions(), context)
    (used,) = teachers
    original = tiny_model("opt")
    assert all(torch.equal(p, original.get_parameter(name)) for name, p in used.named_parameters())
    assert not used.training
    assert not any(parameter.requires_grad for parameter in used.parameters())


def test_a_student_with_the_models_own_weights_and_depth_has_nothing_to_learn():
    model, original = tiny_model("llama"), tiny_model("llama")
    context = make_context(model, settings=TrainSettings(steps=2, batch_size=2, seq_len=16, weight_decay=0.0))
    METHOD.transform(model, KdOptions(layers=2, init="model", lam=0.0), context)
    assert all(torch.equal(p, original.get_parameter(name)) for name, p in model.named_parameters())


def test_a_named_teacher_of_another_family_teaches_a_scratch_model():
    """It learns to predict what the teacher predicts, on tokens whose truth it is never shown."""
    model, teacher = tiny_model("llama", seed=1), tiny_model("gpt2", layers=1)
    info = info_from_config(model.config, "scratch:x", scratch=True)
    tokens = torch.arange(4000) % 7
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(3)  # opinions
        target = teacher(input_ids=tokens[None, :32]).logits.log_softmax(-1)

    def distance() -> float:
        with torch.no_grad():
            return float(
                F.kl_div(
                    model(input_ids=tokens[None, :32]).logits.log_softmax(-1),
                    target,
                    log_target=True,
                    reduction="sum",
                )
            )

    before = distance()
    context = make_context(
        model,
        info,
        tokens=tokens,
        settings=TrainSettings(steps=40, batch_size=4, seq_len=32),
        has_teacher=False,
        teachers={"zoo:llama-6m": teacher},
    )
    start = model.get_input_embeddings().weight
    student = METHOD.transform(model, KdOptions(teacher="zoo:llama-6m", lam=0.0, lr=3e-3), context)
    assert student is model  # its random weights are kept, and its depth
    assert student.get_input_embeddings().weight is start
    assert len(blocks_of(student)) == 2
    after = distance()
    assert after < 0.75 * before


def test_the_mass_outside_topk_is_recorded():
    model = tiny_model("llama")
    context = make_context(model, settings=SETTINGS)
    METHOD.transform(model, KdOptions(topk=16), context)
    recorded = {record.metric: record.value for record in context.records}
    assert 0.5 < recorded["teacher_mass_left_out"] < 1  # 240 of 256 tokens of a random model
    assert recorded["distillation_loss"] > 0


def test_random_weights_are_only_made_shallower():
    model = tiny_model("llama", layers=4)
    info = info_from_config(model.config, "shape:x", synthetic=True)
    context = make_context(model, info)
    assert len(blocks_of(METHOD.transform(model, KdOptions(), context))) == 2
    assert context.trained_steps == 0


# --- what is refused --------------------------------------------------------------------------------


def _reason(info, **options) -> str | None:
    step = Step(METHOD, KdOptions(**options))
    decision = refusal(Chain((step,)), info, "cpu")
    return None if decision is None else decision.reason


def test_without_a_teacher_it_is_refused():
    model = tiny_model("llama")
    info = info_from_config(model.config, "scratch:x", scratch=True)
    assert "needs a trained teacher" in _reason(info)
    assert "teacher=llama-6m" in METHOD.applies(info, KdOptions())
    with pytest.raises(NotApplicable, match="has no teacher"):
        METHOD.transform(model, KdOptions(), make_context(model, info, has_teacher=False))
    with pytest.raises(NotApplicable, match="no other model can be loaded"):
        METHOD.transform(model, KdOptions(teacher="zoo:opt-4m"), make_context(model))


def test_another_vocabulary_is_refused_before_anything_is_loaded_and_again_at_loading():
    model = tiny_model("llama")
    info = info_from_config(model.config, "test:llama")
    expected = "zoo:opt-4m predicts 4096 tokens, test:llama 256: their vocabularies differ"
    assert expected in _reason(info, teacher="zoo:opt-4m")
    other = tiny_model("llama")
    other.resize_token_embeddings(300, mean_resizing=False)
    with pytest.raises(NotApplicable, match="predicts 300 tokens"):
        make_context(model, teachers={"zoo:opt-4m": other}).teacher("zoo:opt-4m")


def test_as_many_but_other_tokens_are_refused():
    class Words:
        def __init__(self, *words):
            self.words = words

        def get_vocab(self):
            return {word: number for number, word in enumerate(self.words)}

    model = tiny_model("llama")
    context = make_context(model, tokenizer=Words("a", "b"), teachers={"zoo:opt-4m": model})
    context.teacher("zoo:opt-4m")
    context.tokenizer = Words("b", "a")
    with pytest.raises(NotApplicable, match="numbers other tokens"):
        context.teacher("zoo:opt-4m")


def test_an_encoder_cannot_learn_from_a_decoder():
    encoder = info_from_config(tiny_model("bert").config, "bert")
    assert "is a decoder" in _reason(encoder, teacher="zoo:llama-6m")
    bare = tiny_model("encoder")
    with pytest.raises(NotApplicable, match="no head"):
        METHOD.transform(bare, KdOptions(), make_context(bare, tokenizer=TinyTokenizer))


def test_the_named_teachers_content_is_part_of_the_key():
    assert "inputs" not in Step(METHOD, KdOptions()).identity()
    keys = [Step(METHOD, KdOptions(teacher=f"zoo:{name}")).identity() for name in ("opt-4m", "llama-6m")]
    hashes = [key["inputs"]["teacher"] for key in keys]
    assert all(each.startswith("files:") for each in hashes)
    assert len(set(hashes)) == 2


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"T": 0}, "T"),
        ({"lam": -0.1}, "lam"),
        ({"topk": 0}, "topk"),
        ({"steps": 0}, "steps"),
        ({"lr": 0}, "lr"),
        ({"layers": 0}, "layers"),
        ({"teacher": "org/model"}, "a bundled model"),
    ],
)
def test_bad_options_are_named(bad, text):
    with pytest.raises(ConfigError, match=text) as caught:
        KdOptions.parse(bad)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_taught_is_refused():
    with pytest.raises(UnknownName, match="did you mean 'llama-6m'"):
        KdOptions.parse({"teacher": "zoo:llama-6"})
    assert KdOptions.parse({"temperature": 4}).T == 4
    model = tiny_model("llama")
    info = info_from_config(model.config, "test:llama")
    assert "only 2" in METHOD.applies(info, KdOptions(layers=3))
    with pytest.raises(ConfigError, match="only 2"):
        METHOD.transform(model, KdOptions(layers=3), make_context(model))
    with pytest.raises(ConfigError, match="needs at least 1 step"):
        METHOD.transform(model, KdOptions(), make_context(model, settings=TrainSettings(steps=0)))
    with pytest.raises(ConfigError, match="the text has 5 tokens"):
        METHOD.transform(model, KdOptions(), make_context(model, tokens=torch.arange(5), settings=SETTINGS))


def test_the_teacher_is_written_by_its_name_in_a_list_of_methods():
    chain = parse_chain("kd:teacher=opt-4m:T=4", {"kd": METHOD})
    assert chain.steps[0].options == KdOptions(teacher="zoo:opt-4m", T=4.0)
    assert parse_chain(chain.label, {"kd": METHOD}) == chain


def test_a_student_comes_before_every_pruner():
    methods = load_plugins().methods
    info = info_from_config(tiny_model("llama").config, "test:llama")
    pruners = {name for name, method in methods.items() if method.leaves_zeros}
    assert pruners >= {
        "gmp",
        "iterative-prune",
        "magnitude-prune",
        "nm-prune",
        "sparsegpt",
        "sr-ste",
        "wanda",
    }
    for name in pruners:
        for student in ("kd", "distilbert"):
            found = refusal(parse_chain(f"{name}+{student}", methods), info, "cpu")
            assert found is not None
            assert f"write {student} first" in found.reason
    assert refusal(parse_chain("distilbert+nm-prune", methods), info, "cpu") is None
    assert refusal(parse_chain("structured-prune+distilbert", methods), info, "cpu") is None
