"""Query heads share key-value heads: the cache shrinks by heads / groups, and decoding reads less.

Paper: GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints. Joshua
Ainslie, James Lee-Thorp, Michiel de Jong, Yury Zemlyanskiy, Federico Lebrón, Sumit Sanghai, 2023,
arXiv:2305.13245. One group is multi-query attention: Fast Transformer Decoding: One Write-Head is
All You Need. Noam Shazeer, 2019, arXiv:1911.02150.

Changes: the key and value projections of a decoder, pooled to fewer heads; the model then trains on
(uptraining). OPT's and GPT-2's attention modules are replaced by ones that can have fewer such
heads. A decode step reads each shared head once instead of repeating it for its query heads first.

Needs: training tokens, unless `steps` is 0. Random weights (`shape:` models) are only pooled.

Knobs: `groups` (gqa), key-value heads afterwards, by default a quarter; `init`, how a shared head
starts (mean, first, random); `steps`, or `alpha`, the share of the sweep's training budget to use.

Hurts: right after pooling the model is broken; 5 % of the original training, as in the paper, is
far more than a short budget. Prefill does not get faster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from harness import Method, Options, Paper, hookimpl
from harness.nn.grouped_query import regroup_key_values

from ._pooling import pool_heads

if TYPE_CHECKING:
    from torch import nn

    from harness import Context, ModelInfo

__all__ = ["GQA", "MQA", "GqaOptions", "MqaOptions", "groups_of", "uptraining_steps"]


class MqaOptions(Options):
    init: Literal["mean", "first", "random"] = "mean"
    steps: int | None = Field(None, ge=0, description="uptraining steps; by default from alpha")
    alpha: float = Field(1.0, gt=0, le=1, description="uptraining, as a share of the budget")

    @model_validator(mode="after")
    def _one_length(self) -> MqaOptions:
        if self.steps is not None and self.alpha != 1.0:
            raise ValueError("give steps or alpha, not both")
        return self


class GqaOptions(MqaOptions):
    groups: int | None = Field(None, ge=1, description="key-value heads; by default a quarter")


def groups_of(options: MqaOptions, kv_heads: int) -> int:
    """The number of key-value heads afterwards."""
    if not isinstance(options, GqaOptions):
        return 1
    return options.groups or max(1, kv_heads // 4)


def uptraining_steps(options: MqaOptions, budget: int) -> int:
    """The number of steps, where the sweep allows `budget`."""
    return round(options.alpha * budget) if options.steps is None else options.steps


def transform(model: nn.Module, options: MqaOptions, context: Context) -> nn.Module:
    generator = context.generator("pooling")
    groups = groups_of(options, context.info.num_kv_heads)
    regroup_key_values(model, groups, lambda h, g: pool_heads(h, g, options.init, generator))
    context.record("key_value_heads", groups, "1")
    steps = uptraining_steps(options, context.settings.steps)
    if steps and not context.info.synthetic and not context.info.scratch:
        report = context.train(model, steps=steps)
        context.record("uptraining_loss", report.final_loss, "nats", "mean of the last tenth")
    return model


def applies(info: ModelInfo, options: MqaOptions) -> str | None:
    if info.kind == "encoder":
        return "an encoder keeps no key-value cache, so sharing its heads saves nothing"
    if info.family == "other":
        return f"architecture {info.model_type!r} is not known"
    groups = groups_of(options, info.num_kv_heads)
    if groups == info.num_kv_heads:
        return f"the model has {groups} key-value heads already"
    if groups > info.num_kv_heads:
        return f"groups={groups} is more than the model's {info.num_kv_heads} key-value heads"
    if info.num_kv_heads % groups:
        return f"groups={groups} does not divide the model's {info.num_kv_heads} key-value heads"
    return None


def _needs(options: MqaOptions) -> tuple[str, ...]:
    return ("decoder",) if options.steps == 0 else ("decoder", "training")


MQA = Method(
    name="mqa",
    family="attention",
    summary="All query heads share one key-value head, so the cache shrinks by their number.",
    paper=Paper(
        title="Fast Transformer Decoding: One Write-Head is All You Need",
        authors="Shazeer",
        year=2019,
        arxiv="1911.02150",
    ),
    options=MqaOptions,
    transform=transform,
    needs=_needs,
    applies=applies,
    leaves_layers=lambda _options: True,
    architectural=True,
)

GQA = Method(
    name="gqa",
    family="attention",
    summary="Groups of query heads share a key-value head, so the cache shrinks by their size.",
    paper=Paper(
        title="GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
        authors="Ainslie, Lee-Thorp, de Jong, Zemlyanskiy, Lebrón, Sanghai",
        year=2023,
        arxiv="2305.13245",
    ),
    options=GqaOptions,
    transform=transform,
    needs=_needs,
    applies=applies,
    leaves_layers=lambda _options: True,
    architectural=True,
)


@hookimpl
def register_methods() -> list[Method]:
    return [MQA, GQA]
