from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any
from uuid import UUID

from django.core.management.base import BaseCommand, CommandError
from django.db import router
from django.db.models import Q
from django.utils import timezone

from ...exceptions import ConfigurationError, IllegalState
from ...models import CallbackResponse, LLMRequest
from ...models.batch import standing
from ...models.replay import (
    MISREAD,
    QUARANTINED,
    UNREAD,
    read_again,
    read_anew,
    would_change,
)
from ...models.request import LLMRequestQuerySet
from ...qstash import QStashError

_AGAIN = ("quarantined", "unread", "failed")
_ANEW = ("completed", "unpriced")


@dataclass(frozen=True)
class Item:
    """What became of one receipt, or of one dead letter."""

    uuid: str
    """The request's."""
    what: str
    """What was read or moved: a kind of receipt with its key, or a dead letter's id."""
    outcome: str
    """``changed``, ``unchanged``, ``unreadable``, ``retried``, ``dropped``, ``refused`` or ``due``."""
    detail: str = ""


class Command(BaseCommand):
    help = (
        "Reads stored callbacks again, after the code that could not read them was mended: nothing "
        "is asked and nothing paid again. Or reads the answers of completed requests anew. Or retries "
        "or drops dead letters of failed requests."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("uuids", nargs="*", metavar="UUID", help="Only of these requests.")
        parser.add_argument(
            "--quarantined", action="store_true", help="Signed callbacks that were unusable."
        )
        parser.add_argument(
            "--unread", action="store_true", help="Stored callbacks whose reading broke."
        )
        parser.add_argument(
            "--failed",
            action="store_true",
            help="Failed requests: answers that could not be read, or with --dead-letters those "
            "that have one and were not asked again.",
        )
        parser.add_argument(
            "--completed",
            action="store_true",
            help="Completed requests, each from the very answer that completed it: completion, usage "
            "and cost are written anew as today's code reads and today's settings price them. State "
            "and times stay, nobody is told again, a known cost without a price today stays; what "
            "changes is printed. UUIDs without other words do this too.",
        )
        parser.add_argument(
            "--unpriced",
            action="store_true",
            help="The same for answers of unknown cost only: after a price was given.",
        )
        parser.add_argument(
            "--code", default="", help="With --failed: only those with this error code (not_json)."
        )
        parser.add_argument(
            "--dead-letters",
            choices=["retry", "drop"],
            help="Instead of reading: have QStash retry (the provider charges for it) or delete "
            "the dead letters of the named requests or of --failed.",
        )
        parser.add_argument(
            "--database", default=router.db_for_write(LLMRequest), help="Alias of the database."
        )
        parser.add_argument(
            "--dry-run", action="store_true", help="Only say what would be read or moved."
        )
        parser.add_argument("--json", action="store_true", help="One JSON object instead of lines.")

    def handle(self, *args: Any, **options: Any) -> None:
        uuids = [_uuid(text) for text in options["uuids"]]
        _check_selection(uuids, options)
        chosen = _dead_letters if options["dead_letters"] else _stored
        try:
            items = list(self._told(chosen(uuids, options), options))
        except ConfigurationError as error:
            raise CommandError(str(error)) from error
        counted = Counter(item.outcome for item in items)
        summary = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counted.items()))
        if options["json"]:
            document = {"counts": dict(counted), "items": [asdict(item) for item in items]}
            self.stdout.write(json.dumps(document, indent=2))
        else:
            self.stdout.write(f"{summary or 'Nothing to do'}.")
        bad = counted["unreadable"] + counted["refused"]
        if bad:
            raise CommandError(f"{bad} of {len(items)} could not be done: see above.")

    def _told(self, items: Iterator[Item], options: dict[str, Any]) -> Iterator[Item]:
        for item in items:
            if not options["json"]:
                detail = f": {item.detail}" if item.detail else ""
                self.stdout.write(f"{item.uuid} {item.what} {item.outcome}{detail}")
            yield item


