"""The in-memory model as lm-eval sees it.

`HFLM` is made for models that it loads itself. Given one in memory it would tie weights again (undoing a
method that untied or replaced the head, so that another model is scored than was timed), give the
tokenizer a padding token that the model may have no embedding for, and add up log-probabilities in
bfloat16. `InMemoryLM` keeps everything else of it.
"""

from __future__ import annotations

import copy
import logging
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from torch import nn
from tqdm.std import tqdm  # type: ignore[import-untyped]

from harness.errors import NotApplicable, NumericalFailure
from harness.evaluate.windows import affordable_batch, check_vocabulary, device_of, logits_of
from harness.models.info import ModelInfo

__all__ = ["InMemoryLM", "evaluating", "quiet", "seeded"]


class _AsIs:
    """The variant with just what `HFLM` needs of it.

    Deliberately no `nn.Module`: `HFLM` calls `tie_weights()` on one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.module = model
        self.config = getattr(model, "config", None) or SimpleNamespace(model_type="unknown")
        self.device = device_of(model)

    def __call__(self, tokens: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=logits_of(self.module, tokens))

    def generate(self, **arguments: Any) -> torch.Tensor:
        generate = getattr(self.module, "generate", None)
        if generate is None:
            raise NotApplicable(f"the task generates text and {type(self.module).__name__} has no generate()")
        with torch.no_grad():
            tokens: torch.Tensor = generate(**arguments)
        return tokens


class InMemoryLM(HFLM):  # type: ignore[misc]
    """lm-eval's Hugging Face model around one that exists already, on its device, as it is.

    Args:
        model: the transformed model, in eval mode.
        tokenizer: its tokenizer; a copy is used.
        info: gives the longest input (`max_positions`) and the vocabulary.
        batch_size: at most; fewer where the logits of a batch would not fit (`affordable_batch`).

    Raises:
        NotApplicable: the tokenizer has no token to condition a text's first token on.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, info: ModelInfo, *, batch_size: int) -> None:
        super().__init__(
            pretrained=_AsIs(model),
            tokenizer=_prepared(tokenizer),
            backend="causal",
            max_length=info.max_positions,
            batch_size=batch_size,
            softmax_dtype=torch.float32,
        )
        self.batch_size_per_gpu: int = batch_size
        self.model_vocab_size = info.vocab_size

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """As `HFLM`, longest documents first, so that a batch holds little padding."""
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].args[0]))
        scores = super().loglikelihood_rolling([requests[i] for i in order], disable_tqdm=True)
        in_order = [0.0] * len(requests)
        for index, score in zip(order, scores, strict=True):
            in_order[index] = score
        return in_order

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """As `HFLM`, in batches that fit; a NaN ends it.

        lm-eval takes the largest log-likelihood by `argmax`, which answers 0 for NaN: a broken model
        would score 100 % wherever the right choice comes first.
        """
        highest = max(max(max(context), max(rest)) for _, context, rest in requests)
        check_vocabulary(highest, self.model_vocab_size)
        longest = min(self.max_length, max(len(c) + len(rest) for _, c, rest in requests))
        asked = self.batch_size_per_gpu
        self.batch_size_per_gpu = affordable_batch(asked, longest, self.model_vocab_size)
        try:
            answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm=True)
        finally:
            self.batch_size_per_gpu = asked
        if broken := sum(math.isnan(score) for score, _ in answers):
            raise NumericalFailure(f"{broken} of {len(answers)} log-likelihoods are NaN")
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """As `HFLM`; refuses a task that asks for more tokens than the model has positions."""
        wanted = max(int(request.args[1].get("max_gen_toks", self.max_gen_toks)) for request in requests)
        if wanted >= self.max_length:
            raise NotApplicable(
                f"the task generates up to {wanted} tokens; the model has {self.max_length} positions"
            )
        answers: list[str] = super().generate_until(requests, disable_tqdm=True)
        return answers


def _prepared(tokenizer: Any) -> Any:
    """A copy that has what HFLM needs without gaining a new token."""
    if tokenizer is None:
        raise NotApplicable("the model has no tokenizer, so no text can be scored")
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise NotApplicable("the tokenizer has neither a beginning- nor an end-of-text token to condition on")
    mine = copy.deepcopy(tokenizer)
    mine.model_max_length = int(1e30)  # documents are cut into windows: no need to warn of long ones
    if mine.eos_token_id is None:
        # HFLM stops texts at it and pads with it, or else adds a token that the model does not know.
        mine.eos_token = mine.bos_token
    return mine


# --- surroundings ------------------------------------------------------------------------------------


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Python's, numpy's and torch's global generators seeded, and restored afterwards.

    lm-eval's tasks draw few-shot examples and samples from them.
    """
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no chatter of lm-eval, so that a worker's log holds what went wrong."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level, make_bar = logger.level, tqdm.__init__
    bars = datasets.are_progress_bars_disabled()

    def make_silent_bar(self: Any, *args: Any, **kwargs: Any) -> None:
        make_bar(self, *args, **{**kwargs, "disable": True})

    logger.setLevel(logging.ERROR)
    # lm-eval opens bars in places that take no option, and TQDM_DISABLE is read at import.
    tqdm.__init__ = make_silent_bar
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        tqdm.__init__ = make_bar
        if not bars:
            datasets.enable_progress_bars()
