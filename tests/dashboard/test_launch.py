"""How the server is started: what it is told, what it is not told, and what is refused."""

from __future__ import annotations

import subprocess

import pytest

pytest.importorskip("streamlit")

from harness_dashboard import launch
from harness_dashboard.access import Address, digest_of

from harness.cli.app import run

TOKEN = "correct-horse-battery-staple"
HERE = Address("127.0.0.1", True)


@pytest.fixture
def started(monkeypatch):
    """Servers that are not really started: the command lines and environments they would have had."""
    calls = []

    class Server:
        def __init__(self, line, env):
            calls.append((line, env))

        def wait(self):
            return 0

        def poll(self):
            return 0

        def terminate(self):
            pass

    monkeypatch.setattr(launch.subprocess, "Popen", Server)
    monkeypatch.setattr(launch, "_check_free", lambda *_: None)
    monkeypatch.delenv("HARNESS_DASHBOARD_TOKEN", raising=False)
    return calls


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7"])
def test_another_address_needs_a_token(started, host, capsys):
    assert run(["dashboard", "--host", host]) == 2
    error = capsys.readouterr().err
    assert f"on {host} others can reach the dashboard, so it needs a token" in error
    assert "HARNESS_DASHBOARD_TOKEN" in error
    assert started == []


def test_a_weak_token_is_refused(started, capsys, monkeypatch):
    assert run(["dashboard", "--host", "0.0.0.0", "--token", "secret"]) == 2
    assert "16 to 512 characters, not 6" in capsys.readouterr().err
    monkeypatch.setenv("HARNESS_DASHBOARD_TOKEN", "aaaaaaaaaaaaaaaaaaaaaaaa")
    assert run(["dashboard"]) == 2
    assert "8 different characters" in capsys.readouterr().err
    assert started == []


@pytest.mark.parametrize("way", ["option", "environment"])
def test_the_token_reaches_the_server_only_as_its_digest(started, way, capsys, monkeypatch):
    if way == "environment":
        monkeypatch.setenv("HARNESS_DASHBOARD_TOKEN", TOKEN)
    option = ["--token", TOKEN] if way == "option" else []
    assert run(["dashboard", "--host", "0.0.0.0", *option]) == 0
    line, environment = started[0]
    assert "--server.address=0.0.0.0" in line
    assert environment[launch.DIGEST_VARIABLE] == digest_of(TOKEN)
    assert TOKEN not in " ".join(line)
    assert TOKEN not in " ".join(environment.values())
    printed = capsys.readouterr()
    assert TOKEN not in printed.out + printed.err


def test_a_digest_of_somebody_elses_is_not_taken_over(started, monkeypatch):
    monkeypatch.setenv(launch.DIGEST_VARIABLE, "0" * 64)
    assert run(["dashboard"]) == 0
    assert launch.DIGEST_VARIABLE not in started[0][1]


def test_what_is_listened_on_is_what_was_judged(started, monkeypatch):
    monkeypatch.setattr(launch, "locate", lambda _: Address("127.0.1.1", True))
    assert run(["dashboard", "--host", "box"]) == 0
    assert "--server.address=127.0.1.1" in started[0][0]


def test_settings_of_the_users_own_cannot_open_it():
    line = launch.command(Address("0.0.0.0", False), 8501)
    for setting in (
        "server.enableCORS=true",
        "server.enableXsrfProtection=true",
        "server.enableStaticServing=false",
        "server.enableAgentApi=false",
        "client.showErrorLinks=false",
        "client.showErrorDetails=none",
        "client.disableDataExport=true",
        "browser.gatherUsageStats=false",
    ):
        assert f"--{setting}" in line
    assert not any("showErrorDetails" in each for each in launch.command(HERE, 8501))


def test_both_themes_are_configured():
    line = " ".join(launch.command(HERE, 8501))
    assert "--theme.light.backgroundColor=#FFFFFF" in line
    assert "--theme.dark.backgroundColor=#14161A" in line
    assert "--theme.base" not in line  # it would settle which of the two


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        (HERE, "localhost"),
        (Address("0.0.0.0", False), "localhost"),
        (Address("::", False), "localhost"),
        (Address("127.0.1.1", True), "127.0.1.1"),
        (Address("::1", True), "[::1]"),
    ],
)
def test_the_address_that_a_browser_opens(address, shown):
    assert launch._shown(address) == shown


def test_every_setting_is_one_that_streamlit_knows():
    """Streamlit ends with a usage error where it does not know an option."""
    line = launch.command(HERE, 8501)
    done = subprocess.run([*line[:4], "--help"], capture_output=True, text=True, timeout=60, check=True)
    for option in line[5:]:
        assert f"  {option.partition('=')[0]} " in done.stdout
