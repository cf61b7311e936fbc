"""The two calls that inference consists of: the prefill of a prompt and the step of one token.

`Generation` prepares both for one model and one shape, with every input in a tensor of fixed address,
so that the very same functions run eagerly, inside a CUDA graph, and in the tests that compare them
with a plain forward pass.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness.errors import ConfigError

if TYPE_CHECKING:
    from harness.measure.static_cache import FixedCache

__all__ = ["Generation", "decode_logits_match", "forward_only", "random_prompt"]


class Generation:
    """Greedy generation of one shape: ``reset()``, ``prefill()``, then ``step()`` `new_tokens` times.

    Args:
        model: a decoder of transformers' calling convention, in eval mode.
        prompt: token ids int64 [batch, prompt_len], on the model's device.
        new_tokens: how many steps there is room for.

    Attributes:
        token: int64 [batch, 1], what the next step reads; each call writes the arg-max there.
        capture_problem: why the calls cannot be captured into a CUDA graph; None where they might.
    """

    @torch.inference_mode()
    def __init__(self, model: nn.Module, prompt: torch.Tensor, new_tokens: int) -> None:
        if prompt.dim() != 2 or not prompt.numel():
            raise ConfigError(f"a prompt must be [batch, tokens], not {list(prompt.shape)}")
        self.model = model
        self.prompt = prompt
        self.new_tokens = new_tokens
        batch, self.prompt_len = prompt.shape
        self.max_len = self.prompt_len + max(new_tokens, 1)
        device = prompt.device
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self._prompt_positions = torch.arange(self.prompt_len, device=device)[None]
        self._mask = torch.ones(batch, self.max_len, dtype=torch.int64, device=device)
        self._prefill_options = {"logits_to_keep": 1} if _accepts(model, "logits_to_keep") else {}
        self._takes_positions = _accepts(model, "position_ids")
        self.capture_problem, self._fixed = _fixed_cache(model, self.max_len, device)
        self._steps_done = 0
        self._growing: Any = None
        self.reset()

    @property
    def cache(self) -> Any:
        """Where keys and values are: a `FixedCache`, or transformers' growing one."""
        return self._growing if self._fixed is None else self._fixed

    @torch.inference_mode()
    def reset(self) -> None:
        """Back to an empty cache; what prefill and step need from the host happens here, untimed."""
        from transformers import DynamicCache

        if self._fixed is not None:
            self._fixed.empty()
        else:
            self._growing = DynamicCache(config=getattr(self.model, "config", None))
        self.position.fill_(self.prompt_len)
        self._steps_done = 0

    @torch.inference_mode()
    def rewind(self) -> None:
        """Back to the end of the prefill, so that the steps can run again."""
        if self._fixed is not None:
            self._fixed.filled(self.prompt_len)
            self.position.fill_(self.prompt_len)
            self._steps_done = 0
        else:
            self.reset()
            self.prefill()

    @torch.inference_mode()
    def prefill(self) -> torch.Tensor:
        """Run the prompt, fill the cache, choose the first token. Returns logits [batch, 1, vocab]."""
        logits = self._forward(self.prompt, self._prompt_positions, self.prompt_len, self._prefill_options)
        if self._fixed is not None:
            self._fixed.filled(self.prompt_len)
        return self._choose(logits)

    def prefill_was_replayed(self) -> None:
        """Tell the host what a replayed prefill did on the device only: the cache is not empty."""
        if self._fixed is not None:
            self._fixed.ticker.empty = False

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        """Run one token and choose the next. Returns logits [batch, 1, vocab]."""
        growing = self._fixed is None
        seen = self.prompt_len + self._steps_done + 1 if growing else self.max_len
        logits = self._forward(self.token, self.position, seen, {})
        if self._fixed is not None:
            self._fixed.advance()
        self.position.add_(1)
        self._steps_done += 1
        return self._choose(logits)

    def _forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, seen: int, options: dict[str, int]
    ) -> torch.Tensor:
        placed = {"position_ids": positions} if self._takes_positions else {}
        output = self.model(
            input_ids=tokens,
            attention_mask=self._mask[:, :seen],
            past_key_values=self.cache,
            use_cache=True,
            **placed,
            **options,
        )
        logits = output.logits
        assert isinstance(logits, torch.Tensor)
        return logits

    def _choose(self, logits: torch.Tensor) -> torch.Tensor:
        last = logits[:, -1:]
        self.token.copy_(last.argmax(dim=-1))
        return last


@torch.inference_mode()
def forward_only(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """One plain forward pass; logits [batch, tokens, vocab], or hidden states of a bare encoder."""
    options = {"use_cache": False} if _accepts(model, "use_cache") else {}
    output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options)
    logits = getattr(output, "logits", None)
    result = output.last_hidden_state if logits is None else logits
    assert isinstance(result, torch.Tensor)
    return result


def random_prompt(
    vocab_size: int, batch_size: int, prompt_len: int, seed: int, device: torch.device
) -> torch.Tensor:
    """Token ids int64 [batch_size, prompt_len], the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (batch_size, prompt_len), generator=generator)
    return tokens.to(device)


@torch.inference_mode()
def decode_logits_match(
    model: nn.Module, prompt: torch.Tensor, new_tokens: int, *, tolerance: float = 1e-4
) -> float:
    """The largest difference between the logits of the steps and those of plain forward passes.

    Generates greedily with the timed functions (through CUDA graphs where they are captured), then
    runs the finished text once without a cache and compares at every new position. The difference
    is relative to the largest logit where that exceeds one: rounding grows with the numbers.

    Raises:
        ConfigError: the difference exceeds `tolerance`: the timed step does not compute the model.
    """
    from harness.measure.graphs import prepare_generation

    generation = Generation(model, prompt, new_tokens)
    prefill, step = prepare_generation(generation)
    generation.reset()
    logits = [prefill.run().clone()]
    tokens = [prompt, generation.token.clone()]
    for _ in range(new_tokens):
        logits.append(step.run().clone())
        tokens.append(generation.token.clone())
    text = torch.cat(tokens[:-1], dim=1)
    plain = forward_only(model, text)[:, prompt.shape[1] - 1 :]
    largest = max(1.0, float(plain.abs().max()))
    difference = float((torch.cat(logits, dim=1) - plain).abs().max()) / largest
    if not difference <= tolerance:
        raise ConfigError(
            f"the logits of the timed decode step differ from a plain forward pass by "
            f"{difference:.2e}, more than {tolerance:.0e}"
        )
    return difference


def _fixed_cache(
    model: nn.Module, max_len: int, device: torch.device
) -> tuple[str | None, FixedCache | None]:
    # Imported here: listing the meters must not cost the import of transformers.
    from harness.measure.static_cache import FixedCache, cache_problem

    problem = cache_problem(model)
    if problem is not None:
        return problem, None
    return None, FixedCache(model.config, max_len, device)


def _accepts(model: nn.Module, name: str) -> bool:
    """True where the model's `forward` takes the argument, or hands everything on to another."""
    inner = getattr(model, "_orig_mod", model)  # torch.compile wraps the model
    parameters = inspect.signature(inner.forward).parameters
    return name in parameters or "input_ids" not in parameters
