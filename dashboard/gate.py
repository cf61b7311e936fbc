"""What stands before every request: the sign-in, and what no request may do.

The gate wraps the whole server, so that before the sign-in nothing of Streamlit answers: no page, no script,
no media file, no upload and no WebSocket, over which all data go. The sign-in page is plain HTML without a
script.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
from http import HTTPStatus
from urllib.parse import parse_qs, quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from .access import Attempts, Sessions, is_loopback_name, matches

__all__ = ["HEALTH", "SIGN_IN", "SIGN_OUT", "Gate"]

HEALTH, SIGN_IN, SIGN_OUT = "/_stcore/health", "/sign-in", "/sign-out"

_LONGEST_BODY = 16 * 1024
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    # The browser itself refuses to load anything from another host.
    "Content-Security-Policy": "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; "
    "connect-src 'self' data: blob:; form-action 'self'; base-uri 'self'; frame-ancestors 'none'",
}
_STYLE = """
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; margin: 0; }
body { display: grid; place-items: center; min-height: 100vh; }
main { width: min(22rem, 100vw - 2rem); }
input, button { font: inherit; width: 100%; padding: 0.5rem; margin: 0.25rem 0 1rem; box-sizing: border-box; }
"""
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>harness: sign in</title>
<style>{style}</style>
<main>
<h1>harness</h1>
<form method="post" action="{action}">
<input type="hidden" name="next" value="{next}">
<label for="token">The token that the dashboard was started with</label>
<input id="token" name="token" type="password" autocomplete="current-password" required autofocus>
<button>Sign in</button>
</form>
<p role="alert">{message}</p>
</main>
</html>
"""


class Gate:
    """ASGI middleware around the dashboard.

    Args:
        app: what it stands before.
        digest: the SHA-256 of the token that opens it; None where only this machine reaches the server, which
            is then told apart from a stranger's page by the name that it was asked under.
    """

    def __init__(
        self,
        app: ASGIApp,
        digest: str | None,
        *,
        sessions: Sessions | None = None,
        attempts: Attempts | None = None,
    ) -> None:
        self._app, self._digest = app, digest
        self._sessions, self._attempts = sessions or Sessions(), attempts or Attempts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let through."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        sending = _with_headers(send)
        answer = await self._answer(scope, receive)
        if answer is None:
            await self._app(scope, receive, sending)
        elif scope["type"] == "websocket":
            await WebSocketClose(code=1008)(scope, receive, sending)
        else:
            await answer(scope, receive, sending)

    async def _answer(self, scope: Scope, receive: Receive) -> Response | None:
        """What to say instead of the app; None where the request may pass."""
        headers, path = Headers(scope=scope), scope["path"]
        if path == HEALTH and scope.get("method") in ("GET", "HEAD"):
            return PlainTextResponse("ok")
        host = headers.get("host", "")
        if self._digest is None and not is_loopback_name(host):
            return PlainTextResponse(
                "The dashboard answers only to localhost without a token.\n", HTTPStatus.MISDIRECTED_REQUEST
            )
        # Another site, or another server on this machine, must not speak for who is signed in here.
        if (origin := headers.get("origin")) is not None and urlsplit(origin).netloc != host:
            return PlainTextResponse("This request comes from another site.\n", HTTPStatus.FORBIDDEN)
        if self._digest is None:
            return None
        if scope["type"] == "http" and path == SIGN_IN:
            return await self._sign_in(Request(scope, receive), self._digest)
        if scope["type"] == "http" and path == SIGN_OUT:
            return self._sign_out(scope)
        if self._sessions.holds(HTTPConnection(scope).cookies.get(_cookie(scope), "")):
            return None
        if scope.get("method") == "GET" and "text/html" in headers.get("accept", ""):
            target = path + (f"?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else "")
            return RedirectResponse(f"{SIGN_IN}?next={quote(target, safe='')}", HTTPStatus.SEE_OTHER)
        return PlainTextResponse("Sign in first.\n", HTTPStatus.UNAUTHORIZED)

    async def _sign_in(self, request: Request, digest: str) -> Response:
        if request.method in ("GET", "HEAD"):
            return _page(request.query_params.get("next", "/"))
        if request.method != "POST":
            return PlainTextResponse("", HTTPStatus.METHOD_NOT_ALLOWED)
        body = await _body(request)
        if body is None:
            return PlainTextResponse("This is no sign-in.\n", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        fields = parse_qs(body.decode("utf-8", "replace"))
        target = _local(fields.get("next", ["/"])[0])
        client = request.client.host if request.client else ""
        # From here to the answer nothing else runs, so that many requests at once gain nothing.
        if (wait := self._attempts.wait_s(client)) > 0:
            return _page(target, f"Too many wrong tokens. Try again in {math.ceil(wait)} s.", wait_s=wait)
        if not matches(fields.get("token", [""])[0], digest):
            self._attempts.wrong(client)
            return _page(target, "That is not the token.", HTTPStatus.UNAUTHORIZED)
        self._attempts.right(client)
        answer = RedirectResponse(target, HTTPStatus.SEE_OTHER)
        answer.set_cookie(
            _cookie(request.scope),
            self._sessions.open(),
            path="/",
            httponly=True,
            samesite="lax",  # strict would ask again whoever follows a link to a view
            secure=request.url.scheme == "https",
        )
        return answer

    def _sign_out(self, scope: Scope) -> Response:
        name = _cookie(scope)
        self._sessions.close(HTTPConnection(scope).cookies.get(name, ""))
        answer = RedirectResponse(SIGN_IN, HTTPStatus.SEE_OTHER)
        answer.delete_cookie(name, path="/")
        return answer


def _cookie(scope: Scope) -> str:
    # Cookies do not tell ports apart, and one machine may serve two dashboards.
    return f"harness_dashboard_{(scope.get('server') or ('', 0))[1]}"


def _local(target: str) -> str:
    """The path to go on to, on this server and nowhere else.

    >>> _local("/pareto?family=pruning"), _local("//evil.example"), _local("https://evil.example")
    ('/pareto?family=pruning', '/', '/')
    """
    if not target.startswith("/") or target.startswith(("//", "/\\", SIGN_IN, SIGN_OUT)):
        return "/"
    return target if all("!" <= each <= "~" and each != "\\" for each in target) else "/"


def _page(
    target: str, message: str = "", status: HTTPStatus = HTTPStatus.OK, *, wait_s: float = 0.0
) -> HTMLResponse:
    text = _PAGE.format(
        style=_STYLE, action=SIGN_IN, next=html.escape(_local(target)), message=html.escape(message)
    )
    headers = {
        "Cache-Control": "no-store",
        "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    }
    if wait_s:
        status, headers["Retry-After"] = HTTPStatus.TOO_MANY_REQUESTS, str(math.ceil(wait_s))
    return HTMLResponse(text, status, headers)


async def _body(request: Request) -> bytes | None:
    """The body of a sign-in; None where it is longer than any sign-in is."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _LONGEST_BODY:
            return None
    return body


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return sending
