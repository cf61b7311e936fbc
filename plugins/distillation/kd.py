"""A small network learns more from a teacher's soft predictions than from the true tokens alone.

Paper: Distilling the Knowledge in a Neural Network. Geoffrey Hinton, Oriol Vinyals, Jeff Dean, 2015,
arXiv:1503.02531.

Changes: the model becomes the student: half its layers with new random weights. It is trained on T² ·
KL(softmax(teacher / T) ‖ softmax(student / T)) + lam · cross-entropy of the true tokens, next or masked.

Needs: training tokens and a teacher: the untouched model, or a bundled one of the same vocabulary that
`teacher` names. With a named teacher the student keeps its depth, and a `scratch:` model can be taught.
Random weights (`shape:` models) are only made shallower.

Knobs: `T`, the temperature; `lam`; `t2_scale` (False: without the factor T²); `loss` (kl, or ce: the
cross-entropy, which is larger by the teacher's entropy and has the same gradient); `topk`, for the teacher's
likeliest tokens only (both sides renormalised over them); `teacher` (the name of a bundled model); `layers`
of the student; `init` (random, or the model's own weights); `lr`; `steps` (the sweep's budget where left
out).

Hurts: with a teacher that is not fully trained itself, or smaller than the student, the true tokens teach
more. With few steps a random student stays far behind: distilbert starts from the teacher's layers; and
there a `T` of 2 was worse than the text alone, a `T` of 1 better.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, field_validator

from harness import ConfigError, Method, NotApplicable, Options, Paper, UnknownName, hookimpl
from harness.models.loading import describe, zoo_names
from harness.models.spec import parse_model
from harness.nn.anatomy import blocks_of
from harness.nn.fresh import reinitialised
from harness.nn.losses import outputs_of, prediction_task, soft_target_loss, task_loss

from ._student import keep_layers, spread

if TYPE_CHECKING:
    from torch import nn

    from harness import Context, ModelInfo

__all__ = ["METHOD", "KdOptions", "distillation_loss", "likeliest"]


class KdOptions(Options):
    T: float = Field(2.0, gt=0, description="temperature of the soft targets")
    lam: float = Field(0.5, ge=0, description="weight of the true tokens")
    t2_scale: bool = Field(True, description="soft targets times T², so that gradients keep their size")
    loss: Literal["kl", "ce"] = Field("kl", description="divergence from the teacher, or cross-entropy")
    topk: int | None = Field(None, ge=1, description="the teacher's likeliest tokens only; all by default")
    teacher: str | None = Field(None, description="a bundled model; by default the original")
    layers: int | None = Field(
        None, ge=1, description="of the student; half by default, all with a named teacher"
    )
    init: Literal["random", "model"] = Field("random", description="what the student starts from")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    steps: int | None = Field(None, ge=1, description="by default the sweep's training budget")

    @field_validator("teacher")
    @classmethod
    def _is_bundled(cls, value: str | None) -> str | None:
        if value is None:
            return None
        name = value.removeprefix("zoo:")
        if name not in zoo_names():
            raise UnknownName("teacher", name, zoo_names(), hint="(a teacher is a bundled model)")
        return name


def likeliest(
    student: torch.Tensor, teacher: torch.Tensor, topk: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both sides' logits [positions, topk] of the teacher's likeliest tokens, and the probability left out.

    The last is the teacher's mean mass on all other tokens, at this temperature.
    """
    kept, places = teacher.topk(min(topk, teacher.shape[-1]), dim=-1)
    mass = (teacher.float() / temperature).softmax(-1).gather(-1, places).sum(-1)
    return student.gather(-1, places), kept, (1 - mass).mean()


