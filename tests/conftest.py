from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from django.conf import settings
from django.contrib.contenttypes.models import ContentType
from django.db.models import Model
from django.test import Client
from django.utils import timezone

from django_qstash_llm.completions import Usage
from django_qstash_llm.models import LedgerEntry, LLMRequest
from django_qstash_llm.models import callback as receipts
from django_qstash_llm.models.request import State
from django_qstash_llm.pricing import Cost
from django_qstash_llm.qstash import Callback, sign

from .wire import FakeQStash, Wire
from .wire import wire as the_wire

# Other people's clients, from other registries: only when they are asked for (``tox -e referees``).
collect_ignore = [] if os.environ.get("TEST_REFEREES") else ["referees"]

ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "gpt-5.4-mini-2026-03-01",
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "Forty-two."},
        }
    ],
    "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12},
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "last: asks about the tests before it")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)


@pytest.fixture(autouse=True)
def nothing_answered() -> None:
    """As in a process that begins: nobody has answered it yet, so nothing is supposed."""
    receipts.forget_who_answered()


@pytest.fixture
def wire() -> Iterator[Wire]:
    the_wire.clear()
    yield the_wire
    the_wire.clear()


@pytest.fixture
def qstash(wire: Wire) -> FakeQStash:
    """A QStash that takes everything and delivers nothing."""
    wire.hosts["testserver"] = fake = FakeQStash()
    return fake


def enter_costs() -> None:
    """Have the ledger say what rows do that were made as they are, and which nobody answered."""
    told = LedgerEntry.objects.values("uuid")
    for row in LLMRequest.objects.exclude(uuid__in=told).order_by("pk"):
        if row.cost is None and row.state != State.COMPLETED:
            continue
        entry = LedgerEntry.of_answer(
            row,
            answer="chat",
            usage=Usage(input_tokens=row.input_tokens, output_tokens=row.output_tokens),
            cost=None if row.cost is None else Cost(row.cost, row.cost_source or "setting"),
            at=row.finished_at or timezone.now(),
            is_useful=row.state == State.COMPLETED,
        )
        LedgerEntry.objects.correct(entry, now=entry.at)


@pytest.fixture
def post_callback(client: Client) -> Callable[..., Any]:
    """POSTs to the callback view what QStash would: a signed envelope."""

    def post(
        llm_request: LLMRequest | None,
        callback: Callback | bytes,
        *,
        url: str = "",
        key: str = settings.QSTASH_CURRENT_SIGNING_KEY,
        signature: str | None = None,
        **extra: Any,
    ) -> Any:
        url = url or f"http://testserver/llm/callback/{llm_request.uuid}/"
        body = callback if isinstance(callback, bytes) else callback.to_json()
        if signature is None:
            signature = sign(body, url=url, key=key, now=timezone.now().timestamp())
        # generic: the bytes as they are, whatever charset the content type claims.
        return client.generic(
            "POST",
            httpx.URL(url).path,
            body,
            content_type=extra.pop("content_type", "application/json"),
            headers={"Upstash-Signature": signature, **extra.pop("headers", {})},
            **extra,
        )

    return post


class OursIntoTheSecond:
    """A database router, as a site has one that keeps our rows apart from its own."""

    def db_for_read(self, model: type[Model], **hints: Any) -> str | None:
        return "second" if model._meta.app_label == "django_qstash_llm" else None

    db_for_write = db_for_read

    def allow_relation(self, first: Model, other: Model, **hints: Any) -> bool:
        return True


@pytest.fixture
def second_database(transactional_db: None, settings: Any) -> str:
    """Where our rows are while the site's own are in the default one. Needs a test that is marked
    ``django_db(databases=["default", "second"], transaction=True)``."""
    settings.DATABASE_ROUTERS = [OursIntoTheSecond()]
    # As they are on a site whose two databases have been migrated alike.
    ContentType.objects.using("second").all().delete()
    ContentType.objects.using("second").bulk_create(ContentType.objects.using("default"))
    return "second"
