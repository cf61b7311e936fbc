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

__all__ = ["command", "serve"]

_SETTINGS = {
    "server.headless": "true",  # no question for an e-mail address, no browser of its own
    "server.fileWatcherType": "none",
    "browser.gatherUsageStats": "false",
    "client.toolbarMode": "minimal",
    "theme.base": "light",
    "theme.primaryColor": "#332288",
}
_START_TIMEOUT_S = 30.0


def serve(db: str, host: str = "127.0.0.1", port: int = 8501, *, open_browser: bool) -> int:
    """Run the server until it is stopped; returns its exit code, 0 after Ctrl-C or SIGTERM.

    The store is opened read-only, and only when a page asks for it, so it may still be missing.

    Raises:
        MissingExtra: Streamlit or Plotly is not installed.
        ConfigError: something else listens on the port.
    """
    for package in ("streamlit", "plotly"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, "dashboard")
    _check_free(host, port)
    environment = {**os.environ, "HARNESS_DB": db}
    process = subprocess.Popen(command(host, port), env=environment)
    try:
        with _ending_with(process):
            address = f"http://{'localhost' if host in ('127.0.0.1', '0.0.0.0') else host}:{port}"
            if open_browser and _is_up(process, host, port):
                webbrowser.open(address)
            code = process.wait()
        return 0 if code == -signal.SIGTERM else code
    except KeyboardInterrupt:
        return 0
    finally:
        process.terminate()
        process.wait()


def command(host: str, port: int) -> list[str]:
    """The command line of the server."""
    app = Path(__file__).with_name("app.py")
    settings = {**_SETTINGS, "server.address": host, "server.port": str(port)}
    options = [f"--{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "streamlit", "run", str(app), *options]


def _check_free(host: str, port: int) -> None:
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"the dashboard cannot listen on {host} port {port} ({error.strerror}); "
            "choose another with --port"
        ) from None


def _is_up(process: subprocess.Popen[bytes], host: str, port: int) -> bool:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=1):
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