def distillation_loss(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, options: KdOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the teacher's probability that `topk` left out (0 without it).

    Args:
        student, teacher: logits [batch, tokens, vocab].
        labels: int64 [batch, tokens], -100 where nothing is to be predicted: such places count in neither
            term. Where there are only such places the loss is 0.
    """
    kept = labels != -100
    if not kept.any():
        return student.sum() * 0.0, student.new_zeros(())
    soft_student, soft_teacher, dropped = student[kept], teacher[kept], student.new_zeros(())
    if options.topk is not None:
        soft_student, soft_teacher, dropped = likeliest(soft_student, soft_teacher, options.topk, options.T)
    soft = soft_target_loss(soft_student, soft_teacher, options.T)
    if options.loss == "ce":
        soft = soft + options.T**2 * _entropy(soft_teacher.detach() / options.T)
    if not options.t2_scale:
        soft = soft / options.T**2
    return soft + options.lam * task_loss(student, labels), dropped


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    """Mean entropy (nats) of the distributions that logits [positions, vocab] stand for."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def transform(model: nn.Module, options: KdOptions, context: Context) -> nn.Module:
    corrupt = prediction_task(model, context)
    if context.info.synthetic:
        return _student(model, options, context).eval()
    context.training_steps(options.steps)
    teacher = context.teacher(None if options.teacher is None else f"zoo:{options.teacher}")
    student = _student(model, options, context)
    left_out, predicted = torch.zeros((), device=context.device), torch.zeros((), device=context.device)

    def loss(student: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        inputs, labels = corrupt(tokens)
        with torch.no_grad():
            target = outputs_of(teacher, inputs).logits
        value, dropped = distillation_loss(outputs_of(student, inputs).logits, target, labels, options)
        left_out.add_(dropped.detach())
        predicted.add_((labels != -100).sum())
        return value

    report = context.train(student, loss=loss, steps=options.steps, lr=options.lr)
    if not int(predicted):
        raise NotApplicable("the training data has no token to predict: windows of one token, or none masked")
    context.record("distillation_loss", report.final_loss, "nats", "mean of the last tenth")
    if options.topk is not None:
        context.record("teacher_mass_left_out", float(left_out) / report.steps, "1", "outside topk")
    return student


def _student(model: nn.Module, options: KdOptions, context: Context) -> nn.Module:
    depth = len(blocks_of(model))
    layers = _layers(depth, options)
    if layers > depth:
        raise ConfigError(f"layers={layers}, but the model has only {depth}")
    if layers < depth:
        keep_layers(model, spread(depth, layers))
    if options.init == "random" and not context.info.scratch:  # which has random weights already
        model = reinitialised(model, context.generator("student"))
    return model


def _layers(depth: int, options: KdOptions) -> int:
    default = max(1, depth // 2) if options.teacher is None else depth
    return options.layers or default


def applies(info: ModelInfo, options: KdOptions) -> str | None:
    if info.family == "other":
        return f"architecture {info.model_type!r} is not known"
    if options.layers is not None and options.layers > info.num_layers:
        return f"layers={options.layers}, but the model has only {info.num_layers}"
    if options.teacher is None:
        if info.scratch:
            return "a model trained from scratch has no teacher; name one, as teacher=llama-6m"
        return None
    written = f"zoo:{options.teacher}"
    teacher = describe(parse_model(written)).info
    if teacher.kind != info.kind:
        return f"the teacher {written} is a {teacher.kind}, the model is none"
    if teacher.vocab_size != info.vocab_size:
        return (
            f"the teacher {written} predicts {teacher.vocab_size} tokens, {info.label} {info.vocab_size}: "
            "their vocabularies differ"
        )
    return None


def _inputs(options: KdOptions) -> dict[str, str]:
    if options.teacher is None:
        return {}
    return {"teacher": describe(parse_model(f"zoo:{options.teacher}")).identity}


METHOD = Method(
    name="kd",
    family="distillation",
    paper=Paper(
        title="Distilling the Knowledge in a Neural Network",
        authors="Hinton, Vinyals, Dean",
        year=2015,
        arxiv="1503.02531",
    ),
    options=KdOptions,
    transform=transform,
    needs=lambda options: ("training", "teacher") if options.teacher is None else ("training",),
    applies=applies,
    architectural=True,
    trains_scratch=True,
    inputs=_inputs,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
