"""Columns in a better order: N:M pruning keeps more of the weights' magnitude, at no cost when it runs.

Paper: Channel Permutations for N:M Sparsity. Jeff Pool, Chong Yu, 2021, NeurIPS 2021.

Changes: channels move inside the FFN (columns of down with rows of gate and up) and inside the value heads
(columns of the output with rows of V), so that the model computes what it did; outputs before and after are
compared. The search is greedy over pairs of stripes (groups of `m` columns) and leaves minima by exchanging
two random channels. Then N:M pruning by magnitude, unless another method follows in the chain, which gets the
reordered model: `channel-permute+nm-prune:score=wanda`.

Needs: nothing but time: the search is by far the longest part (two minutes on a CPU for 6 M parameters with
10 regressions). 256 columns are searched together, blocks of neighbours first and then blocks of stripes from
all over.

Knobs: `n`, `m`; `strategy` (stripe-groups: every partition of `group_cols` columns, two or three stripes;
channel-swap: every exchange of two columns; random: that many orders as `bounded_regressions`);
`bounded_regressions`, how often a minimum is left; `sites` (ffn, vo; residual: one order for the whole
stream; qk, which cannot gain, because groups run along the inputs and it moves outputs: it records 0);
`max_rows`, evenly taken, that a search looks at; `time_limit_s` for the whole search, which makes the result
depend on the machine; `prune` (by default as the last of a chain); `backend`, `algorithm`, `targets`,
`ragged` as of nm-prune.

Hurts: 2 % more magnitude are a small gain, and magnitude is not accuracy: a model that is retrained gets it
back anyway. Widths of thousands of columns take long.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, field_validator, model_validator

from harness import ConfigError, Method, NotApplicable, Paper, hookimpl
from harness.nn.anatomy import anatomy_of, blocks_of
from harness.nn.channel_order import (
    order_ffn,
    order_residual,
    order_value_output,
    residual_readers,
    value_heads,
)
from harness.nn.folding import linears_of
from harness.nn.n_of_m import keep_n_of_m

from ._patterns import (
    PatternOptions,
    check_finite,
    choose_layers,
    needs_cuda,
    record_left_dense,
    refusal,
    store_zeros,
)
from ._permutation import Search, bound, groups_for, kept_magnitude, search_order

if TYPE_CHECKING:
    from torch import nn

    from harness import Context, ModelInfo

__all__ = ["METHOD", "PermuteOptions"]

_PROBE_TOKENS = 16
_SAME = {torch.float32: 1e-4, torch.float64: 1e-8}  # relative; 16-bit types: 5e-2

Site = Literal["ffn", "vo", "residual", "qk"]


class PermuteOptions(PatternOptions):
    strategy: Literal["stripe-groups", "channel-swap", "random"] = Field(
        "stripe-groups", description="what a step of the search tries"
    )
    group_cols: int | None = Field(None, ge=2, description="columns rearranged together; by default 2 m")
    bounded_regressions: int = Field(100, ge=0, description="how often a minimum is left")
    sites: tuple[Site, ...] = Field(("ffn", "vo"), description="where channels move")
    max_rows: int = Field(1024, ge=1, description="rows that a search looks at")
    time_limit_s: float | None = Field(None, gt=0, description="of the whole search")
    prune: bool | None = Field(None, description="prune afterwards; by default as the last of a chain")

    @field_validator("sites")
    @classmethod
    def _each_once(cls, value: tuple[Site, ...]) -> tuple[Site, ...]:
        if not value or len(set(value)) < len(value):
            raise ValueError("name at least one, and each once")
        return value

    @model_validator(mode="after")
    def _can_be_searched(self) -> PermuteOptions:
        if self.group_cols is not None and self.strategy != "stripe-groups":
            raise ValueError(f"group_cols: belongs to strategy=stripe-groups, not {self.strategy}")
        try:
            groups_for(self.strategy, self.m, self.group_cols or 2 * self.m)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self


@dataclass
class _Tally:
    """What pruning keeps over all searches of a site: in the given order, in the found one, at most."""

    before: float = 0.0
    after: float = 0.0
    bound: float = 0.0

    @property
    def efficacy(self) -> float:
        """The paper's: the gain as a share of what pruning any weights of a row would gain."""
        possible = self.bound - self.before
        return (self.after - self.before) / possible if possible > 0 else 0.0


class _Searcher:
    """One search after the other, in the same budget of time."""

    def __init__(self, options: PermuteOptions, context: Context) -> None:
        limit = options.time_limit_s
        self._search = Search(
            options.n,
            options.m,
            options.strategy,
            groups_for(options.strategy, options.m, options.group_cols or 2 * options.m),
            options.bounded_regressions,
            None if limit is None else time.monotonic() + limit,
        )
        self._generator = context.generator("channel order")
        self._max_rows = options.max_rows

    def order(self, magnitudes: torch.Tensor, tally: _Tally) -> torch.Tensor:
        """int64 [problems, columns] for magnitudes [problems, rows, columns]; what it gains goes to `tally`.

        Where rows are left out of the search, an order that loses over all of them is not taken.
        """
        n, m = self._search.n, self._search.m
        rows = magnitudes.shape[1]
        chosen = torch.arange(rows, device=magnitudes.device)
        if rows > self._max_rows:
            chosen = (torch.arange(self._max_rows, device=magnitudes.device) * rows) // self._max_rows
        order = search_order(magnitudes[:, chosen], self._search, self._generator)
        given = torch.arange(order.shape[1], device=order.device)
        before = kept_magnitude(magnitudes, n, m)
        after = kept_magnitude(magnitudes.gather(2, order[:, None].expand_as(magnitudes)), n, m)
        order = torch.where((after > before)[:, None], order, given)
        tally.before += float(before.sum())
        tally.after += float(torch.maximum(before, after).sum())
        tally.bound += float(bound(magnitudes, n, m).sum())
        return order


