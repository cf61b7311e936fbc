"""Without the progress bars and import-time warnings of the libraries that load models."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator

__all__ = ["without_bars", "without_chatter"]

_CHATTY = ("torchao", "torch.utils._pytree")  # warn of their own optional parts whenever they are imported


@contextlib.contextmanager
def without_chatter() -> Iterator[None]:
    """No progress bars of transformers, no warnings of what nobody asked for; errors are still shown."""
    from transformers.utils import logging as transformers_logging

    levels = {name: logging.getLogger(name).level for name in _CHATTY}
    had_bars = transformers_logging.is_progress_bar_enabled()
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if had_bars:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Nothing on standard error: for calls into libraries that always draw a progress bar."""
    with without_chatter(), contextlib.redirect_stderr(io.StringIO()):
        yield
