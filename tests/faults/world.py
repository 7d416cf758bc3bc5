"""The whole site in one process, for a scenario: the real views, server, outbox and triggers, and
between them a way on which a scenario says what goes wrong. Time passes by making rows older."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
from celery import current_app
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.db import connection, connections
from django.db.models import DateTimeField, F
from django.utils import timezone

from django_qstash_llm import tasks
from django_qstash_llm.models import CallbackResponse, Circuit, LLMRequest
from django_qstash_llm.models.outbox import Outbox
from django_qstash_llm.qstash import sign
from django_qstash_llm.server.delivery import Engine
from django_qstash_llm.server.models import Message

from . import provider
from .client import Creator
from .ledgers import Ledger

FRONT = "http://front.test"
PROVIDER = "https://provider.test"
KEY = settings.QSTASH_CURRENT_SIGNING_KEY


class Way(httpx.BaseTransport):
    """To the site and to the provider; what goes over it goes into the ledgers."""

    def __init__(self) -> None:
        folder = settings.FAULTS["folder"]
        self.calls, self.callbacks = Ledger(folder, "P"), Ledger(folder, "K")
        self.came: list[httpx.Request] = []
        """The callbacks that came."""
        self.calls_so_far = 0
        self.straighten()

    def straighten(self) -> None:
        """Nothing goes wrong from here on."""
        self.is_qstash_away = self.is_site_away = False
        self.lost_acks = 0
        self.is_provider_angry = False
        self.damage: Callable[[httpx.Request], httpx.Request] | None = None
        self.dies_after_answering = False

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.read()
        if request.url.host == "provider.test":
            return self.ask_provider(request)
        if request.url.path.startswith("/llm/callback/"):
            if self.damage is not None:
                request = self.damage(request)
            self.came.append(request)
            if self.is_site_away:
                raise httpx.ConnectError("nobody is there", request=request)
            return self.call_back(request)
        return self.submit(request)

    def submit(self, request: httpx.Request) -> httpx.Response:
        if self.is_qstash_away:
            raise httpx.ConnectError("nobody is there", request=request)
        answer = self.site(request)
        if self.lost_acks:
            self.lost_acks -= 1
            raise httpx.ReadError("the connection was lost", request=request)
        return answer

    def ask_provider(self, request: httpx.Request) -> httpx.Response:
        prompt = json.loads(request.content)["messages"][-1]["content"]
        note = int(provider.NOTE.search(prompt)[1])
        self.calls_so_far += 1
        call = self.calls_so_far
        message = request.headers["Upstash-Message-Id"]
        attempt = int(request.headers.get("Upstash-Retried", 0))
        self.calls.write(call=call, note=note, message=message, attempt=attempt)
        if self.is_provider_angry:
            self.calls.write(call=call, status=401)
            message = f"{request.headers['Authorization']} is not welcome"
            return httpx.Response(401, json={"error": {"message": message}})
        self.calls.write(call=call, status=200)
        return httpx.Response(200, json=provider.completion(call, note))

    def call_back(
        self, request: httpx.Request, *, is_genuine: bool = True, what: str = ""
    ) -> httpx.Response:
        """Deliver it, and write down what our view answered."""
        if self.dies_after_answering:
            return self.call_back_and_die(request)
        answer = self.site(request)
        self.note(request, answer.status_code, is_genuine, what)
        return answer

    def note(self, request: httpx.Request, status: int, is_genuine: bool, what: str) -> None:
        told = json.loads(request.content)
        self.callbacks.write(
            uuid=request.url.path.split("/")[3],
            source=told["sourceMessageId"],
            retried=told["retried"],
            kind="failure_callback" if told.get("dlqId") else "callback",
            status=status,
            is_genuine=is_genuine,
            what=what,
        )

    def call_back_and_die(self, request: httpx.Request) -> httpx.Response:
        """In a web process that is killed as soon as its answer is out."""
        reading, writing = os.pipe()
        if os.fork() == 0:
            # Its own connection: this one is its parent's.
            connections["default"].connection = None
            status = self.site(request).status_code
            self.note(request, status, True, "")
            os.write(writing, str(status).encode())
            os.kill(os.getpid(), signal.SIGKILL)
        os.close(writing)
        with open(reading, "rb") as answer:
            status = int(answer.read())
        os.wait()
        return httpx.Response(status)

    def site(self, request: httpx.Request) -> httpx.Response:
        transport = httpx.WSGITransport(get_wsgi_application())
        copy = httpx.Request(
            request.method, request.url, headers=request.headers, content=request.content
        )
        answer = transport.handle_request(copy)
        content = answer.read()
        # Anew: whoever asked wants to read it too.
        return httpx.Response(answer.status_code, headers=answer.headers, content=content)


way = Way()


class World:
    """What a scenario does. Bells ring unheard: only the sweep and the scenario do anything."""

    def __init__(self, folder: Path) -> None:
        self.way = way
        self.creator = Creator()
        self.notes = 0

    def create(self, count: int = 1, text: str = "what is to be done?") -> list[LLMRequest]:
        made = []
        for _ in range(count):
            self.notes += 1
            made.append(LLMRequest.objects.about(self.creator.create(self.notes, text)).get())
        return made

    def submit(self) -> None:
        Outbox().submit()

    def deliver(self) -> None:
        Engine().deliver_due()

    def let_pass(self, seconds: float) -> None:
        """Every moment that a row waits for, and every one that it remembers, is so much nearer or
        farther away."""
        for model in (LLMRequest, CallbackResponse, Circuit, Message):
            moments = {f.name for f in model._meta.concrete_fields if isinstance(f, DateTimeField)}
            past = {name: F(name) - timedelta(seconds=seconds) for name in moments}
            model.objects.update(**past)

    def settle(self) -> None:
        """All goes well for five minutes, and nobody hears a bell but the sweep's."""
        self.way.straighten()
        for _ in range(5):
            self.let_pass(60)
            self.sweep()
            self.deliver()
        self.sweep()

    def sweep(self) -> None:
        current_app.conf.task_always_eager = True
        try:
            tasks.sweep()
        finally:
            current_app.conf.task_always_eager = False

    # --- callbacks ---

    def repeat(self) -> None:
        """The last callback once more."""
        self.way.call_back(self.way.came[-1])

    def bring(self, *, body: bytes, signature: str, is_genuine: bool, what: str) -> None:
        """A callback for whom the last one was for."""
        last = self.way.came[-1]
        headers = dict(last.headers) | {
            "Upstash-Signature": signature,
            "Content-Length": str(len(body)),
        }
        request = httpx.Request("POST", last.url, headers=headers, content=body)
        self.way.call_back(request, is_genuine=is_genuine, what=what)


