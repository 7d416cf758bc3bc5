"""The purge: what is too old loses its texts, and what nobody will read is deleted.

Money stays. A purged request keeps its row with provider, model, usage, cost, states and times, and
its receipts keep theirs, so that a callback that comes late is known and counted, not stored anew.
What goes: messages, parameters, completion, refusal, tool calls and errors of the request; body,
header, words and problem of its receipts; unreadable callbacks and those of no request; QStash's dead
letters of it, which hold the messages too; and files, of which one that a batch is still reading stays.

Left alone: what is unfinished; what triggers and receivers have not been told of; and what belongs
to a conversation that goes on, because its next question repeats all that was said. A conversation
is forgotten as a whole, when its last request is old enough. Batches, conversations, labels and
metadata are yours.

One statement for each piece of the table, no transaction around them: it may run beside workers and
other purges, be killed at any point, and run again. Memory does not grow with the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, TypeVar

from django.db import models, transaction
from django.db.models import Exists, Max, OuterRef, ProtectedError, Q, RestrictedError
from django.utils import timezone

from ..conf import app_settings, qstash_client
from ..exceptions import ConfigurationError
from ..qstash import QStashError
from .batch_input import BatchInput
from .callback import _IS_UNAPPLIED, MOST_APPLY_TRIES, CallbackResponse, Kind
from .file import File
from .forgetting import FULL, HASHED, digest_of, kept
from .intake import forget_read_files, read_files
from .request import ANNOUNCED, LLMRequest, LLMRequestQuerySet, State

SPAN = 1000
"""Rows per statement."""
DIGESTS_AT_ONCE = 20
"""Requests whose messages are in memory at the same time; each may weigh ``MAX_BODY_BYTES``."""
DEAD_LETTERS_AT_ONCE = 100
"""QStash's pages are of 100 at most."""
FILES_AT_ONCE = 20
"""Each may be of ``OPENAI_MAX_FILE_BYTES``."""
MOST_DAYS = 36_500

_HAS_TEXTS = (
    Q(forgotten_at=None)
    | ~Q(completion="")
    | ~Q(refusal="")
    | ~Q(tool_calls=[])
    | ~Q(error="")
    | ~Q(announce_error="")
    # Forgotten, and then written once more by somebody who had read the row before.
    | ~Q(messages=[])
    | ~Q(parameters={})
)
_HAS_CONTENT = ~Q(body=b"") | ~Q(header={}) | ~Q(problem="") | ~Q(words="")
_IS_TRIED_AGAIN = _IS_UNAPPLIED & Q(apply_tries__lt=MOST_APPLY_TRIES)

Rows = TypeVar("Rows", bound="models.QuerySet[Any]")


