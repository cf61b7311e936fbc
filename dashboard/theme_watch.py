"""Draws a page again when the reader's theme changes.

Streamlit turns its own parts to the new theme in the browser but does not run the page again, and a figure
would keep the colours of the old one: white on white.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from streamlit.components.v2 import component

__all__ = ["follow_theme"]

_LOOK = """
const known = new WeakMap();
export default function ({ parentElement, setTriggerValue }) {
  const element = parentElement.host ?? parentElement;
  const look = () => {
    const ground = getComputedStyle(element).getPropertyValue("--st-background-color");
    if (known.has(element) && known.get(element) !== ground) setTriggerValue("changed", ground);
    known.set(element, ground);
  };
  look();
  const timer = setInterval(look, 300);
  return () => clearInterval(timer);
}
"""


@cache
def _watcher() -> Any:
    return component("harness_theme", js=_LOOK)


def follow_theme() -> None:
    """Watch the theme from here on; to be called once a run."""
    _watcher()(key="theme", on_changed_change=_nothing, height=1)


def _nothing() -> None:
    """That the page runs again is all that is wanted."""