def _uuid(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError as error:
        raise CommandError(f"{text!r} is not the UUID of a request.") from error


def _check_selection(uuids: Sequence[UUID], options: dict[str, Any]) -> None:
    if options["code"] and not options["failed"]:
        raise CommandError("--code goes with --failed.")
    if options["dead_letters"]:
        if any(options[name] for name in ("quarantined", "unread", "completed", "unpriced")):
            raise CommandError("--dead-letters goes with --failed or the UUIDs of requests.")
        if not uuids and not options["failed"]:
            raise CommandError("Say whose dead letters: give UUIDs of requests, or --failed.")
    elif not (uuids or any(options[name] for name in (*_AGAIN, *_ANEW))):
        raise CommandError(
            "Say what to read again: --quarantined, --unread, --failed, --completed, --unpriced, or "
            "UUIDs of requests."
        )


# --- reading again -----------------------------------------------------------------------------


def _stored(uuids: Sequence[UUID], options: dict[str, Any]) -> Iterator[Item]:
    """Named requests without further words: all of theirs that may have more to say."""
    says_again, says_anew = (any(options[name] for name in names) for names in (_AGAIN, _ANEW))
    # Listed first: what is completed by being read again has been read by then.
    finished = [] if says_again and not says_anew else _finished(uuids, options)
    if says_again or not says_anew:
        yield from _receipts(uuids, options)
    rows = LLMRequest.objects.using(options["database"])
    for key in finished:
        llm_request = rows.filter(pk=key).first()
        if llm_request is not None:
            yield _read_anew(llm_request, is_rehearsal=options["dry_run"])


def _receipts(uuids: Sequence[UUID], options: dict[str, Any]) -> Iterator[Item]:
    receipts = CallbackResponse.objects.using(options["database"])
    failed = MISREAD & Q(llm_request__error_code=options["code"]) if options["code"] else MISREAD
    kinds = {"quarantined": QUARANTINED, "unread": UNREAD, "failed": failed}
    named = [kinds[name] for name in kinds if options[name]] or list(kinds.values())
    wanted = Q()
    for each in named:
        wanted |= each
    if uuids:
        wanted &= Q(uuid__in=uuids)
    keys = list(receipts.filter(wanted).order_by("pk").values_list("pk", flat=True))
    for key in keys:
        # One by one: reading one may settle the next, and a body may be large.
        receipt = receipts.filter(pk=key).first()
        if receipt is not None:
            yield _due(receipt) if options["dry_run"] else _read_again(receipt)
    yield from _without_any(uuids, set(receipts.filter(uuid__in=uuids).values_list("uuid")))


def _finished(uuids: Sequence[UUID], options: dict[str, Any]) -> list[int]:
    """Keys of the requests to read anew."""
    rows: LLMRequestQuerySet = LLMRequest.objects.using(options["database"])
    unpriced, completed = rows.unpriced().finished(), rows.completed()
    if options["unpriced"] and not options["completed"]:
        chosen = unpriced
    elif options["completed"] and not options["unpriced"]:
        chosen = completed
    else:
        chosen = completed | unpriced
    if uuids:
        chosen = chosen.filter(uuid__in=uuids)
    return list(chosen.order_by("pk").values_list("pk", flat=True))


def _read_anew(llm_request: LLMRequest, *, is_rehearsal: bool) -> Item:
    uuid, what = str(llm_request.uuid), "answer"
    try:
        changed = would_change(llm_request) if is_rehearsal else read_anew(llm_request)
    except IllegalState as error:
        return Item(uuid, what, "unreadable", str(error))
    detail = ", ".join(_difference(name, *values) for name, values in changed.items())
    if not changed:
        return Item(uuid, what, "unchanged", f"request is {llm_request.state}")
    return Item(uuid, what, "due" if is_rehearsal else "changed", detail)


def _difference(name: str, was: Any, now: Any) -> str:
    """A change; of long texts and lists only that there is one."""
    if name in ("completion", "refusal", "tool_calls", "usage", "cost_basis"):
        return f"{name} rewritten"
    return f"{name} {_shown(was)} -> {_shown(now)}"


def _shown(value: Any) -> str:
    if isinstance(value, Decimal):
        return f"{value.normalize():f}"
    return "unknown" if value is None else str(value) or "none"


def _due(receipt: CallbackResponse) -> Item:
    return Item(str(receipt.uuid), _named(receipt), "due", receipt.problem)


def _read_again(receipt: CallbackResponse) -> Item:
    uuid, what = str(receipt.uuid), _named(receipt)
    try:
        has_changed = read_again(receipt, now=timezone.now())
    except IllegalState as error:
        return Item(uuid, what, "unreadable", str(error))
    rows = LLMRequest.objects.using(receipt._state.db).filter(uuid=receipt.uuid)
    state = rows.values_list("state", flat=True).first() or "not here"
    return Item(uuid, what, "changed" if has_changed else "unchanged", f"request is {state}")


def _named(receipt: CallbackResponse) -> str:
    return f"{receipt.kind} {receipt.pk}"


def _without_any(uuids: Sequence[UUID], found: set[tuple[UUID]]) -> Iterator[Item]:
    for uuid in uuids:
        if (uuid,) not in found:
            yield Item(str(uuid), "callbacks", "unreadable", "none is stored")


# --- dead letters ------------------------------------------------------------------------------


def _dead_letters(uuids: Sequence[UUID], options: dict[str, Any]) -> Iterator[Item]:
    rows: LLMRequestQuerySet = LLMRequest.objects.using(options["database"])
    is_retry = options["dead_letters"] == "retry"
    verb = LLMRequest.retry_dead_letter if is_retry else LLMRequest.drop_dead_letter
    outcome = "retried" if is_retry else "dropped"
    chosen = rows.filter(uuid__in=uuids) if uuids else rows
    if options["failed"]:
        # What was asked again since is answered there, or will be: it is not to be paid for twice.
        chosen = (standing(chosen) if is_retry else chosen).failed().exclude(dead_letter_id="")
    if options["code"]:
        chosen = chosen.filter(error_code=options["code"])
    keys = list(chosen.order_by("pk").values_list("pk", flat=True))
    for key in keys:
        llm_request = rows.filter(pk=key).first()
        if llm_request is None:
            continue
        yield (
            Item(str(llm_request.uuid), llm_request.dead_letter_id or "-", "due", llm_request.error)
            if options["dry_run"]
            else _move(llm_request, verb, outcome)
        )
    if not options["failed"]:
        known = set(rows.filter(uuid__in=uuids).values_list("uuid", flat=True))
        for uuid in uuids:
            if uuid not in known:
                yield Item(str(uuid), "-", "refused", "there is no such request")


def _move(llm_request: LLMRequest, verb: Callable[[LLMRequest], None], outcome: str) -> Item:
    uuid, dead_letter_id = str(llm_request.uuid), llm_request.dead_letter_id
    try:
        verb(llm_request)
    except (IllegalState, QStashError) as error:
        return Item(uuid, dead_letter_id or "-", "refused", str(error))
    return Item(uuid, dead_letter_id, outcome)
