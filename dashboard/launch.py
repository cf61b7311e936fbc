"""Starting the dashboard's server."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from harness.errors import ConfigError, MissingExtra

from .access import TOKEN_VARIABLE, Address, check_token, digest_of, locate
from .theme import SETTINGS as THEME

__all__ = ["DIGEST_VARIABLE", "command", "environment", "serve"]

DIGEST_VARIABLE = "HARNESS_DASHBOARD_TOKEN_SHA256"
"""How the server is told what opens it, instead of by the token."""

_SETTINGS = {
    "server.headless": "true",  # no question for an e-mail address, no browser of its own
    "server.fileWatcherType": "none",
    # Whatever a configuration file of the user's says: nothing that the dashboard does not need.
    "server.enableCORS": "true",
    "server.enableXsrfProtection": "true",
    "server.enableStaticServing": "false",
    "server.enableAgentApi": "false",
    "server.scriptHealthCheckEnabled": "false",
    "server.maxUploadSize": "1",
    "browser.gatherUsageStats": "false",
    "client.showErrorLinks": "false",  # they would carry an error's text to a search engine
    "client.toolbarMode": "viewer",
    # Its own CSV would let a spreadsheet run a text that looks like a formula; ours does not.
    "client.disableDataExport": "true",
    "logger.hideWelcomeMessage": "true",
}
_START_TIMEOUT_S = 30.0


def serve(
    db: str, host: str = "127.0.0.1", port: int = 8501, *, token: str | None = None, open_browser: bool
) -> int:
    """Run the server until it is stopped; returns its exit code, 0 after Ctrl-C or SIGTERM.

    The store is opened read-only, and only when a page asks for it, so it may still be missing.

    Args:
        token: what the sign-in asks for; None: no sign-in, which only a loopback address may do without.

    Raises:
        MissingExtra: Streamlit or Plotly is not installed.
        ConfigError: something else listens on the port, the token can be guessed, or others could reach the
            server without one.
    """
    for package in ("streamlit", "plotly"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, "dashboard")
    address = locate(host)
    if token is not None:
        check_token(token)
    elif not address.loopback:
        raise ConfigError(
            f"on {host} others can reach the dashboard, so it needs a token: set {TOKEN_VARIABLE} "
            "(or --token), or leave --host out and forward the port with ssh -L"
        )
    _check_free(address, port)
    process = subprocess.Popen(command(address, port), env=environment(db, token))
    try:
        with _ending_with(process):
            if _is_up(process, address, port):
                url = f"http://{_shown(address)}:{port}"
                print(f"dashboard on {url}{' (sign in with the token)' if token else ''}", flush=True)
                if open_browser:
                    webbrowser.open(url)
            code = process.wait()
        return 0 if code == -signal.SIGTERM else code
    except KeyboardInterrupt:
        return 0
    finally:
        process.terminate()
        process.wait()


def command(address: Address, port: int) -> list[str]:
    """The command line of the server, which any user of the machine can read."""
    settings = {**_SETTINGS, **THEME, "server.address": address.numeric, "server.port": str(port)}
    if not address.loopback:
        settings["client.showErrorDetails"] = "none"  # they tell of paths on this machine
    options = [f"--{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "streamlit", "run", str(Path(__file__).with_name("server.py")), *options]


def environment(db: str, token: str | None) -> dict[str, str]:
    """The environment of the server, which holds the token's digest instead of the token."""
    kept = {
        name: value for name, value in os.environ.items() if name not in (TOKEN_VARIABLE, DIGEST_VARIABLE)
    }
    told = {} if token is None else {DIGEST_VARIABLE: digest_of(token)}
    return {**kept, **told, "HARNESS_DB": db}


def _shown(address: Address) -> str:
    """The host for an address that a browser on this machine can open."""
    if address.numeric in ("127.0.0.1", "0.0.0.0", "::"):
        return "localhost"
    return f"[{address.numeric}]" if ":" in address.numeric else address.numeric


def _check_free(address: Address, port: int) -> None:
    try:
        family, kind, *_, place = socket.getaddrinfo(address.numeric, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        raise ConfigError(
            f"the dashboard cannot listen on {address.numeric} port {port} ({error.strerror}); "
            "choose another with --port"
        ) from None


def _is_up(process: subprocess.Popen[bytes], address: Address, port: int) -> bool:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with socket.create_connection((address.numeric, port), timeout=1):
                return True
        except OSError:
            time.sleep(0.1)
    return False


@contextmanager
def _ending_with(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """SIGTERM to this process ends the server too, which would otherwise go on alone."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        process.terminate()

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
