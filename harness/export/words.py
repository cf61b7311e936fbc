"""Codes of 2 to 8 bits as a dense stream in words of 32 bits, as compressed-tensors and GPTQ store them.

Code `i` takes the bits ``i * bits`` and following, counted from the lowest bit of the first word; with 3
bits some codes lie across two words.
"""

from __future__ import annotations

import torch

__all__ = ["pack_words", "unpack_words"]

_WORD = 32


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 [..., n] into int32 [..., ceil(n * bits / 32)]; what is left of the last word is 0."""
    n = codes.shape[-1]
    padded = torch.nn.functional.pad(codes, (0, -n % _WORD)).unflatten(-1, (-1, _WORD))
    words = torch.zeros((*padded.shape[:-1], bits), dtype=torch.int64, device=codes.device)
    for place in range(_WORD):
        word, shift = divmod(place * bits, _WORD)
        field = padded[..., place].long()
        words[..., word] |= field << shift & 0xFFFFFFFF
        if shift + bits > _WORD:
            words[..., word + 1] |= field >> _WORD - shift
    flat = words.flatten(-2)[..., : -(-n * bits // _WORD)]
    # Words from 2^31 on are negative in two's complement.
    return torch.where(flat >= 1 << 31, flat - (1 << 32), flat).to(torch.int32)


def unpack_words(words: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """The inverse of `pack_words`: uint8 [..., n]."""
    missing = -words.shape[-1] % bits
    wide = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, missing)).unflatten(-1, (-1, bits))
    codes = torch.empty((*wide.shape[:-1], _WORD), dtype=torch.uint8, device=words.device)
    for place in range(_WORD):
        word, shift = divmod(place * bits, _WORD)
        field = wide[..., word] >> shift
        if shift + bits > _WORD:
            field = field | wide[..., word + 1] << _WORD - shift
        codes[..., place] = (field & (1 << bits) - 1).to(torch.uint8)
    return codes.flatten(-2)[..., :n]
