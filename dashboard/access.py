"""Who may see the dashboard: addresses, tokens, sessions and the limit on wrong tokens. Pure.

The server never holds the token, only its SHA-256 digest, and compares digests in constant time. A session
is a random name in a cookie; the server keeps its digest and when it ends.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
import secrets
import socket
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import NamedTuple

from harness.errors import ConfigError

__all__ = [
    "TOKEN_VARIABLE",
    "Address",
    "Attempts",
    "Sessions",
    "bare_host",
    "check_token",
    "digest_of",
    "is_loopback_name",
    "locate",
    "matches",
]

TOKEN_VARIABLE = "HARNESS_DASHBOARD_TOKEN"
SESSION_S = 12 * 3600.0
"""How long a sign-in lasts at most; the cookie ends with the browser."""

_SHORTEST, _LONGEST, _FEWEST_CHARACTERS = 16, 512, 8
_MAKE_ONE = "make one with: python -c 'import secrets; print(secrets.token_urlsafe(24))'"


# --- addresses ----------------------------------------------------------------------------------


class Address(NamedTuple):
    """Where the server listens: a numeric address, and whether only this machine reaches it."""

    numeric: str
    loopback: bool


def locate(host: str) -> Address:
    """The address behind a host name. It is looked up once, so that what was judged is what is listened on.

    A name is loopback only where all of its addresses are.

    Raises:
        ConfigError: the name has no address.
    """
    # An empty host would mean every address, which is to be said in so many words.
    if not host.strip():
        raise ConfigError("--host is empty; give 127.0.0.1, or another address together with a token")
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host!r} has no address ({error})") from None
    numerics = [str(each[4][0]) for each in found]
    loopback = all(_is_loopback(each) for each in numerics)
    preferred = [each for each in numerics if ":" not in each] or numerics
    return Address(preferred[0], loopback)


def _is_loopback(numeric: str) -> bool:
    try:
        address = ipaddress.ip_address(numeric.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def bare_host(header: str) -> str:
    """The host of a ``Host`` header, without its port.

    >>> bare_host("localhost:8501"), bare_host("[::1]:8501"), bare_host("::1")
    ('localhost', '::1', '::1')
    """
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return (header if header.count(":") > 1 else header.partition(":")[0]).lower()


def is_loopback_name(header: str) -> bool:
    """Whether a ``Host`` header names this machine from itself, without asking any name server.

    A web page of somebody else can let its own name point to 127.0.0.1 and so have a browser read what only
    listens there; the name gives it away.

    >>> is_loopback_name("localhost:8501"), is_loopback_name("127.0.0.1"), is_loopback_name("evil.example")
    (True, True, False)
    """
    host = bare_host(header).rstrip(".")
    return host == "localhost" or host.endswith(".localhost") or _is_loopback(host)


# --- tokens -------------------------------------------------------------------------------------


def check_token(token: str) -> str:
    """The token, where it is one that cannot be guessed.

    Raises:
        ConfigError: it is short, long, made of few different characters, or not of visible ASCII. The message
            never holds it.
    """
    if not all("!" <= character <= "~" for character in token):
        raise ConfigError(f"the dashboard's token must be of visible ASCII characters; {_MAKE_ONE}")
    if not _SHORTEST <= len(token) <= _LONGEST:
        raise ConfigError(
            f"the dashboard's token must have {_SHORTEST} to {_LONGEST} characters, not {len(token)}; "
            f"{_MAKE_ONE}"
        )
    if len(set(token)) < _FEWEST_CHARACTERS:
        raise ConfigError(
            f"the dashboard's token must have at least {_FEWEST_CHARACTERS} different characters; {_MAKE_ONE}"
        )
    return token


def digest_of(token: str) -> str:
    """SHA-256 in hexadecimal, which is all that the server is told."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def matches(given: str, digest: str) -> bool:
    """Whether the digest is the given token's; takes as long for any wrong token as for the right one."""
    return hmac.compare_digest(digest_of(given), digest)


# --- sessions and attempts ------------------------------------------------------------------------


class Sessions:
    """The sign-ins that hold. Kept in memory: they end with the server."""

    def __init__(self, lifetime_s: float = SESSION_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._lifetime_s, self._clock = lifetime_s, clock
        self._ends: dict[str, float] = {}

    def open(self) -> str:
        """A new session's name."""
        now = self._clock()
        self._ends = {digest: end for digest, end in self._ends.items() if end > now}
        name = secrets.token_urlsafe(32)
        self._ends[digest_of(name)] = now + self._lifetime_s
        return name

    def holds(self, name: str) -> bool:
        """Whether somebody signed in under this name and the time is not over."""
        return self._ends.get(digest_of(name), -math.inf) > self._clock()

    def close(self, name: str) -> None:
        """Sign out."""
        self._ends.pop(digest_of(name), None)


class Attempts:
    """Wrong tokens, by who gave them: after a few, each doubles the wait before the next is looked at.

    A flood from many addresses is limited too, by what all of them together may try in a minute.
    """

    FREE, LONGEST_WAIT_S, FORGET_S = 5, 300.0, 900.0
    ALL_IN_A_MINUTE, REMEMBERED = 100, 4096

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._wrong: OrderedDict[str, tuple[int, float]] = OrderedDict()  # how many, and when the last was
        self._all: deque[float] = deque(maxlen=self.ALL_IN_A_MINUTE)

    def wait_s(self, client: str) -> float:
        """How long this client must still wait; 0 where it may try."""
        now = self._clock()
        waits = [0.0]
        count, last = self._wrong.get(_network(client), (0, now))
        if count >= self.FREE and now - last < self.FORGET_S:
            waits.append(last + min(2.0 ** (count - self.FREE), self.LONGEST_WAIT_S) - now)
        if len(self._all) == self.ALL_IN_A_MINUTE:
            waits.append(self._all[0] + 60.0 - now)
        return max(waits)

    def wrong(self, client: str) -> None:
        """A wrong token was given."""
        now, key = self._clock(), _network(client)
        count, last = self._wrong.pop(key, (0, now))
        self._wrong[key] = (count + 1 if now - last < self.FORGET_S else 1, now)
        if len(self._wrong) > self.REMEMBERED:
            self._wrong.popitem(last=False)
        self._all.append(now)

    def right(self, client: str) -> None:
        """The right token was given: what was wrong before is forgotten."""
        self._wrong.pop(_network(client), None)


def _network(client: str) -> str:
    """Who counts as one: an address, or the /64 network that one subscriber of IPv6 has to himself."""
    try:
        address = ipaddress.ip_address(client.partition("%")[0])
    except ValueError:
        return client
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
