"""The in-memory model as lm-eval sees it.

`HFLM` is made for models that it loads itself. Given one in memory it would tie weights again (undoing a
method that untied or replaced the head, so that another model is scored than was timed), give the
tokenizer a padding token that the model may have no embedding for, and add up log-probabilities in
bfloat16, and it scores every request by itself. `InMemoryLM` keeps its interface and its generation.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import nn
from tqdm.std import tqdm  # type: ignore[import-untyped]

from harness.cache import ContentCache
from harness.errors import NotApplicable
from harness.evaluate.encoding import Encoder
from harness.evaluate.plan import Query
from harness.evaluate.scorer import Scores, limits_for, score_queries
from harness.evaluate.windows import check_vocabulary, device_of, logits_of
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

    Log-likelihoods come from the harness's own engine (`harness.evaluate.scorer`); a NaN among them is
    given as it is, for lm-eval's tasks do not notice one (`harness.evaluate.engine` does).

    Args:
        model: the transformed model, in eval mode.
        tokenizer: its tokenizer; a copy is used.
        info: gives the longest input (`max_positions`), the vocabulary and the width.
        batch_size: texts generated at a time; full-length sequences' worth of tokens scored at a time.
        cache: where tokenised requests are kept, or None.

    Raises:
        NotApplicable: the tokenizer has no token to condition a text's first token on.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        info: ModelInfo,
        *,
        batch_size: int,
        cache: ContentCache | None = None,
    ) -> None:
        super().__init__(
            pretrained=_AsIs(model),
            tokenizer=_prepared(tokenizer),
            backend="causal",
            max_length=info.max_positions,
            batch_size=batch_size,
            softmax_dtype=torch.float32,
        )
        self.module, self.info = model, info
        self.limits = limits_for(info, device_of(model), batch_size)
        self.encoder = Encoder(self.tokenizer, self.max_length, self.prefix_token_id, cache)

    def encode(self, kind: str, requests: Sequence[Any]) -> list[list[Query]]:
        """The queries whose log-likelihoods add up to each request's answer.

        Args:
            kind: lm-eval's type of the requests, ``loglikelihood`` or ``loglikelihood_rolling``.

        Raises:
            ConfigError: nothing to score in a request, or tokens that the model does not know.
        """
        if kind == "loglikelihood_rolling":
            queries = self.encoder.texts([request.args[0] for request in requests])
        else:
            queries = [[query] for query in self.encoder.pairs([request.args for request in requests])]
        highest = max((max(query.tokens) for group in queries for query in group), default=0)
        check_vocabulary(highest, self.info.vocab_size)
        return queries

    def score(self, queries: Sequence[Query]) -> Scores:
        """Score queries of any number of tasks together."""
        return score_queries(self.module, queries, self.limits)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As `HFLM`, in float32 whatever the model's type."""
        scores = self.score([query for (query,) in self.encode("loglikelihood", requests)])
        return list(zip(scores.log_likelihoods.tolist(), scores.greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """As `HFLM`, all windows of all documents together."""
        groups = self.encode("loglikelihood_rolling", requests)
        found = iter(self.score([query for group in groups for query in group]).log_likelihoods.tolist())
        return [sum(next(found) for _ in group) for group in groups]

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """As `HFLM`, for whoever has tokens already: (text, context, continuation)."""
        longest = self.max_length + 1
        queries = [Query((*context, *rest)[-longest:], len(rest)) for _, context, rest in requests]
        scores = self.score(queries)
        return list(zip(scores.log_likelihoods.tolist(), scores.greedy.tolist(), strict=True))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """As `HFLM`; refuses a task that asks for more tokens than the model has positions."""
        # A task may say it by any of several names.
        asked = (normalize_gen_kwargs(request.args[1], self.max_gen_toks) for request in requests)
        wanted = max(arguments["max_gen_toks"] for arguments in asked)
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