@torch.no_grad()
def transform(model: nn.Module, options: PermuteOptions, context: Context) -> nn.Module:
    names, left = choose_layers(model, options, context)
    prunes = context.last_in_chain if options.prune is None else options.prune
    _check_sites(model, options)
    for name in names:
        check_finite(name, model.get_parameter(f"{name}.weight"))
    tokens = torch.randint(
        context.info.vocab_size, (1, _PROBE_TOKENS), generator=context.generator("probe")
    ).to(context.device)
    expected = _output(model, tokens)
    tallies = _reorder(model, options, set(names), context)
    _require_same(expected, _output(model, tokens))
    for site, tally in tallies.items():
        note = "share of the magnitude that pruning any weights of a row would keep beyond the given order"
        context.record(f"{site}_efficacy", tally.efficacy, "1", note)
        gain = tally.after / tally.before - 1 if tally.before else 0.0
        context.record(f"{site}_magnitude_gain", gain, "1", "more kept magnitude than in the given order")
    if prunes:
        for name in names:
            weight = model.get_parameter(f"{name}.weight")
            weight.mul_(keep_n_of_m(weight.float().abs(), options.n, options.m))
        store_zeros(model, names, options, context)
        record_left_dense(context, left)
    return model


def _reorder(
    model: nn.Module, options: PermuteOptions, names: set[str], context: Context
) -> dict[str, _Tally]:
    """Search and move all sites; only where the layer that gains is one of `names`."""
    anatomy, blocks, searcher = anatomy_of(model), blocks_of(model), _Searcher(options, context)
    tallies = {site: _Tally() for site in options.sites}
    if "residual" in options.sites:
        readers = [linear.weight for name, linear in residual_readers(model) if name in names]
        if readers:
            magnitudes = torch.cat(_thinned(readers, options.max_rows)).float().abs()
            order_residual(model, searcher.order(magnitudes[None], tallies["residual"])[0])
    with context.progress("channels", len(blocks)) as done:
        for index, (where, block) in enumerate(blocks):
            if "ffn" in options.sites and f"{where}.{anatomy.ffn_out}" in names:
                (down,) = linears_of(block, (anatomy.ffn_out,), where)
                order = searcher.order(down.weight.float().abs()[None], tallies["ffn"])
                order_ffn(block, anatomy, order[0], where)
            if "vo" in options.sites and f"{where}.{anatomy.out}" in names:
                kv_heads, sharing, head_dim = value_heads(block, anatomy, where)
                (out,) = linears_of(block, (anatomy.out,), where)
                grouped = out.weight.float().abs().view(-1, kv_heads, sharing, head_dim)
                magnitudes = grouped.permute(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
                order = searcher.order(magnitudes, tallies["vo"])
                order_value_output(block, anatomy, order, where)
            done(index + 1)
    return tallies


def _thinned(weights: list[torch.Tensor], most: int) -> list[torch.Tensor]:
    """Rows from all weights [out, in], evenly: some four times `most`, of which a search takes its own."""
    step = max(1, sum(len(weight) for weight in weights) // (4 * most))
    return [weight[::step] for weight in weights]


def _check_sites(model: nn.Module, options: PermuteOptions) -> None:
    """Refuse before anything moves.

    Raises:
        NotApplicable: a site that this model does not have.
    """
    anatomy = anatomy_of(model)
    for where, block in blocks_of(model):
        needed = (*anatomy.ffn_in, anatomy.ffn_out, anatomy.qkv[-1], anatomy.out)
        linears_of(block, needed, where)
        if "vo" in options.sites:
            *_, head_dim = value_heads(block, anatomy, where)
            if head_dim % options.m:
                raise NotApplicable(
                    f"vo: m={options.m} does not divide the {head_dim} channels of a head; "
                    "leave vo out of sites"
                )


def _output(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    output = model(input_ids=tokens)
    logits = getattr(output, "logits", None)
    found: torch.Tensor = output.last_hidden_state if logits is None else logits
    return found


def _require_same(before: torch.Tensor, after: torch.Tensor) -> None:
    change = float((after.double() - before.double()).norm() / before.double().norm().clamp(min=1e-30))
    if not change <= _SAME.get(before.dtype, 5e-2):
        raise NotApplicable(
            f"moving channels changes what the model computes (by {change:.1e}): something beside the "
            "known layers reads them"
        )


def applies(info: ModelInfo, options: PermuteOptions) -> str | None:
    if "residual" in options.sites and info.family == "bert":
        return "residual: the outputs of an encoder are channels of its residual stream"
    if "qk" in options.sites and info.family == "llama":
        return "qk: rotary positions fix the order of query and key channels"
    return refusal(info, options)


METHOD = Method(
    name="channel-permute",
    family="sparsity",
    paper=Paper(
        title="Channel Permutations for N:M Sparsity",
        authors="Pool, Yu",
        year=2021,
        venue="NeurIPS 2021",
    ),
    options=PermuteOptions,
    transform=transform,
    needs=needs_cuda,
    applies=applies,
    leaves_layers=lambda _options: True,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
