"""One of a crowd: a process that submits and answers requests while others do the same.

    python -m tests.models.crowd PART OF

Takes part in submitting whatever is pending, and plays QStash and the provider for each request whose key
falls to it. Prints, when all of these have ended, what the provider would write on its bill.
"""

from __future__ import annotations

import json
import random
import sys
from decimal import Decimal
from typing import Any

import django

INPUT_PRICE, OUTPUT_PRICE = Decimal(1), Decimal(10)
"""USD per million tokens."""
PRICES = {"openai/gpt-5.4-mini": {"input": str(INPUT_PRICE), "output": str(OUTPUT_PRICE)}}
MOST_INPUT, MOST_OUTPUT = 5, 100
"""Tokens of an answer: no more than was reserved."""


class Provider:
    """Answers, and counts what it charges."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.bill = Decimal(0)

    def answer(self, text: str | None = "Forty-two.") -> bytes:
        used = self.random.randint(1, MOST_INPUT), self.random.randint(1, MOST_OUTPUT)
        self.bill += (used[0] * INPUT_PRICE + used[1] * OUTPUT_PRICE) / 1_000_000
        message = {"role": "assistant", "content": text}
        choices = [] if text is None else [{"finish_reason": "stop", "message": message}]
        usage = {"prompt_tokens": used[0], "completion_tokens": used[1]}
        return json.dumps({"id": "c", "choices": choices, "usage": usage}).encode()


def play(row: Any, provider: Provider) -> None:
    """One of the ways a request may end, its callbacks late, doubled and out of order."""
    from django.utils import timezone

    from django_qstash_llm.exceptions import IllegalState
    from django_qstash_llm.models import CallbackResponse
    from django_qstash_llm.qstash import Callback

    def tell(body: bytes = b"", status: int = 200, retried: int = 0, message: str = "") -> None:
        callback = Callback(
            status=status,
            body=body,
            retried=retried,
            max_retries=1,
            source_message_id=message or f"source_{row.pk}",
        )
        CallbackResponse.objects.receive(callback, uuid=row.uuid, now=timezone.now())

    def cancel() -> None:
        try:
            row.cancel()
        except IllegalState:
            row.refresh_from_db()

    match provider.random.randrange(10):
        case 0 | 1 | 2:
            tell(provider.answer())
        case 3:  # told three times
            answer = provider.answer()
            for _ in range(3):
                tell(answer)
        case 4:  # failed, and then answered
            tell(status=500)
            tell(provider.answer(), retried=1)
        case 5:  # given up
            tell(status=500)
            tell(status=503, retried=1)
        case 6:
            cancel()
        case 7:  # cancelled while the provider was at it
            cancel()
            tell(provider.answer())
        case 8:  # asked twice, and paid for twice
            tell(provider.answer(), message=f"other_{row.pk}")
            tell(provider.answer())
        case _:  # nothing came of it, and it was paid for
            tell(provider.answer(text=None), retried=1)


def main(part: int, of: int) -> None:
    django.setup()
    from django.conf import settings
    from django.db.models import F

    from django_qstash_llm.models import LLMRequest
    from django_qstash_llm.models.outbox import Outbox
    from django_qstash_llm.models.settlement import settle
    from tests.wire import FakeQStash, wire

    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PRICES": PRICES}
    wire.hosts["testserver"] = qstash = FakeQStash()
    provider, outbox = Provider(part), Outbox()
    mine = LLMRequest.objects.annotate(part=F("pk") % of).filter(part=part)
    while mine.unfinished().exists():
        outbox.submit(limit=100)
        for row in mine.submitted().order_by("pk"):
            play(row, provider)
        if part % 4 == 0:
            settle()  # some read what was spent meanwhile
    print(json.dumps({"bill": str(provider.bill), "sent": len(qstash.messages)}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
