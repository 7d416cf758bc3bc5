"""The wire of the suite: one httpx transport, on which a function answers for each host.

``testserver`` is our own site, through its real WSGI handler. Whatever nobody answers for is
refused like a closed port, so no test can reach the network.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
from django.core.wsgi import get_wsgi_application

Handler = Callable[[httpx.Request], httpx.Response]


class Wire(httpx.BaseTransport):
    def __init__(self) -> None:
        self.hosts: dict[str, Handler] = {}
        self.requests: list[httpx.Request] = []
        self._site: httpx.WSGITransport | None = None

    def clear(self) -> None:
        self.hosts.clear()
        self.requests.clear()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        handler = self.hosts.get(request.url.host)
        if handler is not None:
            return handler(request)
        if request.url.host == "testserver":
            return self.site.handle_request(request)
        raise httpx.ConnectError("nobody answers for this host", request=request)

    @property
    def site(self) -> httpx.WSGITransport:
        if self._site is None:
            self._site = httpx.WSGITransport(get_wsgi_application())
        return self._site

    def to(self, host: str) -> list[httpx.Request]:
        return [request for request in self.requests if request.url.host == host]


wire = Wire()


class FakeQStash:
    """Takes messages as QStash does, remembers them, and delivers none.

    ``refuse`` maps a destination or deduplication id to the error its item gets.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.ids: dict[str, str] = {}
        self.refuse: dict[str, str] = {}
        self.calls: list[str] = []
        self.answer: Handler | None = None
        self.cancelled: list[str] = []
        self.logs: list[dict[str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path.removeprefix("/qstash")
        self.calls.append(f"{request.method} {path}")
        if self.answer is not None:
            return self.answer(request)
        return self.take(request, path)

    def take(self, request: httpx.Request, path: str) -> httpx.Response:
        if path == "/v2/batch":
            return httpx.Response(
                200, json=[self.accept(item) for item in json.loads(request.content)]
            )
        if path.startswith(("/v2/publish/", "/v2/enqueue/")):
            headers = {name.title(): value for name, value in request.headers.items()}
            answer = self.accept(
                {"path": path, "headers": headers, "body": request.content.decode()}
            )
            return httpx.Response(400 if "error" in answer else 200, json=answer)
        if path == "/v2/messages" and request.url.params.get("label"):
            self.cancelled.append(request.url.params["label"])
            return httpx.Response(202, json={"cancelled": 1})
        if path.startswith("/v2/messages") and request.method == "DELETE":
            ids = (
                json.loads(request.content)["messageIds"]
                if request.content
                else [path.split("/")[-1]]
            )
            self.cancelled += ids
            return httpx.Response(202, json={"cancelled": len(ids)})
        if path == "/v2/events":
            label = request.url.params.get("label")
            return httpx.Response(
                200, json={"events": [e for e in self.logs if label in e["labels"]]}
            )
        return httpx.Response(404, json={"error": "not found"})

    def accept(self, item: dict[str, Any]) -> dict[str, Any]:
        deduplication_id = item["headers"]["Upstash-Deduplication-Id"]
        if deduplication_id in self.refuse:
            return {"error": self.refuse[deduplication_id]}
        if deduplication_id in self.ids:
            return {"messageId": self.ids[deduplication_id], "deduplicated": True}
        self.messages.append(item)
        self.ids[deduplication_id] = f"msg_{len(self.messages)}"
        return {"messageId": self.ids[deduplication_id]}
