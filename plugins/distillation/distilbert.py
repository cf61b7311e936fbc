"""Half the layers, nearly the accuracy: a student from the teacher's own layers and a triple loss.

Paper: DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter. Victor Sanh,
Lysandre Debut, Julien Chaumond, Thomas Wolf, 2019, arXiv:1910.01108.

Changes: the depth. The student has the teacher's width, embeddings and head, and every second block
of it; BERT's token types and pooler go. It is trained on a_ce · T² · KL to the teacher's softened
predictions + a_task · the teacher's own task (next or masked token) + a_cos · (1 - cosine of the
last hidden states).

Needs: training tokens and the teacher, which is the original model. Random weights (`shape:`
models) are only made shallower.

Knobs: `layers` kept; `layer_map`, which ones (alternate, first, or numbers as 0-2-4); `T`; `a_ce`,
`a_task`, `a_cos`; `lr`; `steps` (the sweep's budget where left out); `init` (teacher or random).

Hurts: without a real training budget; where the embeddings are most of the model little is saved.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, field_validator

from harness import ConfigError, Method, Options, Paper, hookimpl
from harness.nn.anatomy import blocks_of
from harness.nn.losses import (
    Outputs,
    cosine_loss,
    outputs_of,
    prediction_task,
    soft_target_loss,
    task_loss,
)

from ._student import (
    checked_map,
    drop_token_types_and_pooler,
    keep_layers,
    reinitialised,
    spread,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from harness import Context, ModelInfo

__all__ = ["METHOD", "DistilBertOptions", "layers_to_keep", "triple_loss"]


class DistilBertOptions(Options):
    layers: int | None = Field(None, ge=1, description="blocks of the student; half by default")
    layer_map: Literal["alternate", "first"] | tuple[int, ...] = "alternate"
    T: float = Field(2.0, gt=0, description="temperature of the soft targets")
    a_ce: float = Field(5.0, ge=0, description="weight of the soft targets")
    a_task: float = Field(2.0, ge=0, description="weight of the true tokens")
    a_cos: float = Field(1.0, ge=0, description="weight of the hidden states' direction")
    lr: float = Field(5e-4, gt=0)
    steps: int | None = Field(None, ge=0, description="by default the sweep's training budget")
    init: Literal["teacher", "random"] = "teacher"

    @field_validator("layer_map", mode="before")
    @classmethod
    def _read_numbers(cls, value: Any) -> Any:
        if isinstance(value, str) and re.fullmatch(r"\d+(\D\d+)*", value):
            return tuple(int(number) for number in re.findall(r"\d+", value))
        return value


def layers_to_keep(num_layers: int, options: DistilBertOptions) -> tuple[int, ...]:
    """The teacher's layers that become the student's.

    Raises:
        ConfigError: more layers than there are, or a map that does not fit.
    """
    chosen = options.layer_map
    if not isinstance(chosen, str):
        if options.layers not in (None, len(chosen)):
            raise ConfigError(f"layers={options.layers} but layer_map names {len(chosen)} layers")
        return checked_map(chosen, num_layers)
    kept = options.layers or max(1, num_layers // 2)
    if kept > num_layers:
        raise ConfigError(f"layers={kept}, but the teacher has only {num_layers}")
    return tuple(range(kept)) if chosen == "first" else spread(num_layers, kept)


def triple_loss(
    student: Outputs, teacher: Outputs, labels: torch.Tensor, options: DistilBertOptions
) -> torch.Tensor:
    """The loss of the paper; `labels` [batch, tokens] are -100 where nothing is to be predicted."""
    return (
        options.a_ce * soft_target_loss(student.logits, teacher.logits, options.T)
        + options.a_task * task_loss(student.logits, labels)
        + options.a_cos * cosine_loss(student.hidden, teacher.hidden)
    )


def transform(model: nn.Module, options: DistilBertOptions, context: Context) -> nn.Module:
    trains = not context.info.synthetic and options.steps != 0
    corrupt = prediction_task(model, context) if trains else None  # refuses before anything is changed
    keep_layers(model, layers_to_keep(len(blocks_of(model)), options))
    if options.init == "random":
        model = reinitialised(model, context.generator("student"))
    if context.info.kind == "encoder":
        drop_token_types_and_pooler(model)
    if corrupt is None:
        return model.eval()
    teacher = context.teacher()

    def loss(student: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        inputs, labels = corrupt(tokens)
        with torch.no_grad():
            target = outputs_of(teacher, inputs)
        return triple_loss(outputs_of(student, inputs), target, labels, options)

    report = context.train(model, loss=loss, steps=options.steps, lr=options.lr)
    context.record("distillation_loss", report.final_loss, "nats", "mean of the last tenth")
    return model


def applies(info: ModelInfo, options: DistilBertOptions) -> str | None:
    if info.family == "other":
        return f"architecture {info.model_type!r} is not known"
    if info.scratch:
        return "a model trained from scratch has no teacher"
    try:
        layers_to_keep(info.num_layers, options)
    except ConfigError as error:
        return str(error)
    return None


METHOD = Method(
    name="distilbert",
    family="distillation",
    paper=Paper(
        title="DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter",
        authors="Sanh, Debut, Chaumond, Wolf",
        year=2019,
        arxiv="1910.01108",
    ),
    options=DistilBertOptions,
    transform=transform,
    needs=lambda options: () if options.steps == 0 else ("training", "teacher"),
    applies=applies,
    architectural=True,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
