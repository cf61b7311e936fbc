"""Training through N:M masks that follow the weights ends near dense training, and sparse.

Paper: Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch. Aojun Zhou, Yukun Ma, Junnan
Zhu, Jianbo Liu, Zhijie Zhang, Kun Yuan, Wenxiu Sun, Hongsheng Li, 2021, ICLR 2021, arXiv:2102.04010.

Changes: all weights are trained, dense, while the linear layers inside the blocks compute with the `n`
largest of every `m` along their inputs. Gradients pass straight through the mask to all weights (STE), and
those that are masked out decay as well, so that masks settle: ``W <- W - lr (grad + lambda_w (1 - mask) W)``.
Afterwards the masked weights are stored as nm-prune stores them. `mask_flips` tells how often masks changed.

Needs: training text, unless `steps` is 0 (then it is nm-prune by magnitude). Random weights (`shape:` models)
are only pruned.

Knobs: `n`, `m`; `lambda_w`: a number (the paper's is 2e-4; 0 is plain STE) or auto, an addition of this
harness: as large as lets a weight that stays masked shrink to exp(-3) over the whole run, whatever its length
and rate; `decay` (decoupled from the gradient, as AdamW's own; coupled: inside the gradient, the paper's form
for SGD); `mask_every`, steps between two choices of the masks; `steps` and `lr`; `init` (checkpoint: from the
weights as they are; scratch: from random ones); `backend`, `algorithm`, `targets`, `ragged` as of nm-prune.

Hurts: the paper's 2e-4 belongs to 100,000s of steps at rates near 0.1; at 1000 steps of 1e-3 it does nothing.
Coupled decay is rescaled by AdamW like any gradient and loses its meaning. From scratch it needs the training
budget of the model itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from harness import ConfigError, Method, NotApplicable, Paper, hookimpl
from harness.nn.n_of_m import keep_n_of_m
from harness.nn.surgery import conv1d_to_linear, replace_module
from harness.training import causal_loss, lr_factor

from ._patterns import (
    PatternOptions,
    check_finite,
    choose_layers,
    needs_cuda,
    record_left_dense,
    refusal,
    store_zeros,
)
from ._training import require_text, task_of

if TYPE_CHECKING:
    from harness import Context, ModelInfo
    from harness.training import TrainSettings

__all__ = ["METHOD", "SparseRefinedLinear", "SrSteOptions", "decay_masked", "lambda_for", "sparse_refined"]

_SHRINKS_BY = 3.0  # exp(-3) of its value is left of a weight that is masked throughout; lambda_w=auto


class SrSteOptions(PatternOptions):
    lambda_w: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto", description="decay of masked weights; 0: plain STE; the paper's: 2e-4"
    )
    decay: Literal["decoupled", "coupled"] = Field("decoupled", description="beside or inside the gradient")
    mask_every: int = Field(1, ge=1, description="steps between two choices of the masks")
    steps: int | None = Field(None, ge=0, description="training steps; by default the sweep's")
    lr: float | None = Field(None, gt=0, description="peak learning rate; by default the loop's")
    init: Literal["checkpoint", "scratch"] = Field("checkpoint", description="where training begins")


class _SparseRefined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, keep: torch.Tensor, decay: float) -> torch.Tensor:
        ctx.decay = decay
        ctx.save_for_backward(*((weight, keep) if decay else ()))
        return weight * keep

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if not ctx.decay:
            return gradient, None, None
        weight, keep = ctx.saved_tensors
        return gradient + ctx.decay * (weight * ~keep), None, None


def sparse_refined(weight: torch.Tensor, keep: torch.Tensor, decay: float = 0.0) -> torch.Tensor:
    """``weight * keep``, whose gradient goes to all weights, with `decay` times those that are not kept.

    Equation 9 of the paper (with its sign: masked weights shrink); decay 0 is the straight-through estimator.
    """
    masked: torch.Tensor = _SparseRefined.apply(weight, keep, decay)
    return masked


@torch.no_grad()
def decay_masked(weight: torch.Tensor, keep: torch.Tensor, factor: float) -> None:
    """Shrink the weights that are not kept by ``1 - factor``, in place.

    Before a step of the optimiser it is the paper's update: the gradient does not depend on masked weights.
    """
    weight.sub_(weight * ~keep, alpha=factor)


def lambda_for(settings: TrainSettings) -> float:
    """The decay with ``lambda * (sum of the learning rates of all steps) = 3``.

    In a run of a few steps less, so that no step takes more than the whole of a weight.
    """
    rates = (settings.lr * lr_factor(step, settings) for step in range(settings.steps))
    return min(_SHRINKS_BY / sum(rates), 1 / settings.lr)


class SparseRefinedLinear(nn.Module):
    """A linear layer under training that computes with the `n` largest of every `m` of its weights.

    Shares the parameters of `linear`. `keep` is bool [out, in]; `choose` sets it.
    """

    simulated = True  # of training only: the pruned layer takes its place
    keep: torch.Tensor

    def __init__(self, linear: nn.Linear, *, n: int, m: int, decay: float = 0.0) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.n, self.m, self.decay = n, m, decay
        keep = keep_n_of_m(self.weight.detach().abs(), n, m)
        self.register_buffer("keep", keep, persistent=False)

    @torch.no_grad()
    def choose(self) -> torch.Tensor:
        """Keep what is the largest now; how many places changed, int64 []."""
        keep = keep_n_of_m(self.weight.abs(), self.n, self.m)
        changed = (keep != self.keep).sum()
        self.keep = keep
        return changed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., out] for x [..., in]."""
        return functional.linear(x, sparse_refined(self.weight, self.keep, self.decay), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.n}:{self.m}, bias={self.bias is not None}"


