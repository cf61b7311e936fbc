"""What Streamlit runs: the pages behind the gate.

Started by `launch`, which says by the environment whether there is a sign-in.
"""

from __future__ import annotations

import os
from pathlib import Path

from harness_dashboard.gate import Gate
from harness_dashboard.launch import DIGEST_VARIABLE
from starlette.middleware import Middleware
from streamlit.starlette import App

app = App(
    Path(__file__).with_name("app.py"),
    middleware=[Middleware(Gate, digest=os.environ.get(DIGEST_VARIABLE))],
)