@dataclass
class Purge:
    """Forgets what is too old, in one database."""

    using: str = "default"
    older_than: int | None = None
    """Days; None is ``RETENTION_DAYS``."""
    deletes: bool = False
    """Delete the old rows as well, with what they say of usage and cost."""
    is_rehearsal: bool = False
    """Only count what would go."""
    now: datetime = field(default_factory=timezone.now)
    on_progress: Callable[[Purge], None] = lambda purge: None
    """Called after each piece in which something went."""

    forgotten: int = 0
    """Requests whose texts went because of their age."""
    withheld: int = 0
    """Requests whose messages went because of ``STORE_MESSAGES``, later than when they finished."""
    emptied: int = 0
    """Receipts that lost body and header."""
    discarded: int = 0
    """Unreadable callbacks, and those of no request, that were deleted."""
    files: int = 0
    """Files of the OpenAI-compatible endpoint that are gone, or whose text is."""
    dead_letters: int = 0
    """Requests whose dead letters were deleted at QStash."""
    deleted: int = 0
    """Requests that were deleted."""
    protected: int = 0
    """Requests that could not be deleted, because rows of the site protect them."""
    problem: str = ""
    """Why QStash's dead letters are still there."""

    def run(self) -> Purge:
        """Raises ``ConfigurationError`` on a setting that cannot be followed; then nothing goes."""
        kept()  # first of all, for what it raises
        before, unread_before = self.before, self.unread_before
        if self.deletes and before is None:
            raise ConfigurationError(
                "Nothing says how old a request has to be to be deleted: "
                "give --older-than, or set QSTASH_LLM['RETENTION_DAYS']."
            )
        if before is not None:
            self.forget_texts(before)
            self.empty_receipts(before)
        self.withhold_messages()
        self.delete_files(before)
        self.discard_unread(unread_before)
        self.delete_dead_letters(before if kept() == FULL else unread_before)
        if self.deletes and before is not None:
            self.delete_rows(before)
        return self

    # --- how old ---

    @property
    def before(self) -> datetime | None:
        """What was finished by then is too old; None when nothing ever is."""
        if self.older_than is not None:
            return self._days_ago(self.older_than, "--older-than")
        days = app_settings().retention_days
        return None if days is None else self._days_ago(days, "QSTASH_LLM['RETENTION_DAYS']")

    @property
    def unread_before(self) -> datetime:
        """The same for what could not be read, which is never kept longer than what could."""
        days = app_settings().orphan_retention_days
        moment = self._days_ago(days, "QSTASH_LLM['ORPHAN_RETENTION_DAYS']")
        return max(moment, self.before or moment)

    def _days_ago(self, days: Any, name: str) -> datetime:
        if not isinstance(days, int) or isinstance(days, bool) or not 0 <= days <= MOST_DAYS:
            raise ConfigurationError(
                f"{name} is {days!r}; give a whole number of days, {MOST_DAYS} at most."
            )
        return self.now - timedelta(days=days)

    # --- which ---

    @property
    def rows(self) -> LLMRequestQuerySet:
        return LLMRequest.objects.using(self.using)

    @property
    def receipts(self) -> models.QuerySet[CallbackResponse]:
        return CallbackResponse.objects.using(self.using)

    def over(self, before: datetime) -> LLMRequestQuerySet:
        """Finished by then, told to all, and not part of a conversation that goes on."""
        is_told = Q(state=State.CANCELLED) | Q(announced_at__isnull=False)
        later = self.rows.filter(
            Q(finished_at=None) | Q(finished_at__gt=before), conversation=OuterRef("conversation")
        )
        is_over = Q(conversation=None) | ~Exists(later)
        return self.rows.finished().filter(is_told, is_over, finished_at__lte=before)

    def unannounced(self) -> int:
        """How many requests are old enough, and stay until triggers and receivers have been told."""
        if self.before is None:
            return 0
        return self.rows.filter(
            state__in=ANNOUNCED, announced_at=None, finished_at__lte=self.before
        ).count()

    def spans(self, rows: Rows) -> Iterator[Rows]:
        """``rows`` in pieces of the table, in the order of their keys."""
        table = rows.model._base_manager.using(self.using).order_by("pk")
        # What comes in meanwhile is not old.
        last = table.aggregate(last=Max("pk"))["last"]
        start = table.values_list("pk", flat=True).first()
        while start is not None and last is not None and start <= last:
            following = table.filter(pk__gte=start, pk__lte=last).values_list("pk", flat=True)
            end = following[SPAN : SPAN + 1].first()
            if end is None:
                yield rows.filter(pk__gte=start, pk__lte=last)
            else:
                yield rows.filter(pk__gte=start, pk__lt=end)
            start = end

    # --- what becomes of them ---

    def forget_texts(self, before: datetime) -> None:
        """Nothing that was asked or answered stays."""
        old = self.over(before).filter(_HAS_TEXTS)
        self._forget(
            "forgotten",
            old,
            completion="",
            refusal="",
            tool_calls=[],
            error="",
            announce_error="",
        )

    def withhold_messages(self) -> None:
        """What finishing should have done: where it was done in bulk, before the setting was
        changed, or in a conversation that has been deleted since."""
        if kept() == FULL:
            return
        rows = self.rows.finished().filter(forgotten_at=None, conversation=None)
        if self.is_rehearsal and self.before is not None:
            rows = rows.exclude(pk__in=self.over(self.before).values("pk"))
        self._forget("withheld", rows)

    def empty_receipts(self, before: datetime) -> None:
        """The receipts stay as marks of what has been told, and say no more. Also of such as came
        after their request had been purged."""
        full = self.receipts.filter(_HAS_CONTENT, received_at__lte=before)
        full = full.exclude(kind=Kind.QUARANTINED).exclude(_IS_TRIED_AGAIN)
        if self.is_rehearsal:
            of_old_ones = Exists(self.over(before).filter(pk=OuterRef("llm_request")))
            self._count("emptied", full.filter(of_old_ones).count())
            return
        for span in self.spans(full):
            # Two steps, not a join: for one of a table whose size it does not know yet PostgreSQL
            # may choose to read all of it for each receipt.
            theirs = set(span.values_list("llm_request", flat=True)) - {None}
            old_ones = self.over(before).filter(pk__in=theirs).values_list("pk", flat=True)
            if old := list(old_ones) if theirs else []:
                receipts = span.filter(llm_request__in=old)
                # Cut: it is not what came, and cannot be read again.
                emptied = receipts.update(
                    body=b"", header={}, problem="", words="", announce_error="", is_body_cut=True
                )
                self._count("emptied", emptied)

    def discard_unread(self, before: datetime) -> None:
        """Delete what no request can use: pings, callbacks of none, and unreadable ones of those
        that are finished."""
        finished = self.rows.finished().filter(pk=OuterRef("llm_request"))
        of_none = self.receipts.filter(llm_request=None, received_at__lte=before)
        unreadable = self.receipts.filter(
            Exists(finished), kind=Kind.QUARANTINED, received_at__lte=before
        )
        # One after the other: each has an index of its own.
        for unread in (of_none, unreadable):
            if self.is_rehearsal:
                self._count("discarded", unread.count())
                continue
            oldest = unread.order_by("received_at").values_list("pk", flat=True)[:SPAN]
            while keys := list(oldest.all()):
                self._count("discarded", unread.filter(pk__in=keys).delete()[0])

    def delete_files(self, before: datetime | None) -> None:
        """Delete what has expired or is too old, and drop the texts that ``STORE_MESSAGES`` does not
        keep and that are requests by now."""
        unread = BatchInput.objects.using(self.using).unread()
        is_over = Q(expires_at__lte=self.now)
        if before is not None:
            is_over |= Q(created_at__lte=before)
        is_being_read = Exists(unread.filter(file_uuid=OuterRef("uuid")))
        old = File.objects.using(self.using).filter(is_over).exclude(is_being_read)
        if self.is_rehearsal:
            withheld = 0 if kept() == FULL else read_files(self.using, ~is_over).count()
            self._count("files", old.count() + withheld)
            return
        oldest = old.order_by("pk").values_list("pk", flat=True)[:FILES_AT_ONCE]
        while keys := list(oldest.all()):
            _, deleted = old.filter(pk__in=keys).delete()
            self._count("files", deleted.get(File._meta.label, 0))
        if kept() != FULL:
            self._count("files", forget_read_files(self.using, Q()))

    def delete_dead_letters(self, before: datetime | None) -> None:
        """Delete what QStash keeps of them, and note that it is gone.

        Never raises: where QStash cannot be told, ``problem`` says why, and the next purge tries
        again. Nobody is asked about what QStash has dropped by itself in the meantime.
        """
        if before is None:
            return
        dead = self.over(before).exclude(dead_letter_id="")
        if self.is_rehearsal:
            self._count("dead_letters", dead.count())
            return
        for span in self.spans(dead):
            letters = dict(span.values_list("pk", "dead_letter_id"))
            for group in _groups(list(letters), DEAD_LETTERS_AT_ONCE):
                try:
                    self._delete_at_qstash(group, {letters[pk] for pk in group})
                except (ConfigurationError, QStashError) as error:
                    self.problem = app_settings().without_secrets(str(error))
                    return

    def _delete_at_qstash(self, keys: Sequence[int], dead_letter_ids: set[str]) -> None:
        # One that was retried and failed again has left several.
        earlier = self.receipts.filter(llm_request__in=keys).exclude(dead_letter_id="")
        all_ids = dead_letter_ids.union(earlier.values_list("dead_letter_id", flat=True))
        for ids in _groups(sorted(all_ids), DEAD_LETTERS_AT_ONCE):
            qstash_client().delete_dead_letters(ids)
        gone = self.rows.filter(pk__in=keys, dead_letter_id__in=dead_letter_ids)
        self._count("dead_letters", gone.update(dead_letter_id=""))

    def delete_rows(self, before: datetime) -> None:
        """Delete them, receipts and all. One whose resubmission is not told yet stays for it to
        name, and one that QStash keeps a dead letter of, until that is deleted."""
        old = self.over(before)
        if self.is_rehearsal:
            named = Exists(self.untold_resubmissions().filter(resubmission_of=OuterRef("pk")))
            self._count("deleted", old.filter(~named).count())
            return
        for span in self.spans(old.filter(dead_letter_id="")):
            try:
                self._delete(span)
            except (ProtectedError, RestrictedError):
                # Rows of the site hold on to some of them.
                for pk in list(span.values_list("pk", flat=True)):
                    self._delete_unless_protected(span.filter(pk=pk))

    def untold_resubmissions(self) -> LLMRequestQuerySet:
        """Still on their way, or not announced: what they repeat has to be there for it."""
        again = self.rows.filter(resubmission_of__isnull=False, announced_at=None)
        return again.exclude(state=State.CANCELLED)

    def _delete_unless_protected(self, rows: LLMRequestQuerySet) -> None:
        try:
            self._delete(rows)
        except (ProtectedError, RestrictedError):
            self._count("protected", 1)

    def _delete(self, rows: LLMRequestQuerySet) -> None:
        with transaction.atomic(using=self.using):
            # Locked: none of them may be completed between being found old and being deleted.
            keys = set(rows.select_for_update(of=("self",)).values_list("pk", flat=True))
            named = self.untold_resubmissions().filter(resubmission_of__in=keys)
            keys -= set(named.values_list("resubmission_of", flat=True))
            _, deleted = self.rows.filter(pk__in=keys).only("pk").delete()
        self._count("deleted", deleted.get(LLMRequest._meta.label, 0))

    # --- how ---

    def _forget(self, figure: str, rows: LLMRequestQuerySet, **fields: Any) -> None:
        """Forget ``fields`` of ``rows`` and what was asked, and count them as ``figure``."""
        if self.is_rehearsal:
            self._count(figure, rows.count())
            return
        for span in self.spans(rows):
            # A look first: on SQLite an update that finds nothing would still lock all others out.
            if not span.exists():
                continue
            if kept() == HASHED:
                self._write_digests(span)
                # One that got in between has none yet, and is for the next purge.
                span = span.filter(~Q(digest="") | Q(messages=[]))
            asked = {"messages": [], "parameters": {}, "forgotten_at": self.now}
            self._count(figure, span.update(**asked, **fields))

    def _count(self, figure: str, number: int) -> None:
        setattr(self, figure, getattr(self, figure) + number)
        if number:
            self.on_progress(self)

    def _write_digests(self, rows: LLMRequestQuerySet) -> None:
        without = rows.filter(digest="").exclude(messages=[])
        for keys in _groups(list(without.values_list("pk", flat=True)), DIGESTS_AT_ONCE):
            asked = self.rows.filter(pk__in=keys, digest="").only("messages")
            for llm_request in (hashed := list(asked)):
                llm_request.digest = digest_of(llm_request.messages)
            self.rows.bulk_update(hashed, ["digest"])


Item = TypeVar("Item")


def _groups(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
