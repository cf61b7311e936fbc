"""What Streamlit runs: the pages behind the gate.

Started by `launch`, which says by the environment whether there is a sign-in.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

from harness_dashboard.gate import Gate
from harness_dashboard.launch import DIGEST_VARIABLE
from starlette.middleware import Middleware
from streamlit.starlette import App

# What the pages import takes a second, which the first reader need not wait for.
for page in ("compare", "environment", "method", "overview", "pareto", "scaling", "survey", "sweep"):
    import_module(f"harness_dashboard.views.{page}")

app = App(
    Path(__file__).with_name("app.py"),
    middleware=[Middleware(Gate, digest=os.environ.get(DIGEST_VARIABLE))],
)
