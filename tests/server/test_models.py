"""What must hold when several do the same at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from io import StringIO
from typing import Any

import pytest
from django.core.management import call_command
from django.utils import timezone

from django_qstash_llm.qstash import Message as WireMessage
from django_qstash_llm.server import doorbell
from django_qstash_llm.server.models import (
    Admitted,
    DeadLetter,
    Message,
    Outcome,
    Queue,
    SigningKeys,
)

from .conftest import PROVIDER, Api, at_once


def accept(*messages: WireMessage) -> Any:
    admitted = [Admitted(message) for message in messages]
    return Message.objects.accept(admitted, account="", caller_ip="", now=timezone.now())


def claim(engine: str, limit: int) -> list[str]:
    claimed = Message.objects.claim(engine=engine, limit=limit, now=timezone.now(), lease=60)
    return [message.message_id for message in claimed]


def test_the_migrations_are_those_of_the_models(db: None) -> None:
    call_command("makemigrations", "qstash_server", check=True, dry_run=True, stdout=StringIO())


@pytest.mark.django_db(transaction=True)
def test_the_same_id_at_once_makes_one_message() -> None:
    answers = at_once(20, lambda _: accept(WireMessage(PROVIDER, deduplication_id="one"))[0])
    assert len({answer.message_id for answer in answers}) == 1
    assert sum(not answer.is_duplicate for answer in answers) == 1
    assert Message.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_batches_with_the_same_ids_in_another_order_do_not_lock_each_other_out() -> None:
    messages = [WireMessage(PROVIDER, deduplication_id=f"d{n}", queue=f"q{n}") for n in range(20)]

    def one(number: int) -> Any:
        return accept(*(messages if number % 2 else messages[::-1]))

    at_once(8, one)
    assert Message.objects.count() == 20
    assert Queue.objects.count() == 20


@pytest.mark.django_db(transaction=True)
def test_engines_at_once_never_claim_the_same_message() -> None:
    with doorbell.listening(threading.Event()):
        accept(*[WireMessage(PROVIDER)] * 60)
    claimed = at_once(6, lambda number: claim(f"e:{number}:1", 15))
    everything = [message_id for ids in claimed for message_id in ids]
    assert len(everything) == len(set(everything))
    while more := claim("last:1:1", 100):
        everything += more
    assert len(set(everything)) == 60


@pytest.mark.django_db(transaction=True)
def test_engines_at_once_never_begin_two_of_a_queue() -> None:
    with doorbell.listening(threading.Event()):
        accept(*[WireMessage(PROVIDER, queue="q")] * 10)
    claimed = at_once(8, lambda number: claim(f"e:{number}:1", 5))
    assert sum(map(len, claimed)) == 1


@pytest.mark.django_db(transaction=True)
def test_a_dead_letter_that_is_retried_twice_at_once_is_published_once() -> None:
    with doorbell.listening(threading.Event()):
        accept(WireMessage(PROVIDER))
        Message.objects.update(retries=0)
        [message] = Message.objects.claim(engine="e:1:1", limit=1, now=timezone.now())
        message.record(Outcome(status=500), now=timezone.now())

    def retry(_: int) -> str:
        letter = DeadLetter.objects.with_messages().first()
        if letter is None:
            return "gone"
        try:
            return letter.retry({}, now=timezone.now()).message_id
        except Exception as error:
            return type(error).__name__

    answers = at_once(6, retry)
    assert len([answer for answer in answers if answer.startswith("msg_")]) == 1
    assert Message.objects.count() == 2


@pytest.mark.django_db(transaction=True)
def test_keys_are_made_once_however_many_ask(configure: Callable[..., None]) -> None:
    configure(CURRENT_SIGNING_KEY="", NEXT_SIGNING_KEY="")
    keys = at_once(8, lambda _: SigningKeys.objects.current())
    assert len({key.current for key in keys}) == 1


@pytest.mark.django_db(transaction=True)
def test_cancelling_and_delivering_at_once_ends_in_one_of_both(api: Api) -> None:
    with doorbell.listening(threading.Event()):
        ids = [answer.message_id for answer in accept(*[WireMessage(PROVIDER)] * 30)]

    def work(number: int) -> None:
        if number % 2:
            Message.objects.filter(message_id__in=ids).cancel(now=timezone.now())
            return
        for message in Message.objects.claim(engine="e:1:1", limit=30, now=timezone.now()):
            message.record(Outcome(status=200), now=timezone.now())

    at_once(4, work)
    ended = Message.objects.filter(state__in=["DELIVERED", "CANCELED"], due_at__isnull=True)
    assert ended.count() == 30
