"""Who may see the dashboard: addresses, tokens, sessions, the limit on wrong tokens."""

from __future__ import annotations

import inspect
import socket

import pytest
from harness_dashboard import access
from harness_dashboard.access import Address, Attempts, Sessions

from harness.errors import ConfigError

TOKEN = "correct-horse-battery-staple"


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def resolve_to(monkeypatch, *numerics):
    found = [(0, 0, 0, "", (numeric, 0)) for numeric in numerics]
    monkeypatch.setattr(access.socket, "getaddrinfo", lambda *_, **__: found)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "localhost", "::1", "[::1]", "::ffff:127.0.0.1"])
def test_loopback_addresses(host):
    assert access.locate(host).loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "2001:db8::1", "::ffff:192.0.2.7", "0"])
def test_other_addresses(host):
    assert not access.locate(host).loopback


def test_a_name_is_loopback_only_where_all_its_addresses_are(monkeypatch):
    resolve_to(monkeypatch, "::1", "127.0.1.1")
    assert access.locate("box") == Address("127.0.1.1", True)
    resolve_to(monkeypatch, "127.0.0.1", "192.0.2.7")
    assert access.locate("box") == Address("127.0.0.1", False)


def test_a_name_without_an_address(monkeypatch):
    def nowhere(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(access.socket, "getaddrinfo", nowhere)
    with pytest.raises(ConfigError, match=r"--host 'nowhere\.invalid' has no address"):
        access.locate("nowhere.invalid")


@pytest.mark.parametrize("host", ["", "  "])
def test_an_empty_host_is_not_every_address(host):
    with pytest.raises(ConfigError, match="--host is empty"):
        access.locate(host)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("localhost:8501", True),
        ("LOCALHOST", True),
        ("app.localhost:80", True),
        ("127.0.0.1:8501", True),
        ("[::1]:8501", True),
        ("", False),
        ("evil.example:8501", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example", False),
        ("192.0.2.7:8501", False),
    ],
)
def test_names_of_this_machine(header, expected):
    assert access.is_loopback_name(header) is expected


@pytest.mark.parametrize(
    ("token", "problem"),
    [
        ("", "16 to 512 characters, not 0"),
        ("short-one", "16 to 512 characters, not 9"),
        ("a1" * 300, "16 to 512 characters, not 600"),
        ("abababababababababab", "8 different characters"),
        ("with a space in it, long", "visible ASCII"),
        ("with-a-newline-in-it\n", "visible ASCII"),
        ("mit-Umläuten-und-mehr", "visible ASCII"),
    ],
)
def test_tokens_that_are_refused(token, problem):
    with pytest.raises(ConfigError, match=problem) as raised:
        access.check_token(token)
    assert not token or token not in str(raised.value)
    assert "secrets.token_urlsafe" in str(raised.value)


def test_a_good_token_is_taken():
    assert access.check_token(TOKEN) == TOKEN


def test_only_the_token_matches():
    digest = access.digest_of(TOKEN)
    assert access.matches(TOKEN, digest)
    for wrong in ("", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), digest, "\udc80"):
        assert not access.matches(wrong, digest)


def test_tokens_are_compared_in_constant_time(monkeypatch):
    compared = []
    monkeypatch.setattr(access.hmac, "compare_digest", lambda *both: compared.append(both) or False)
    assert not access.matches("x", access.digest_of(TOKEN))
    # Digests are of one length, so not even the token's length shows.
    assert [len(each) for each in compared[0]] == [64, 64]
    assert "==" not in inspect.getsource(access.matches)


def test_sessions_hold_until_they_end():
    clock = Clock()
    sessions = Sessions(lifetime_s=60, clock=clock)
    first, second = sessions.open(), sessions.open()
    assert first != second
    assert sessions.holds(first)
    assert not sessions.holds("")
    assert not sessions.holds(first[:-1])
    sessions.close(second)
    assert not sessions.holds(second)
    clock.now += 59
    assert sessions.holds(first)
    clock.now += 1
    assert not sessions.holds(first)


def test_ended_sessions_are_forgotten():
    clock = Clock()
    sessions = Sessions(lifetime_s=60, clock=clock)
    for _ in range(5):
        sessions.open()
    clock.now += 61
    sessions.open()
    assert len(sessions._ends) == 1


def test_wrong_tokens_are_slowed_down():
    clock = Clock()
    attempts = Attempts(clock)
    waits = []
    for _ in range(20):
        waits.append(attempts.wait_s("192.0.2.7"))
        clock.now += waits[-1]
        attempts.wrong("192.0.2.7")
    assert waits[:5] == [0] * 5
    assert waits[5:9] == [1, 2, 4, 8]
    assert waits[-1] == Attempts.LONGEST_WAIT_S
    assert attempts.wait_s("192.0.2.8") == 0
    assert attempts.wait_s("::ffff:192.0.2.7") > 0
    attempts.right("192.0.2.7")
    assert attempts.wait_s("192.0.2.7") == 0


def test_addresses_of_one_network_count_as_one():
    attempts = Attempts(Clock())
    for host in range(5):
        attempts.wrong(f"2001:db8::{host:x}")
    assert attempts.wait_s("2001:db8::beef") == 1
    assert attempts.wait_s("2001:db8:0:1::1") == 0


def test_a_flood_from_everywhere_is_limited():
    clock = Clock()
    attempts = Attempts(clock)
    for number in range(Attempts.ALL_IN_A_MINUTE):
        attempts.wrong(f"10.0.{number}.1")
    assert attempts.wait_s("192.0.2.7") == 60
    clock.now += 60
    assert attempts.wait_s("192.0.2.7") == 0


def test_what_is_remembered_is_bounded_and_forgotten():
    clock = Clock()
    attempts = Attempts(clock)
    for number in range(Attempts.REMEMBERED + 10):
        attempts.wrong(f"10.{number // 256}.{number % 256}.1")
    assert len(attempts._wrong) == Attempts.REMEMBERED
    for _ in range(9):
        attempts.wrong("192.0.2.7")
    clock.now += Attempts.FORGET_S
    attempts.wrong("192.0.2.7")
    clock.now += 61
    assert attempts.wait_s("192.0.2.7") == 0
