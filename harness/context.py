"""The context: everything a transform may ask for beside the model.

Methods never read files, the environment or global random state; what they need comes from here, so
that every method is calibrated on the same tokens, trained by the same loop and cached under a key
that names everything the value depends on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from harness.errors import ConfigError, NotApplicable, PluginError
from harness.nn.blocks import Block, iterate_blocks
from harness.nn.pruned import held_zeros
from harness.records import Record
from harness.training import TrainReport, TrainSettings, train

if TYPE_CHECKING:
    from harness.cache import ContentCache
    from harness.models.info import ModelInfo
    from harness.models.loading import LoadedModel
    from harness.tokens import TokenSource

__all__ = ["Context", "Progress"]

T = TypeVar("T")
Progress = Callable[[str, int, int], None]


def _in_turn(first: Callable[..., None] | None, then: Callable[..., None]) -> Callable[..., None]:
    """One callback after the other."""

    def both(*arguments: Any) -> None:
        if first is not None:
            first(*arguments)
        then(*arguments)

    return both


@dataclass
class Context:
    """What a transform gets; built by the worker for one step of a chain.

    Args:
        info: the facts about the model.
        tokenizer: its tokenizer, or None for `shape:` and `scratch:` models without one.
        device: where the model is and where work should run.
        dtype: the floating-point type of the model.
        seed: the sweep's seed; use `generator`, never this directly.
        calibration_source, training_source: token streams.
        settings: the sweep's training budget.
        load_teacher: makes a fresh copy of the original model, or None where there is none.
        load_named: loads another model by its written form, or None where none can be had.
        cache_store: the content-keyed disk cache.
        last_in_chain: False where another method of the chain follows, but for the baseline (a method that
            only prepares, such as smoothing, leaves the rest to it).
        identity: what every cached value depends on (model, chain so far, plugin source, versions).
        holds_zeros: a method before it in the chain pruned: what is zero then stays so in `train`.
        needs: what the method says that it needs; None asks nothing. The budgets of calibration and training
            are in the keys of its results only where it says so.
    """

    info: ModelInfo
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    seed: int
    calibration_source: TokenSource
    training_source: TokenSource
    settings: TrainSettings
    calibration_samples: int
    calibration_len: int
    load_teacher: Callable[[], nn.Module] | None
    cache_store: ContentCache
    identity: Mapping[str, Any]
    last_in_chain: bool = True
    holds_zeros: bool = False
    needs: frozenset[str] | None = None
    load_named: Callable[[str], LoadedModel] | None = None
    report_progress: Progress = lambda _what, _done, _total: None
    records: list[Record] = field(default_factory=list)
    calibration_tokens: int = 0
    trained_tokens: int = 0
    trained_steps: int = 0

    # --- data ---------------------------------------------------------------------------------

    def calibration(self, samples: int | None = None, seq_len: int | None = None) -> torch.Tensor:
        """Calibration tokens, int64 [samples, seq_len], on the CPU; the same on every call.

        By default the sweep's `--calibration-samples` and `--calibration-len`, shortened to the
        model's number of positions. Windows never overlap with what the bundled tasks score.

        Raises:
            PluginError: the method does not say that it needs calibration.
        """
        self._require("calibration")
        samples = samples or self.calibration_samples
        seq_len = min(seq_len or self.calibration_len, self.info.max_positions)
        tokens = self.calibration_source.windows(samples, seq_len, self.generator("calibration"))
        self.calibration_tokens = max(self.calibration_tokens, tokens.numel())
        return tokens

    def calibration_batches(
        self, batch_size: int = 8, samples: int | None = None, seq_len: int | None = None
    ) -> list[torch.Tensor]:
        """`calibration` cut into batches [<= batch_size, seq_len]."""
        return list(self.calibration(samples, seq_len).split(batch_size))

    # --- training -----------------------------------------------------------------------------

    def train(
        self,
        model: nn.Module,
        *,
        loss: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None = None,
        steps: int | None = None,
        lr: float | None = None,
        parameters: Iterable[nn.Parameter] | None = None,
        lr_multiples: Mapping[nn.Parameter, float] | None = None,
        weight_decay: float | None = None,
        warmup_share: float | None = None,
        final_share: float | None = None,
        first_step: int = 0,
        stream: str = "training",
        on_start: Callable[[torch.optim.Optimizer], None] | None = None,
        on_step: Callable[[int, nn.Module], None] | None = None,
        seq_len: int | None = None,
        batch_size: int | None = None,
    ) -> TrainReport:
        """The one training loop (AdamW, warm-up and cosine, clipping, mixed precision on CUDA).

        Where a method before this one in the chain pruned (`holds_zeros`), zeros of matrices that have a
        hundredth or more stay zero, whatever else is asked.

        Args:
            loss: ``loss(model, tokens) -> scalar`` for tokens int64 [batch, seq_len] on the device;
                by default the mean causal cross-entropy.
            steps: by default the sweep's `--train-steps`; 0 trains nothing. Models with random weights
                (`shape:`) are never trained.
            parameters: what to train; by default every parameter that requires a gradient.
            lr_multiples: for parameters whose rate is another multiple of `lr` than 1.
            weight_decay: by default the loop's; 0 where weights must not be pulled from where they are.
            warmup_share, final_share: of the schedule; by default the loop's. 0 and 1: a constant rate.
            first_step: replay the schedule only from this step on, with the rates and batches that a whole
                run has there, by a fresh optimiser.
            stream: runs that name the same stream see the same batches.
            on_start: called once before the first step, with the optimiser.
            on_step: called after each optimiser step (apply masks, update schedules).

        Raises:
            NumericalFailure: the loss became NaN or infinite, or more than doubled.
            PluginError: the method does not say that it needs training.
        """
        if self.info.synthetic:
            steps = 0  # random weights are timed and weighed as they are: training them says nothing
        if steps != 0:
            self._require("training")
        settings = self.settings.replaced(
            steps=steps,
            lr=lr,
            seq_len=seq_len,
            batch_size=batch_size,
            weight_decay=weight_decay,
            warmup_share=warmup_share,
            final_share=final_share,
        )
        with ExitStack() as stack:
            if self.holds_zeros:
                held = stack.enter_context(held_zeros(model))
                on_start, on_step = _in_turn(on_start, held.start), _in_turn(on_step, held.hold)
            report = train(
                model,
                self.training_source,
                settings.limited_to(self.info.max_positions),
                self.generator(stream),
                loss=loss,
                parameters=parameters,
                lr_multiples=lr_multiples,
                first_step=first_step,
                on_start=on_start,
                on_step=on_step,
                progress=lambda done, total: self.report_progress("train", done, total),
            )
        self.trained_tokens += report.tokens
        self.trained_steps += report.steps
        return report

    def training_steps(self, steps: int | None) -> int:
        """How many steps `train` takes of `steps`, for a method that does nothing without training.

        Raises:
            ConfigError: none.
        """
        chosen = self.settings.steps if steps is None else steps
        if chosen < 1:
            raise ConfigError("the method works by training and needs at least 1 step; the budget has 0")
        return chosen

    def teacher(self, name: str | None = None) -> nn.Module:
        """A fresh copy of the original model, in eval mode, frozen, on the device; or another model by name.
        On a CPU a model of float16 is given in float32, as one that is trained is there (see `train`).

        A method that lets the user name a model puts what identifies it into its `Method.inputs`.

        Raises:
            NotApplicable: the model is trained from scratch, so there is no teacher; or the named one has
                another vocabulary.
        """
        if name is not None:
            teacher = self._named_teacher(name)
        elif self.load_teacher is None:
            raise NotApplicable("a model trained from scratch has no teacher")
        else:
            teacher = self.load_teacher()
        teacher.eval().requires_grad_(False)
        parameter = next(teacher.parameters())
        is_narrow = parameter.dtype == torch.float16 and parameter.device.type == "cpu"
        return teacher.float() if is_narrow else teacher

    def _named_teacher(self, name: str) -> nn.Module:
        if self.load_named is None:
            raise NotApplicable(f"the teacher {name} cannot be had here: no other model can be loaded")
        loaded = self.load_named(name)
        sizes = loaded.info.vocab_size, self.info.vocab_size
        if sizes[0] != sizes[1]:
            raise NotApplicable(
                f"the teacher {name} predicts {sizes[0]} tokens, {self.info.label} {sizes[1]}: their "
                "vocabularies differ"
            )
        words, own = (
            tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else None
            for tokenizer in (loaded.tokenizer, self.tokenizer)
        )
        if words is not None and own is not None and words != own:
            raise NotApplicable(f"the teacher {name} numbers other tokens than {self.info.label} does")
        return loaded.model

    # --- calibration --------------------------------------------------------------------------

    def blocks(
        self,
        model: nn.Module,
        batches: Sequence[torch.Tensor] | None = None,
        *,
        from_originals: bool = False,
    ) -> Iterator[Block]:
        """The blocks in order with captured inputs; see `harness.nn.blocks`.

        Args:
            batches: token ids [batch, seq_len]; by default `calibration_batches()`.
            from_originals: every block sees the inputs that the blocks before gave before they were changed.
        """
        batches = self.calibration_batches() if batches is None else batches
        total = self.info.num_layers
        for block in iterate_blocks(model, batches, self.device, from_originals=from_originals):
            self.report_progress("blocks", block.index, total)
            yield block
        self.report_progress("blocks", total, total)

    def cache(self, key: Mapping[str, Any], compute: Callable[[], T]) -> T:
        """``compute()``, or its stored result where the same thing was computed before.

        The key given is joined with the context's identity, so it only has to name what the method
        adds (its own options). Values are tensors, numbers, strings, and lists, tuples and dicts
        of those.
        """
        return self.cache_store.get_or_compute({**self.identity, "key": dict(key)}, compute)

    def is_cached(self, key: Mapping[str, Any]) -> bool:
        """Whether `cache` has a value stored for this key: what leads to it need not be computed."""
        return self.cache_store.path({**self.identity, "key": dict(key)}).exists()

    # --- the rest -----------------------------------------------------------------------------

    def _require(self, need: str) -> None:
        """Refuse what the method does not say that it needs: another budget would find this one's results."""
        if self.needs is None or need in self.needs or (need == "training" and self.info.scratch):
            return
        raise PluginError(
            f"the method uses {need} and does not say so: add needs=[{need!r}] to its Method; only then is "
            f"the budget of {need} part of what its results are stored under"
        )

    def generator(self, name: str) -> torch.Generator:
        """A CPU generator, seeded by the sweep's seed and this name: same name, same numbers."""
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Report progress of a long step: ``with context.progress("layers", 24) as done: done(3)``."""
        self.report_progress(what, 0, total)
        yield lambda done: self.report_progress(what, done, total)
        self.report_progress(what, total, total)

    def record(self, name: str, value: float, unit: str, note: str | None = None) -> None:
        """Store a figure that the method itself found (a share of outliers, a final loss)."""
        if any(record.metric == name for record in self.records):
            raise ConfigError(f"the method recorded {name!r} twice")
        self.records.append(Record(metric=name, value=float(value), unit=unit, note=note))
