"""The site's own code, that asks: saves notes, and writes down each commit that succeeded.

``python -m tests.faults.run client FIRST COUNT SECONDS``: numbers from FIRST on, spread over so many
seconds. One in twenty goes round the trigger and every bell, by ``bulk_create``; one in fifty is
about what the provider will never answer. A creation that raised is written down as that.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from django.conf import settings
from django.db import close_old_connections, transaction

from django_qstash_llm.models import LLMRequest

from .ledgers import Ledger
from .notes.llm import delivery
from .notes.models import Note

THREADS = 4


class Creator:
    def __init__(self) -> None:
        self.ledger = Ledger(settings.FAULTS["folder"], "C")

    def create(self, number: int, text: str, *, in_bulk: bool = False) -> Note | None:
        """One note and its request, in a transaction. None where that was refused."""
        note = Note(number=number, text=text)
        asks = self.ask_in_bulk if in_bulk else self.save
        began = time.monotonic()
        try:
            with transaction.atomic():
                # First of what follows the commit: the bell comes after it.
                transaction.on_commit(lambda: self.committed(note, began))
                asks(note)
        except Exception as error:
            self.ledger.write(note=number, refused=repr(error))
            return None
        self.ledger.write(note=number, took=round(time.monotonic() - began, 4))
        return note

    def committed(self, note: Note, began: float) -> None:
        uuid = LLMRequest.objects.about(note).values_list("uuid", flat=True).get()
        self.ledger.write(uuid=uuid, note=note.number, committed=time.monotonic() - began)

    def save(self, note: Note) -> None:
        note.save()

    def ask_in_bulk(self, note: Note) -> None:
        note.asks = False
        note.save()
        messages = [{"role": "user", "content": f"Note {note.number}: {note.text}"}]
        trigger = "tests.faults.notes.llm.Answer"
        row = LLMRequest.compose(messages=messages, about=note, trigger=trigger, **delivery(note))
        LLMRequest.objects.bulk_create([row])


def main(first: str, count: str, seconds: str) -> None:
    creator = Creator()
    begin, pause = time.monotonic(), float(seconds) / int(count)

    def create(index: int) -> None:
        time.sleep(max(0.0, begin + pause * index - time.monotonic()))
        close_old_connections()
        number = int(first) + index
        text = "doomed" if number % 50 == 7 else "what is to be done?"
        creator.create(number, text, in_bulk=number % 20 == 3)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(create, range(int(count))))
