from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from typing import Any

from django.conf import settings

from django_qstash_llm.models import LLMRequest
from django_qstash_llm.triggers import Trigger, register

from .. import ledgers
from .models import Effect, Note


class Stumble(Exception):
    """The handler fails the first time, after it has done its work."""


@cache
def ledger(pid: int) -> ledgers.Ledger:
    return ledgers.Ledger(settings.FAULTS["folder"], "H")


@register(Note)
class Answer(Trigger):
    answer_field = "answer"

    def condition(self, note: Note, *, created: bool) -> bool:
        return created and note.asks

    def messages(self, note: Note) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"Note {note.number}: {note.text}"}]

    def options(self, note: Note) -> Mapping[str, Any]:
        return delivery(note)

    def completed(self, note: Note, llm_request: LLMRequest) -> None:
        super().completed(note, llm_request)
        self.leave(note, llm_request, "completed")

    def failed(self, note: Note, llm_request: LLMRequest) -> None:
        self.leave(note, llm_request, "failed")

    def leave(self, note: Note, llm_request: LLMRequest, kind: str) -> None:
        uuid = str(llm_request.uuid)
        Effect.objects.create(uuid=uuid, kind=kind, note=note)
        ledger(os.getpid()).write(uuid=uuid, kind=kind, pid=os.getpid())
        if "stumble" in note.text:
            told = [h for h in ledgers.read(settings.FAULTS["folder"], "H") if h["uuid"] == uuid]
            if len(told) == 1:
                raise Stumble(note.text)


def delivery(note: Note) -> dict[str, Any]:
    """How QStash is to deliver it: with waits that suit a test."""
    retries = 1 if "doomed" in note.text else 5
    return {"retries": retries, "retry_delay": "200 * (1 + retried)", "timeout": 3}
