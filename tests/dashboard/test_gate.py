"""What stands before every request: nothing passes without a sign-in, whatever is asked for."""

from __future__ import annotations

import pytest

pytest.importorskip("streamlit")

from harness_dashboard.access import Attempts, Sessions, digest_of
from harness_dashboard.gate import Gate
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute

from tests.dashboard.asgi_client import Client

TOKEN = "correct-horse-battery-staple"
SECRET = "what only those who signed in may see"
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
STREAMLIT = [
    "/", "/pareto", "/_stcore/stream", "/_stcore/host-config", "/_stcore/metrics", "/_stcore/upload_file/a/b",
    "/_stcore/agent/openapi.json", "/_stcore/script-health-check", "/_stcore/allowed-message-origins",
    "/media/0123.csv", "/static/js/index.js", "/component/x", "/app/static/x", "/sign-in/",
    "/sign-in/../pareto", "/%73ign-in/x",
    "//sign-in", "/_stcore/health/", "/_stcore/health/../stream",
]  # fmt: skip


def asgi_app():
    async def whatever(_request):
        return PlainTextResponse(SECRET)

    async def stream(websocket):
        await websocket.accept()
        await websocket.send_text(SECRET)
        await websocket.close()

    return Starlette(
        routes=[WebSocketRoute("/_stcore/stream", stream), Route("/{rest:path}", whatever, methods=METHODS)]
    )


def client_of(token=TOKEN, *, host="board.example:8501", scheme="http", **changes):
    gate = Gate(asgi_app(), None if token is None else digest_of(token), **changes)
    return Client(gate, host, scheme)


@pytest.fixture
def client():
    return client_of()


def sign_in(client, token=TOKEN, **fields):
    return client.post("/sign-in", data={"token": token, **fields})


@pytest.mark.parametrize("path", STREAMLIT)
@pytest.mark.parametrize("accept", ["text/html", "*/*"])
def test_nothing_passes_before_the_sign_in(client, path, accept):
    for method in METHODS:
        answer = client.request(method, path, headers={"accept": accept})
        assert SECRET not in answer.text
        assert answer.status_code in (303, 401)
    for cookie in ("", "x", TOKEN, digest_of(TOKEN)):
        answer = client.get(path, cookies={"harness_dashboard_8501": cookie})
        assert SECRET not in answer.text


def test_no_websocket_before_the_sign_in(client):
    assert client.stream("/_stcore/stream") is None
    sign_in(client)
    assert client.stream("/_stcore/stream") == [SECRET]


def test_the_way_through(client):
    answer = client.get("/pareto?family=pruning&quality=acc", headers={"accept": "text/html"})
    assert answer.status_code == 303
    assert answer.headers["location"] == "/sign-in?next=%2Fpareto%3Ffamily%3Dpruning%26quality%3Dacc"
    page = client.get(answer.headers["location"])
    assert 'type="password"' in page.text
    assert 'value="/pareto?family=pruning&amp;quality=acc"' in page.text
    answer = sign_in(client, next="/pareto?family=pruning&quality=acc")
    assert (answer.status_code, answer.headers["location"]) == (303, "/pareto?family=pruning&quality=acc")
    assert client.get("/pareto").text == SECRET


def test_the_cookie_is_out_of_reach_of_scripts_and_holds_no_token(client):
    cookie = sign_in(client).headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert "Secure" not in cookie
    assert "expires" not in cookie.lower()  # ends with the browser
    assert TOKEN not in cookie
    assert digest_of(TOKEN) not in cookie
    over_tls = client_of(host="board.example", scheme="https")
    assert "Secure" in sign_in(over_tls).headers["set-cookie"]


@pytest.mark.parametrize("token", ["", "wrong", TOKEN[:-1], TOKEN + " ", digest_of(TOKEN), "ü\x00"])
def test_a_wrong_token(client, token):
    answer = sign_in(client, token)
    assert answer.status_code == 401
    assert "That is not the token." in answer.text
    assert "set-cookie" not in answer.headers
    assert not token or token not in answer.text
    assert client.get("/pareto").status_code == 401


def test_wrong_tokens_are_limited():
    now = [0.0]
    client = client_of(attempts=Attempts(lambda: now[0]))
    for _ in range(5):
        assert sign_in(client, "wrong").status_code == 401
    answer = sign_in(client)  # not even the right one is looked at
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert "Try again in 1 s" in answer.text
    now[0] = 1.0
    assert sign_in(client).status_code == 303


def test_a_session_ends():
    now = [0.0]
    client = client_of(sessions=Sessions(lifetime_s=60, clock=lambda: now[0]))
    sign_in(client)
    assert client.get("/").text == SECRET
    now[0] = 60.0
    assert client.get("/").status_code == 401


def test_signing_out(client):
    sign_in(client)
    kept = dict(client.cookies)
    answer = client.get("/sign-out")
    assert (answer.status_code, answer.headers["location"]) == (303, "/sign-in")
    assert client.get("/", cookies=kept).status_code == 401


@pytest.mark.parametrize(
    "target",
    [
        "https://evil.example",
        "//evil.example",
        "/\\evil.example",
        "/\t/evil.example",
        "javascript:alert(1)",
        "/sign-out",
    ],
)
def test_the_sign_in_leads_nowhere_else(client, target):
    assert client.get("/sign-in", params={"next": target}).text.count('value="/"') == 1
    assert sign_in(client, next=target).headers["location"] == "/"


def test_markup_in_the_address_is_text(client):
    page = client.get("/sign-in", params={"next": '/"><script>alert(1)</script>'}).text
    assert "<script" not in page


def test_a_sign_in_of_megabytes(client):
    assert sign_in(client, "x" * 1_000_000).status_code == 413
    assert client.post("/sign-in", content=b"&".join([b"a=1"] * 100)).status_code == 401
    assert client.request("PUT", "/sign-in").status_code == 405


def test_another_site_cannot_speak_for_who_is_signed_in(client):
    sign_in(client)
    for origin in ("https://evil.example", "http://board.example:9999", "null"):
        assert client.get("/", headers={"origin": origin}).status_code == 403
        assert client.stream("/_stcore/stream", headers={"origin": origin}) is None
    assert client.get("/", headers={"origin": "http://board.example:8501"}).text == SECRET
    assert client.post("/sign-in", headers={"origin": "https://evil.example"}).status_code == 403


def test_without_a_token_only_names_of_this_machine_are_answered():
    """A page whose own name was turned to 127.0.0.1 must not read what a browser can reach."""
    client = client_of(None, host="localhost:8501")
    assert client.get("/").text == SECRET
    for host in ("evil.example", "evil.example:8501", "127.0.0.1.evil.example"):
        answer = client.get("/", headers={"host": host})
        assert answer.status_code == 421
        assert SECRET not in answer.text
        told = {"host": host, "origin": f"http://{host}"}
        assert client.stream("/_stcore/stream", headers=told) is None


def test_the_health_check_says_that_and_no_more(client):
    answer = client.get("/_stcore/health")
    assert (answer.status_code, answer.text) == (200, "ok")


def test_headers_that_keep_the_browser_at_home(client):
    for answer in (client.get("/sign-in"), client.get("/"), (sign_in(client), client.get("/"))[1]):
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"]
        assert "http:" not in policy
        assert "https:" not in policy
        assert " * " not in policy
        assert "frame-ancestors 'none'" in policy
    assert "default-src 'none'" in client.get("/sign-in").headers["content-security-policy"]
    assert client.get("/sign-in").headers["cache-control"] == "no-store"
