"""The wire of the suite: one httpx transport, on which a function answers for each host.

``testserver`` is our own site, through its real WSGI handler. Whatever nobody answers for is
refused like a closed port, so no test can reach the network.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
from django.core.wsgi import get_wsgi_application

Handler = Callable[[httpx.Request], httpx.Response]


class Wire(httpx.BaseTransport, httpx.AsyncBaseTransport):
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

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return self.handle_request(request)

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

    ``refuse`` maps a destination or deduplication id to the error its item gets. What QStash would
    know of them later is for the test to say, in the shapes of the wire: ``logs`` (newest first),
    ``dead_letters`` (oldest first), and ``kept``, the messages that can still be read.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.ids: dict[str, str] = {}
        self.refuse: dict[str, str] = {}
        self.calls: list[str] = []
        self.answer: Handler | None = None
        self.cancelled: list[str] = []
        self.logs: list[dict[str, Any]] = []
        self.dead_letters: list[dict[str, Any]] = []
        self.retried: list[str] = []
        self.kept: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()

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
        if path.startswith("/v2/messages/"):
            message = self.kept.get(path.split("/")[-1])
            return httpx.Response(200, json=message) if message else self.not_found()
        if path == "/v2/events":
            return self.page("events", self.logs, request)
        if path.startswith("/v2/dlq"):
            return self.tell_of_dead_letters(request, path)
        return self.not_found()

    def not_found(self) -> httpx.Response:
        return httpx.Response(404, json={"error": "not found"})

    def tell_of_dead_letters(self, request: httpx.Request, path: str) -> httpx.Response:
        if path == "/v2/dlq":
            return self.page("messages", self.dead_letters, request)
        dlq_id = path.split("/")[-1]
        with self._lock:
            left = [letter for letter in self.dead_letters if letter["dlqId"] != dlq_id]
            if len(left) == len(self.dead_letters):
                return self.not_found()
            self.dead_letters = left
        if request.method == "DELETE":
            return httpx.Response(200, json={"deleted": 1})
        self.retried.append(dlq_id)
        return httpx.Response(201, json={"messageId": f"msg_again_{len(self.retried)}"})

    def page(
        self, key: str, listing: list[dict[str, Any]], request: httpx.Request
    ) -> httpx.Response:
        """Several values of a filter mean "or", several filters "and", as the documentation says."""
        filters = request.url.params
        unknown = set(filters) - {"label", "url", "messageId", "cursor", "count"}
        assert not unknown, unknown
        found = [
            each
            for each in listing
            if (
                "label" not in filters
                or set(filters.get_list("label")) & set(each.get("labels", ()))
            )
            and ("url" not in filters or each["url"] in filters.get_list("url"))
            and ("messageId" not in filters or each["messageId"] in filters.get_list("messageId"))
        ]
        begin, count = int(filters.get("cursor", 0)), int(filters.get("count", 100))
        end = begin + count
        cursor = {"cursor": str(end)} if end < len(found) else {}
        # Written here: httpx would not escape what is no UTF-8.
        return httpx.Response(200, content=json.dumps({key: found[begin:end]} | cursor))

    def accept(self, item: dict[str, Any]) -> dict[str, Any]:
        deduplication_id = item["headers"]["Upstash-Deduplication-Id"]
        if deduplication_id in self.refuse:
            return {"error": self.refuse[deduplication_id]}
        if deduplication_id in self.ids:
            return {"messageId": self.ids[deduplication_id], "deduplicated": True}
        self.messages.append(item)
        self.ids[deduplication_id] = f"msg_{len(self.messages)}"
        return {"messageId": self.ids[deduplication_id]}
