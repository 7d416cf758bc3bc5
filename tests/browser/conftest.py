from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx
import pytest
from django.contrib.auth.models import User
from django.test import Client

from django_qstash_llm.models import Conversation

from ..openai.conftest import asgi, asgi_site, site, wsgi, wsgi_site

__all__ = ["asgi", "asgi_site", "site", "wsgi", "wsgi_site"]

EVENTS = {"Accept": "text/event-stream"}


class Reader(NamedTuple):
    """Somebody who is logged in at a site, and the conversation of the page there."""

    http: httpx.Client
    conversation: Conversation
    token: str

    @property
    def path(self) -> str:
        return f"/conversations/{self.conversation.uuid}/"

    @contextmanager
    def say(self, said: str, **fields: str) -> Iterator[Iterator[tuple[str, Any]]]:
        """The events of the answer; a heartbeat has no name. To go is to leave."""
        body = {"said": said, "csrfmiddlewaretoken": self.token, **fields}
        with self.http.stream("POST", self.path, data=body, headers=EVENTS) as response:
            assert response.status_code == 200, response.read()
            yield events(response)


def events(response: httpx.Response) -> Iterator[tuple[str, Any]]:
    name = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield name, json.loads(line[6:])
        elif line == ":":
            yield "", None


@pytest.fixture
def cookie(transactional_db: None) -> str:
    client = Client()
    client.force_login(User.objects.create(username="ada"))
    return client.cookies["sessionid"].value


@contextmanager
def reading(site: str, cookie: str) -> Iterator[Reader]:
    with httpx.Client(base_url=site, cookies={"sessionid": cookie}, trust_env=False) as http:
        page = http.get("/talk/").raise_for_status().text
        token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', page)
        assert token
        yield Reader(http, Conversation.objects.get(), token[1])


@pytest.fixture
def reader(site: str, cookie: str) -> Iterator[Reader]:
    with reading(site, cookie) as reader:
        yield reader
