"""Token perplexity by the convention of the GPTQ code, and what a second model says of the same tokens.

The documents are joined by blank lines and tokenised once, with the tokenizer's own special tokens (so at
most one at the start), and cut into windows of `seq_len` tokens that do not overlap. Each window scores
its `seq_len - 1` last tokens given those before; nothing is carried over. The incomplete last window is
dropped; only a text shorter than one window is scored as the one short window that it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness.errors import ConfigError, NumericalFailure
from harness.kernels.onednn import onednn_products

if TYPE_CHECKING:
    from harness.evaluate.reference import ReferenceLogits

__all__ = [
    "DOCUMENT_SEPARATOR",
    "MAX_SEQ_LEN",
    "TokenWindows",
    "WindowScores",
    "affordable_batch",
    "check_vocabulary",
    "cut_windows",
    "device_of",
    "logits_of",
    "score_windows",
    "window_length",
]

DOCUMENT_SEPARATOR = "\n\n"
MAX_SEQ_LEN = 2048
LOGIT_BYTES = 1 << 30  # float32 logits held at a time
BATCH_TOKENS = 8192  # enough to fill a GPU; more only takes memory
CHUNK_BYTES = 1 << 26  # float32 log-probabilities held at a time


@dataclass(frozen=True)
class TokenWindows:
    """Tokens, int64 [windows, seq_len] on the CPU, and how many at the end are left over."""

    tokens: torch.Tensor
    dropped_tokens: int

    @property
    def seq_len(self) -> int:
        return self.tokens.shape[1]

    @property
    def scored_tokens(self) -> int:
        return self.tokens.shape[0] * (self.seq_len - 1)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the tokens and their arrangement."""
        digest = hashlib.sha256(repr(tuple(self.tokens.shape)).encode())
        digest.update(self.tokens.contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def note(self) -> str:
        count = self.tokens.shape[0]
        return f"seq_len={self.seq_len}, windows={count}, dropped_tokens={self.dropped_tokens}"


@dataclass(frozen=True)
class WindowScores:
    """What one pass over the windows gives, float64 on the CPU.

    `nll` is [windows], nats per token. With a reference, `kl` (nats per token) and `agreement` (0 to 1)
    are [windows] too, means over the window's `positions` [windows] that the reference holds.
    """

    nll: torch.Tensor
    kl: torch.Tensor | None = None
    agreement: torch.Tensor | None = None
    positions: torch.Tensor | None = None


def window_length(max_positions: int) -> int:
    """`seq_len` for a model with this many positions."""
    return min(MAX_SEQ_LEN, max_positions)


def cut_windows(documents: Sequence[str], tokenizer: Any, seq_len: int) -> TokenWindows:
    """Join, tokenise and cut (see the module).

    Raises:
        ConfigError: fewer than two tokens, so that nothing can be scored.
    """
    text = DOCUMENT_SEPARATOR.join(documents)
    # Not verbose: the tokenizer would warn that the text is longer than the model's window.
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    if len(ids) < 2:
        raise ConfigError("the task's documents hold fewer than two tokens")
    count = len(ids) // seq_len
    if count == 0:
        return TokenWindows(ids.unsqueeze(0), 0)
    used = count * seq_len
    return TokenWindows(ids[:used].view(count, seq_len), len(ids) - used)


def affordable_batch(asked: int, tokens: int, vocab_size: int) -> int:
    """The batch size asked for, made smaller for long inputs and large vocabularies.

    It depends on nothing of the machine, so the numbers do not either.
    """
    return max(1, min(asked, BATCH_TOKENS // tokens, LOGIT_BYTES // (4 * tokens * vocab_size)))


def check_vocabulary(highest_id: int, vocab_size: int) -> None:
    """Raise `ConfigError` for a token that the model has no embedding for (a crash on CUDA)."""
    if highest_id >= vocab_size:
        raise ConfigError(
            f"token {highest_id} is outside the model's vocabulary of {vocab_size}: "
            "the tokenizer belongs to another model"
        )


def device_of(model: nn.Module) -> torch.device:
    """Where the model is; a quantized one may have buffers only."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    raise ConfigError("the model has neither parameters nor buffers")


def logits_of(model: nn.Module, tokens: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """Logits [batch, seq_len, vocab] for tokens [batch, seq_len], by a plain call of the model.

    As little is said as possible: what the variant does by itself (its cache included) is what is
    timed, so it is what is scored. `arguments` are passed on; whoever gives any has tried them.
    """
    with onednn_products(tokens.device):
        output = model(tokens, **arguments)
    logits: torch.Tensor = output if isinstance(output, torch.Tensor) else output.logits
    return logits


@torch.no_grad()
def each_window(
    model: nn.Module, windows: TokenWindows, vocab_size: int, batch_size: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield (window, logits [seq_len - 1, vocab], targets [seq_len - 1]), on the model's device."""
    check_vocabulary(int(windows.tokens.max()), vocab_size)
    device = device_of(model)
    step = affordable_batch(batch_size, windows.seq_len, vocab_size)
    for first in range(0, len(windows.tokens), step):
        batch = windows.tokens[first : first + step].to(device)
        logits = logits_of(model, batch)
        for row in range(len(batch)):
            yield first + row, logits[row, :-1], batch[row, 1:]


@torch.no_grad()
def score_windows(
    model: nn.Module,
    windows: TokenWindows,
    *,
    vocab_size: int,
    batch_size: int,
    reference: ReferenceLogits | None = None,
) -> WindowScores:
    """Score every window once, against a reference if one is given.

    Raises:
        ConfigError: a token outside the vocabulary, or a reference for other windows.
        NumericalFailure: the model gives NaN or infinite log-likelihoods.
    """
    if reference is not None:
        reference.check_fits(windows)
    count = len(windows.tokens)
    nll = torch.zeros(count, dtype=torch.float64)
    kl, agreement = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    positions = torch.zeros(count, dtype=torch.float64)
    for window, logits, targets in each_window(model, windows, vocab_size, batch_size):
        nll[window] = _mean_nll(logits, targets)
        if reference is not None:
            kl[window], agreement[window], positions[window] = reference.compare(window, logits)
    if not bool(torch.isfinite(nll).all()):
        bad = int((~torch.isfinite(nll)).sum())
        raise NumericalFailure(f"{bad} of {count} windows have a NaN or infinite log-likelihood")
    if reference is None:
        return WindowScores(nll)
    return WindowScores(nll, kl, agreement, positions)


def _mean_nll(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Mean negative log-likelihood in nats; in float32, a bounded number of rows at a time."""
    rows = max(1, CHUNK_BYTES // (4 * logits.shape[-1]))
    total = 0.0
    for chunk, wanted in zip(logits.split(rows), targets.split(rows), strict=True):
        losses = nn.functional.cross_entropy(chunk.float(), wanted, reduction="none")
        total += float(losses.double().sum())
    return total / len(targets)