def signed(request: httpx.Request, body: bytes, *, ago: float = 0.0) -> str:
    return sign(body, url=str(request.url), key=KEY, now=time.time() - ago)


def with_hole(request: httpx.Request) -> httpx.Request:
    """The callback with four characters of its base64 spoilt, signed like that: three letters of
    the answer are lost to whoever overlooks it."""
    envelope = json.loads(request.content)
    answer = base64.b64decode(envelope["body"])
    begin = -(-answer.index(b"NOT pay") // 3) * 4
    text = envelope["body"]
    envelope["body"] = f"{text[:begin]}!!!!{text[begin + 4 :]}"
    body = json.dumps(envelope).encode()
    headers = dict(request.headers) | {
        "Upstash-Signature": signed(request, body),
        "Content-Length": str(len(body)),
    }
    return httpx.Request("POST", request.url, headers=headers, content=body)


def as_another(name: str, work: Callable[[], Any]) -> None:
    """In a thread whose connection calls itself ``name``, as another process's would."""

    def run() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT set_config('application_name', %s, false)", [name])
        try:
            work()
        finally:
            connections.close_all()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def later(seconds: float) -> Callable[[], Any]:
    return lambda: timezone.now() + timedelta(seconds=seconds)


IS_RECEIPT = re.compile(r"INSERT INTO .*callbackresponse", re.DOTALL)
