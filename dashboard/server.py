"""What Streamlit runs: the pages behind the gate.

Started by `launch`, which says by the environment whether there is a sign-in.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from harness_dashboard import views
from harness_dashboard.gate import Gate
from harness_dashboard.launch import DIGEST_VARIABLE
from starlette.middleware import Middleware
from streamlit.starlette import App

# What the pages import takes a second, which the first reader need not wait for.
for page in iter_modules(views.__path__, f"{views.__name__}."):
    import_module(page.name)

app = App(
    Path(__file__).with_name("app.py"),
    middleware=[Middleware(Gate, digest=os.environ.get(DIGEST_VARIABLE))],
)
