from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any, TypeVar

import httpx
import pytest
from django.db import OperationalError, connection, connections
from django.http import HttpResponse
from django.test import Client
from django.utils import timezone

from django_qstash_llm.qstash import Callback, verify
from django_qstash_llm.server import doorbell
from django_qstash_llm.server.delivery import Engine
from django_qstash_llm.server.models import LogEntry, Message

T = TypeVar("T")

TOKEN = "the-token-of-these-tests"
KEYS = ("sig_current-signing-key-of-these-tests", "sig_next-signing-key-of-these-tests")
PROVIDER = "https://provider.test/v1/chat/completions"
CALLBACK = "https://site.test/callback/1/"
FAILURE = "https://site.test/failure/1/"


class Wire:
    """All destinations there are: a function answers, and what came is kept."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.answer: Callable[[httpx.Request], httpx.Response] = lambda request: httpx.Response(
            200, json={"ok": True}
        )

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return self.answer(request)

    def to(self, url: str) -> list[httpx.Request]:
        return [request for request in self.requests if str(request.url) == url]

    def callbacks(self, url: str = CALLBACK) -> list[Callback]:
        return [Callback.from_json(request.content) for request in self.to(url)]

    def answers(self, *answers: httpx.Response | Exception, url: str = PROVIDER) -> None:
        """The provider gives these in turn, the last for ever; callbacks are taken with 200."""
        left = list(answers)

        def answer(request: httpx.Request) -> httpx.Response:
            if str(request.url) != url:
                return httpx.Response(200)
            given = left.pop(0) if len(left) > 1 else left[0]
            if isinstance(given, Exception):
                raise given
            return httpx.Response(given.status_code, headers=given.headers, content=given.content)

        self.answer = answer


class Clock:
    """Runs ahead of the site's, by as much as it was told to."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def __call__(self) -> datetime:
        return timezone.now() + self.ahead

    def advance(self, seconds: float) -> None:
        self.ahead += timedelta(seconds=seconds)


class Outage:
    """The database refuses this thread what the statement ``is_hit`` by, while it lasts."""

    def __init__(self) -> None:
        self.is_hit: Callable[[str], bool] = lambda statement: False
        self.was_met = threading.Event()

    def __call__(
        self, execute: Callable[..., Any], sql: str, params: Any, many: bool, context: Any
    ) -> Any:
        if self.is_hit(f"{sql} {params}"):
            self.was_met.set()
            raise OperationalError("the database is away")
        return execute(sql, params, many, context)

    def begin(self, is_hit: Callable[[str], bool]) -> None:
        self.is_hit = is_hit

    def end(self) -> None:
        self.is_hit = lambda statement: False


class Api:
    """The REST API through Django's test client, as somebody who knows the token."""

    def __init__(self, prefix: str = "/qstash") -> None:
        self.client = Client(raise_request_exception=True)
        self.prefix = prefix
        self.token = TOKEN

    def call(
        self,
        method: str,
        path: str,
        body: Any = b"",
        headers: dict[str, str] | None = None,
        **extra: Any,
    ) -> HttpResponse:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        sent |= headers or {}
        content_type = sent.pop("Content-Type", "application/json" if content else "")
        return self.client.generic(
            method, self.prefix + path, content, content_type, headers=sent, **extra
        )

    def get(self, path: str, **options: Any) -> HttpResponse:
        return self.call("GET", path, **options)

    def post(self, path: str, body: Any = b"", **options: Any) -> HttpResponse:
        return self.call("POST", path, body, **options)

    def delete(self, path: str, body: Any = b"", **options: Any) -> HttpResponse:
        return self.call("DELETE", path, body, **options)

    def publish(self, url: str = PROVIDER, body: Any = b"hello", **headers: str) -> HttpResponse:
        """Header names in Python: ``Upstash_Retries="0"``."""
        return self.post(f"/v2/publish/{url}", body, headers=with_dashes(headers))

    def enqueue(self, queue: str, url: str = PROVIDER, body: Any = b"", **headers: str) -> str:
        answer = self.post(f"/v2/enqueue/{queue}/{url}", body, headers=with_dashes(headers))
        assert answer.status_code == 200, answer.content
        return answer.json()["messageId"]

    def published(self, url: str = PROVIDER, body: Any = b"hello", **headers: str) -> str:
        answer = self.publish(url, body, **headers)
        assert answer.status_code == 200, answer.content
        return answer.json()["messageId"]


def at_once(count: int, work: Callable[[int], T]) -> list[T]:
    """Everybody begins at the same moment, each with a connection of their own."""
    start = threading.Barrier(count)
    results: list[Any] = [None] * count

    def run(number: int) -> None:
        try:
            start.wait(10)
            results[number] = work(number)
        except Exception as error:  # told to the test below
            results[number] = error
        finally:
            connections.close_all()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    # Nobody is to be rung: eager, that would deliver.
    with doorbell.listening(threading.Event()):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def with_dashes(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


def states(message_id: str) -> list[str]:
    """What the log says became of a message, in order."""
    entries = LogEntry.objects.filter(message__message_id=message_id).order_by("pk")
    return list(entries.values_list("state", flat=True))


def state(message_id: str) -> str:
    return Message.objects.get(message_id=message_id).state


def claims_of(request: httpx.Request, now: float) -> Any:
    """What the request's signature says, after it was believed."""
    return verify(
        request.headers["Upstash-Signature"],
        request.content,
        url=str(request.url),
        keys=KEYS,
        now=now,
    )


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture(autouse=True)
def qstash_server(settings: Any, wire: Wire) -> dict[str, Any]:
    """The server's settings; a test changes what it is about and assigns them again."""
    settings.QSTASH_SERVER = {
        "TOKEN": TOKEN,
        "CURRENT_SIGNING_KEY": KEYS[0],
        "NEXT_SIGNING_KEY": KEYS[1],
        "TRANSPORT": httpx.MockTransport(wire),
    }
    return settings.QSTASH_SERVER


@pytest.fixture
def configure(settings: Any, qstash_server: dict[str, Any]) -> Callable[..., None]:
    def change(**values: Any) -> None:
        settings.QSTASH_SERVER = settings.QSTASH_SERVER | values

    return change


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine(clock: Clock) -> Iterator[Engine]:
    engine = Engine(clock=clock)
    yield engine
    engine.close()


@pytest.fixture
def outage() -> Iterator[Outage]:
    outage = Outage()
    with connection.execute_wrapper(outage):
        yield outage


@pytest.fixture
def api(db: None) -> Api:
    return Api()
