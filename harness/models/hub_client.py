"""A client of the hub that gives up within seconds, with one clear reason.

The hub's own library retries for half a minute where nothing answers, and sleeps for as long as a server's
`Retry-After` says. A sweep is better served by a quick answer: it can be told to work from the cache.
"""

from __future__ import annotations

import logging
import os
import time
from functools import cache
from typing import Any

import httpx

__all__ = ["HubUnavailable", "use_bounded_client"]

ATTEMPTS = 3
WAIT_S = 0.5  # doubled before the third attempt
LONGEST_WAIT_S = 5.0  # a server that asks for more is taken for busy
CONNECT_TIMEOUT_S = 5.0
_BUSY = frozenset({408, 429, 500, 502, 503, 504})


class HubUnavailable(ConnectionError):
    """The hub cannot be reached, or is too busy to answer."""


class _BoundedClient(httpx.Client):
    """An `httpx.Client` with few, short retries of what may be over in a moment."""

    def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        wait_s = WAIT_S
        host = request.url.host
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(wait_s)
                wait_s *= 2
            try:
                response = super().send(request, **options)
            except httpx.TransportError as error:
                problem = f"{host} cannot be reached ({_reason(error)})"
                continue
            if response.status_code not in _BUSY:
                return response
            response.close()
            problem = f"{host} answers {response.status_code} {response.reason_phrase}".rstrip()
            asked = response.headers.get("Retry-After", "")
            if asked.isascii() and asked.isdigit():
                wait_s = max(wait_s, float(asked[:9]))
                if wait_s > LONGEST_WAIT_S:
                    problem += f" and asks to wait for {wait_s:.0f} s"
                    break
        raise HubUnavailable(problem)


def _reason(error: httpx.TransportError) -> str:
    return "timed out" if isinstance(error, httpx.TimeoutException) else str(error) or type(error).__name__


@cache
def use_bounded_client() -> None:
    """Let the hub's library make all its requests of this process through the bounded client.

    Its remarks on each attempt are silenced too (unless HF_HUB_VERBOSITY asks for them): the error says
    it all.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import hf_request_event_hook

    def make() -> httpx.Client:
        return _BoundedClient(
            event_hooks={"request": [hf_request_event_hook]},
            follow_redirects=True,
            timeout=httpx.Timeout(10.0, connect=CONNECT_TIMEOUT_S),
        )

    set_client_factory(make)
    if "HF_HUB_VERBOSITY" not in os.environ:
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