@dataclass
class _Refinement:
    """What happens around the steps: decay before, new masks after."""

    layers: list[SparseRefinedLinear]
    settings: TrainSettings
    decay: float  # decoupled
    mask_every: int
    step: int = 0
    flips: list[torch.Tensor] = field(default_factory=list)

    def before(self) -> None:
        factor = self.decay * self.settings.lr * lr_factor(self.step, self.settings)
        if factor:
            for layer in self.layers:
                decay_masked(layer.weight, layer.keep, factor)
        self.step += 1

    def after(self, step: int, _model: nn.Module) -> None:
        if (step + 1) % self.mask_every == 0:
            self.flips.append(torch.stack([layer.choose() for layer in self.layers]).sum())


def transform(model: nn.Module, options: SrSteOptions, context: Context) -> nn.Module:
    names, left = choose_layers(model, options, context)
    settings = context.settings.replaced(steps=options.steps, lr=options.lr)
    trains = settings.steps > 0 and not context.info.synthetic
    decay = _decay(options, settings) if trains else 0.0
    task = (task_of(model, context) or causal_loss) if trains else causal_loss
    if trains:
        require_text(context)
    if options.init == "scratch":
        _redraw(model, context)
    for name in names:
        check_finite(name, model.get_parameter(f"{name}.weight"))
    if trains:
        _train(model, names, options, context, settings, decay, task)
    with torch.no_grad():
        for name in names:
            weight = model.get_parameter(f"{name}.weight")
            weight.mul_(keep_n_of_m(weight.abs(), options.n, options.m))
    store_zeros(model, names, options, context)
    record_left_dense(context, left)
    return model.eval()


def _decay(options: SrSteOptions, settings: TrainSettings) -> float:
    decay = lambda_for(settings) if options.lambda_w == "auto" else options.lambda_w
    if options.decay == "decoupled" and decay * settings.lr > 1:
        raise ConfigError(
            f"lambda_w {decay:g} times the learning rate {settings.lr:g} is above 1: masked weights would "
            "change their sign"
        )
    return decay


def _train(
    model: nn.Module,
    names: list[str],
    options: SrSteOptions,
    context: Context,
    settings: TrainSettings,
    decay: float,
    task: Callable[[nn.Module, torch.Tensor], torch.Tensor],
) -> None:
    linears: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    coupled = options.decay == "coupled"
    layers = {
        name: SparseRefinedLinear(linear, n=options.n, m=options.m, decay=decay if coupled else 0.0)
        for name, linear in linears.items()
    }
    refinement = _Refinement(list(layers.values()), settings, 0.0 if coupled else decay, options.mask_every)

    def loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        refinement.before()
        return task(model, tokens)

    for name, layer in layers.items():
        replace_module(model, name, layer)
    report = context.train(model, loss=loss, steps=settings.steps, lr=settings.lr, on_step=refinement.after)
    for name, linear in linears.items():
        replace_module(model, name, linear)
    note = "auto: an addition of this harness" if options.lambda_w == "auto" else None
    context.record("lambda_w", decay, "1", note)
    context.record("training_loss", report.final_loss, "nats", "mean of the last tenth")
    places = sum(layer.keep.numel() for layer in layers.values())
    flips = [int(each) for each in refinement.flips]
    for half, part in (("first", flips[: len(flips) // 2]), ("last", flips[len(flips) // 2 :])):
        if part:
            share = sum(part) / len(part) / places
            context.record(f"mask_flips_{half}_half", share, "1", "of all masks, each time they are chosen")


@torch.no_grad()
def _redraw(model: nn.Module, context: Context) -> None:
    """Random weights, as a new model of this configuration has them.

    Raises:
        NotApplicable: the model has no longer the parameters that its configuration says.
    """
    seed = context.generator("scratch").initial_seed()
    devices = [context.device] if context.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        make: Any = type(model)
        fresh: nn.Module = make(model.config)
    conv1d_to_linear(fresh)
    drawn = dict(fresh.named_parameters())
    own = dict(model.named_parameters())
    if {name: each.shape for name, each in own.items()} != {n: each.shape for n, each in drawn.items()}:
        raise NotApplicable("init=scratch: an earlier method changed the architecture of the model")
    for name, parameter in own.items():
        parameter.copy_(drawn[name])


def applies(info: ModelInfo, options: SrSteOptions) -> str | None:
    if info.scratch:
        return (
            "a scratch model is trained densely after the transform; "
            "sr-ste:init=scratch trains a model with weights from random ones"
        )
    return refusal(info, options)


METHOD = Method(
    name="sr-ste",
    family="sparsity",
    paper=Paper(
        title="Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch",
        authors="Zhou, Ma, Zhu, Liu, Zhang, Yuan, Sun, Li",
        year=2021,
        arxiv="2102.04010",
        venue="ICLR 2021",
    ),
    options=SrSteOptions,
    transform=transform,
    needs=lambda options: (*(() if options.steps == 0 else ("training",)), *needs_cuda(options)),
    applies=applies,
    leaves_zeros=True,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
