"""QAT with a teacher: imitating the original model recovers what rounding costs, on any text or none.

Paper: LLM-QAT: Data-Free Quantization Aware Training for Large Language Models. Zechun Liu, Barlas
Oguz, Changsheng Zhao, Ernie Chang, Pierre Stock, Yashar Mehdad, Yangyang Shi, Raghuraman
Krishnamoorthi, Vikas Chandra, 2023, arXiv:2305.17888; soft targets after Hinton et al. 2015,
arXiv:1503.02531. Its quantized key-value cache is not part of this method.

Changes: as qat, all weights are trained while the linear layers inside the blocks compute with rounded
weights, which are then packed. The loss is T² · KL(teacher ‖ student) + beta · the mean over the
layers of MSE(hidden states) / mean(teacher's hidden states²) + lam · cross-entropy of the true
tokens. The teacher is the original model, frozen.

Needs: the teacher and tokens: of the training text (`data` train), uniform random ones (random), or
sampled from the teacher itself (generated; decoders only): a first token at random, a few more by
the largest probability, the rest drawn from the teacher's distribution. No true tokens with `lam` 0.

Knobs: those of qat, which are `bits` (16: plain distillation from itself, which changes nothing),
`a_bits`, `w_gran`, `group_size`, `learn_scale`, `scale_init`, `lr`, `scale_lr_mult`, `steps`; and `T`,
`beta`, `lam`, `data`, `samples` (sequences that the teacher generates).

Hurts: takes the memory of qat and the teacher's beside it. A teacher that is itself not fully trained
is no better than the text: there the true tokens (qat) win.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator

from harness import ConfigError, Method, Paper, hookimpl
from harness.nn.losses import (
    Outputs,
    hidden_state_loss,
    outputs_of,
    prediction_task,
    soft_target_loss,
    task_loss,
)

from ._qat import TrainedOptions, refused, trained_and_packed

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from harness import Context, ModelInfo

__all__ = ["METHOD", "QatKdOptions", "imitation_loss", "teacher_samples"]

_GREEDY_TOKENS = 4
_GENERATED_AT_ONCE = 64


class QatKdOptions(TrainedOptions):
    T: float = Field(1.0, gt=0, description="temperature of the soft targets")
    beta: float = Field(0.0, ge=0, description="weight of the hidden states")
    lam: float = Field(0.0, ge=0, description="weight of the true tokens")
    data: Literal["train", "random", "generated"] = Field("train", description="what it is trained on")
    samples: int = Field(256, ge=1, description="sequences that the teacher generates; data=generated")

    @model_validator(mode="after")
    def _has_truth(self) -> QatKdOptions:
        if self.lam and self.data == "random":
            raise ValueError("lam: random tokens have no true continuation; leave lam at 0")
        return self


def imitation_loss(
    student: Outputs, teacher: Outputs, labels: torch.Tensor, options: QatKdOptions
) -> torch.Tensor:
    """The three parts; `labels` [batch, tokens] are -100 where nothing is to be predicted.

    Raises:
        ConfigError: `beta` is above 0 and the two have not the same layers.
    """
    loss = soft_target_loss(student.logits, teacher.logits, options.T)
    if options.beta:
        loss = loss + options.beta * hidden_state_loss(student.layers, teacher.layers)
    if options.lam:
        loss = loss + options.lam * task_loss(student.logits, labels)
    return loss


@torch.no_grad()
def teacher_samples(
    teacher: nn.Module, samples: int, seq_len: int, generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    """Token ids int64 [samples, seq_len] that a decoder generates, on the CPU."""
    config: Any = teacher.config
    tokens = torch.randint(config.vocab_size, (samples, 1), generator=generator)
    batches = []
    for batch in tokens.split(_GENERATED_AT_ONCE):
        cache = None
        for length in range(1, seq_len):
            output = teacher(input_ids=batch[:, -1:].to(device), past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, output.logits[:, -1].float().cpu()
            if length <= _GREEDY_TOKENS:
                drawn = logits.argmax(-1, keepdim=True)
            else:
                drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            batch = torch.cat([batch, drawn], 1)
        batches.append(batch)
    return torch.cat(batches)


def transform(model: nn.Module, options: QatKdOptions, context: Context) -> nn.Module:
    if options.steps == 0 or context.info.synthetic:
        return trained_and_packed(model, options, context, None)
    corrupt = prediction_task(model, context)
    teacher = context.teacher()
    _check_layers(model, teacher, options)
    choose = _data(teacher, options, context)

    def loss(student: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        inputs, labels = corrupt(choose(tokens))
        with torch.no_grad():
            target = outputs_of(teacher, inputs)
        return imitation_loss(outputs_of(student, inputs), target, labels, options)

    return trained_and_packed(model, options, context, loss, weight_decay=0.0)  # it pulls off the teacher


def _data(
    teacher: nn.Module, options: QatKdOptions, context: Context
) -> Callable[[torch.Tensor], torch.Tensor]:
    """From a batch of the training text to the batch to train on, of the same shape."""
    generator = context.generator("qat-kd batches")
    if options.data == "random":
        vocab_size = context.info.vocab_size
        return lambda tokens: torch.randint(vocab_size, tokens.shape, generator=generator).to(tokens.device)
    if options.data == "train":
        return lambda tokens: tokens
    length = min(context.settings.seq_len, context.info.max_positions)
    pool = context.cache(
        {"generated": [options.samples, length, _GREEDY_TOKENS]},
        lambda: teacher_samples(
            teacher, options.samples, length, context.generator("teacher samples"), context.device
        ),
    )

    def draw(tokens: torch.Tensor) -> torch.Tensor:
        chosen = torch.randint(len(pool), (len(tokens),), generator=generator)
        return pool[chosen].to(tokens.device)

    return draw


def _check_layers(model: nn.Module, teacher: nn.Module, options: QatKdOptions) -> None:
    mine, theirs = (config.num_hidden_layers for config in (model.config, teacher.config))
    if options.beta and mine != theirs:
        raise ConfigError(
            f"beta: the model has {mine} layers, its teacher, the original model, {theirs}; hidden states "
            "cannot be compared layer by layer, so leave beta at 0"
        )


def applies(info: ModelInfo, options: QatKdOptions) -> str | None:
    if options.data == "generated" and info.kind == "encoder":
        return "an encoder generates no text; use data=train or data=random"
    return refused(info, options)


METHOD = Method(
    name="qat-kd",
    family="quantization",
    paper=Paper(
        title="LLM-QAT: Data-Free Quantization Aware Training for Large Language Models",
        authors="Liu, Oguz, Zhao, Chang, Stock, Mehdad, Shi, Krishnamoorthi, Chandra",
        year=2023,
        arxiv="2305.17888",
    ),
    options=QatKdOptions,
    transform=transform,
    needs=lambda options: () if options.steps == 0 else ("training", "teacher"),
    applies=applies,
    leaves_layers=lambda options: options.bits == 16,  # trained, and left in full precision
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
