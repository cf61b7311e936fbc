"""The baseline's log-probabilities, kept so that every variant can be compared with them.

Made once by the untouched model and read by all others: at most `MAX_POSITIONS` places, evenly spread over
the windows of a task's text, each with the whole distribution over the vocabulary. Small ones are kept in
float32 (the baseline is then at distance 0 from itself), large ones in float16.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from harness.errors import ConfigError, NumericalFailure
from harness.evaluate.windows import TokenWindows, each_window
from harness.folders import raise_if_full, replacing

__all__ = ["ReferenceLogits", "compute_reference", "load_reference", "save_reference", "write_tensors"]

FORMAT = "1"
MAX_POSITIONS = 4096
FLOAT32_BYTES = 256 << 20  # up to here in float32
MAX_BYTES = 1_100_000_000
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class ReferenceLogits:
    """Distributions of the baseline at some places of some windows.

    `log_probabilities` is [positions, vocab], float32 or float16; `windows` and `offsets` are int64
    [positions]: the logits at ``[window, offset]`` predict token ``[window, offset + 1]``. `top1` is
    int64 [positions]. `fingerprint` names the tokens; all tensors are on the CPU.
    """

    log_probabilities: torch.Tensor
    windows: torch.Tensor
    offsets: torch.Tensor
    top1: torch.Tensor
    fingerprint: str

    @property
    def vocab_size(self) -> int:
        return self.log_probabilities.shape[1]

    def check_fits(self, windows: TokenWindows) -> None:
        """Raise `ConfigError` unless this was made from these very windows."""
        if windows.fingerprint != self.fingerprint:
            raise ConfigError(
                "the baseline's reference was made from other tokens than the variant's "
                "(another tokenizer, window or limit)"
            )

    @cached_property
    def _rows_of(self) -> dict[int, tuple[int, int]]:
        """Window to its range of rows; the rows are in order of the windows."""
        numbers, counts = torch.unique_consecutive(self.windows, return_counts=True)
        ends = counts.cumsum(0)
        return {
            int(window): (int(end - count), int(end))
            for window, count, end in zip(numbers, counts, ends, strict=True)
        }

    def compare(self, window: int, logits: torch.Tensor) -> tuple[float, float, int]:
        """Mean KL(baseline || variant) in nats, share of equal top-1 tokens, number of positions.

        Args:
            logits: the variant's, [seq_len - 1, vocab], on any device.

        Raises:
            ConfigError: another size of vocabulary.
            NumericalFailure: the divergence is NaN or infinite.
        """
        if logits.shape[-1] != self.vocab_size:
            raise ConfigError(
                f"the variant's vocabulary of {logits.shape[-1]} is not the baseline's {self.vocab_size}"
            )
        first, end = self._rows_of.get(window, (0, 0))
        kl, agreeing = 0.0, 0
        for start in range(first, end, _ROWS_AT_ONCE):
            rows = slice(start, min(start + _ROWS_AT_ONCE, end))
            mine = logits[self.offsets[rows].to(logits.device)].float()
            # Rounding to float16 leaves a distribution that sums to nearly 1: make it sum to 1.
            base = self.log_probabilities[rows].to(logits.device).float().log_softmax(-1)
            terms = base.exp() * (base - mine.log_softmax(-1))
            # 0 log 0 = 0: what the baseline rules out does not count, whatever the variant says.
            terms = terms.where(base > -torch.inf, terms.new_zeros(()))
            kl += float(terms.sum(-1).double().sum())
            agreeing += int((mine.argmax(-1).cpu() == self.top1[rows]).sum())
        count = end - first
        if count == 0:
            return 0.0, 0.0, 0
        if not -1e-3 < kl / count < float("inf"):
            raise NumericalFailure(f"the divergence from the baseline is {kl / count}")
        return max(0.0, kl / count), agreeing / count, count


@torch.no_grad()
def compute_reference(
    model: nn.Module, windows: TokenWindows, *, vocab_size: int, batch_size: int
) -> ReferenceLogits:
    """Run the baseline over the windows and keep its distributions at evenly spread places.

    Args:
        vocab_size: what the configuration says, for the size of batches.

    Raises:
        NumericalFailure: the baseline itself gives NaN.
    """
    scored = windows.seq_len - 1
    kept: list[torch.Tensor] = []
    top1: list[torch.Tensor] = []
    places = torch.empty(0, dtype=torch.int64)
    dtype = torch.float32
    for window, logits, _ in each_window(model, windows, vocab_size, batch_size):
        if window == 0:
            places, dtype = _places(windows.scored_tokens, logits.shape[-1])
        offsets = places[places // scored == window] % scored
        for rows in offsets.split(_ROWS_AT_ONCE):
            chosen = logits[rows.to(logits.device)].float()
            kept.append(chosen.log_softmax(-1).to(dtype).cpu())
            top1.append(chosen.argmax(-1).cpu())
    log_probabilities = torch.cat(kept)
    if bool(log_probabilities.isnan().any()):
        raise NumericalFailure("the baseline's logits are NaN")
    return ReferenceLogits(
        log_probabilities, places // scored, places % scored, torch.cat(top1), windows.fingerprint
    )


def _places(scored_tokens: int, vocab_size: int) -> tuple[torch.Tensor, torch.dtype]:
    """Which of the scored tokens to keep, int64 ascending, and in which type."""
    count = min(MAX_POSITIONS, scored_tokens, max(1, MAX_BYTES // (2 * vocab_size)))
    places = torch.arange(count, dtype=torch.int64) * scored_tokens // count
    small = count * vocab_size * 4 <= FLOAT32_BYTES
    return places, torch.float32 if small else torch.float16


def save_reference(path: Path, reference: ReferenceLogits) -> None:
    """Keep a reference at `path`; raises as `write_tensors`."""
    tensors = {
        "log_probabilities": reference.log_probabilities.contiguous(),
        "windows": reference.windows,
        "offsets": reference.offsets,
        "top1": reference.top1,
    }
    write_tensors(path, tensors, {"format": FORMAT, "fingerprint": reference.fingerprint})


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file beside `path` and rename it, so that a reader finds all of it or nothing.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            save_file(tensors, file.name, metadata)
    except (OSError, SafetensorError) as error:
        raise_if_full(error, path.parent)
        raise ConfigError(
            f"the cache {path.parent} cannot be written ({error}); set HARNESS_CACHE to a writable folder"
        ) from None


def load_reference(path: Path) -> ReferenceLogits | None:
    """The stored reference, or None where there is none that can be read: then make it again."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                return None
            return ReferenceLogits(
                log_probabilities=file.get_tensor("log_probabilities"),
                windows=file.get_tensor("windows"),
                offsets=file.get_tensor("offsets"),
                top1=file.get_tensor("top1"),
                fingerprint=metadata["fingerprint"],
            )
    except (OSError, SafetensorError, KeyError):
        return None
