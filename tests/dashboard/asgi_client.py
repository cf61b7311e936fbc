"""A client that calls an ASGI application directly and sends paths exactly as they are written."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from http.cookies import SimpleCookie
from urllib.parse import unquote, urlencode


@dataclass
class Answer:
    status_code: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    text: str = ""


class Client:
    def __init__(self, app, host="board.example:8501", scheme="http", peer="192.0.2.7"):
        self.app, self.host, self.scheme, self.peer = app, host, scheme, peer
        self.cookies = {}

    def get(self, path, **more):
        return self.request("GET", path, **more)

    def post(self, path, data=None, content=b"", **more):
        body = urlencode(data).encode() if data is not None else content
        return self.request("POST", path, content=body, **more)

    def request(self, method, path, *, headers=(), content=b"", params=None, cookies=None):
        answer = Answer()

        async def send(message):
            if message["type"] == "http.response.start":
                answer.status_code = message["status"]
                answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            elif message["type"] == "http.response.body":
                answer.text += message.get("body", b"").decode()

        scope = {**self._scope("http", path, headers, params, cookies), "method": method}
        asyncio.run(self.app(scope, _receiver({"type": "http.request", "body": content}), send))
        for name, morsel in SimpleCookie(answer.headers.get("set-cookie", "")).items():
            self.cookies[name] = morsel.value
        return answer

    def stream(self, path, headers=()):
        """The texts that a WebSocket brings; None where it is refused."""
        sent = []

        async def send(message):
            sent.append(message)

        scope = self._scope("websocket", path, headers, None, None)
        asyncio.run(self.app(scope, _receiver({"type": "websocket.connect"}), send))
        if sent[0]["type"] != "websocket.accept":
            return None
        return [message["text"] for message in sent if message["type"] == "websocket.send"]

    def _scope(self, kind, path, headers, params, cookies):
        path, _, query = path.partition("?")
        cookies = self.cookies if cookies is None else cookies
        told = {"host": self.host, **dict(headers)}
        if cookies:
            told["cookie"] = "; ".join(f"{name}={value}" for name, value in cookies.items())
        scheme = self.scheme if kind == "http" else self.scheme.replace("http", "ws")
        return {
            "type": kind,
            "asgi": {"version": "3.0"},
            "scheme": scheme,
            "path": unquote(path),
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": (urlencode(params) if params else query).encode(),
            "headers": [(name.lower().encode(), value.encode()) for name, value in told.items()],
            "client": (self.peer, 50000),
            "server": ("127.0.0.1", 8501),
        }


def _receiver(first):
    messages = [first]

    async def receive():
        return messages.pop(0) if messages else {"type": f"{first['type'].partition('.')[0]}.disconnect"}

    return receive
