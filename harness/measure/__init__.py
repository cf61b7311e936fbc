"""Measuring: latency, memory, effect and statistics."""

from __future__ import annotations

__all__ = ["MEASURING_VERSION"]

MEASURING_VERSION = 2
"""Goes up whenever a number measured before can no longer be compared with one measured now."""
