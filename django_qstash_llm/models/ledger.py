"""``LedgerEntry``: what one answer of a provider cost. All that is said of money is a sum over these.

Entries are written in the transaction that writes the answer down, and never changed: what becomes known
later, a price say, is an entry of its own that holds the difference. Deleting a request leaves them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Self

from django.contrib.contenttypes.models import ContentType
from django.db import models
from django.db.models import OuterRef, Q, Subquery, Sum
from django.utils import formats, timezone
from django.utils.translation import gettext
from django.utils.translation import gettext_lazy as _

from ..completions import Usage
from . import inbox, money
from .money import USDField

if TYPE_CHECKING:
    from ..pricing import Cost
    from .request import LLMRequest, LLMRequestQuerySet

CHAT = "chat"
"""The answer of a chat: one row is one call."""
BY_HAND = "by hand"
"""That of a row which nobody answered here, as of an import."""
MOST_TOKENS = 10**12
"""Of one answer. No model has a millionth of it, and sums have to fit their columns."""
TOKENS = (
    "input_tokens",
    "output_tokens",
    "cached_tokens",
    "cache_write_tokens",
    "reasoning_tokens",
)
BELONGINGS = ("provider", "model", "tenant", "user", "labels", "about_type", "api_key")
MONEY = ("spent", "useful")
COUNTS = ("answers", "unpriced")
SUMMED = (*MONEY, *COUNTS, *TOKENS)
"""What entries are added up in."""


@dataclass(frozen=True)
class Total:
    """A sum over entries."""

    spent: Decimal = Decimal(0)
    """USD for all that was answered."""
    useful: Decimal = Decimal(0)
    """USD of it for the answers that requests were completed by. The rest was paid for in vain."""
    answers: int = 0
    unpriced: int = 0
    """How many of the answers have no known cost. They are in no sum."""
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def cost(self) -> Decimal | None:
        """USD; None where nothing of it is priced."""
        return self.spent if self.answers > self.unpriced else None

    @property
    def in_words(self) -> str:
        """``$0.0123``, ``unpriced``, ``$0.0123 + 2 unpriced``; a dash where nothing was answered."""
        if not self.answers:
            return "–"
        if self.cost is None:
            return str(_("unpriced"))
        spent = money.in_words(self.spent)
        return f"{spent} {self.unpriced_in_words}" if self.unpriced else spent

    @property
    def unpriced_in_words(self) -> str:
        """``+ 2 unpriced``; empty where all is priced."""
        if not self.unpriced:
            return ""
        number = formats.number_format(self.unpriced, force_grouping=True)
        return gettext("+ %(number)s unpriced") % {"number": number}

    def __add__(self, other: Total) -> Total:
        return Total(**{name: getattr(self, name) + getattr(other, name) for name in SUMMED})


def total_of(figures: Sequence[Any]) -> Total:
    """Of the sums in the order of ``SUMMED``; those of nothing are None."""
    pairs = zip(SUMMED, figures, strict=True)
    return Total(**{name: figure for name, figure in pairs if figure is not None})


def day_of(at: datetime) -> date:
    """In the time zone of the site's settings, whichever is active."""
    if timezone.is_naive(at):
        return at.date()
    return timezone.localtime(at, timezone.get_default_timezone()).date()


class LedgerEntryQuerySet(models.QuerySet["LedgerEntry"]):
    def unfolded(self) -> Self:
        """Not yet part of what is added up by day, see ``Settlement``."""
        return self.filter(is_folded=False)

    def of(self, llm_requests: LLMRequestQuerySet) -> Self:
        """Those of ``llm_requests``."""
        if not llm_requests.query.is_sliced and not llm_requests.query.where:
            return self.all()  # as good as all of them: that of deleted requests was paid for too
        return self.filter(uuid__in=llm_requests.order_by().values("uuid"))

    def total(self) -> Total:
        found = self.aggregate(**{f"total_{name}": Sum(name) for name in SUMMED})
        return total_of([found[f"total_{name}"] for name in SUMMED])

    def by_column(self, llm_requests: LLMRequestQuerySet, column: str) -> dict[Any, Total]:
        """What ``llm_requests`` came to, by the value of a column of theirs, in one query. A value of
        which nothing was answered is left out."""
        sums = {f"total_{name}": Sum(name) for name in SUMMED}
        requests = llm_requests.model._base_manager.using(self.db)
        of_column = Subquery(requests.filter(uuid=OuterRef("uuid")).values(column)[:1])
        rows = (
            self.filter(uuid__in=llm_requests.order_by().values("uuid"))
            .annotate(of_column=of_column)
            .order_by()
            .values_list("of_column")
            .annotate(**sums)
        )
        return {value: total_of(figures) for value, *figures in rows}

    def by_day(self) -> list[tuple[date, Total]]:
        """Day, in the site's time zone, and what it came to; days without an answer are left out."""
        sums = {f"total_{name}": Sum(name) for name in SUMMED}
        rows: Any = self.order_by("day").values_list("day").annotate(**sums)
        return [(day, total_of(figures)) for day, *figures in rows]

    def correct(self, entry: LedgerEntry, *, now: datetime) -> LedgerEntry | None:
        """Have the entries of ``entry.answer`` come to what ``entry``, which is not saved, says: it
        itself is the first, and later ones hold the difference. None where there is none.

        In a transaction that has locked the request.
        """
        self._for_write = True
        told = list(self.filter(uuid=entry.uuid, answer=entry.answer).order_by("number"))
        if told:
            first = told[0]
            entry.number = told[-1].number + 1
            entry.at, entry.day, entry.entered_at = first.at, first.day, now
            # Where it belongs is as it was said first, or a sum would lose what another gains.
            for name in BELONGINGS:
                setattr(entry, name, getattr(first, name))
            for name in SUMMED:
                known = sum((getattr(each, name) or 0 for each in told), getattr(Total, name))
                setattr(entry, name, (getattr(entry, name) or 0) - known)
            if not any(getattr(entry, name) for name in SUMMED):
                return None
        inbox.insert(entry, using=self.db)
        return entry

    def price(
        self, llm_request: LLMRequest, usage: Usage, cost: Cost, *, is_useful: bool, now: datetime
    ) -> LedgerEntry | None:
        """Enter what the unpriced answer of a request that has so many tokens as ``usage``, or else the
        first of them, turns out to have cost; of one that has no entry, since it was written by hand, all
        of it. None where all of them are priced.

        In a transaction that has locked the request.
        """
        self._for_write = True
        of_each: dict[str, list[LedgerEntry]] = {}
        for entry in self.filter(uuid=llm_request.uuid).order_by("number", "id"):
            of_each.setdefault(entry.answer, []).append(entry)
        if not of_each:
            at = llm_request.finished_at or now
            late = LedgerEntry.of_answer(
                llm_request, answer=BY_HAND, usage=usage, cost=cost, at=at, is_useful=is_useful
            )
            inbox.insert(late, using=self.db)
            return late
        tokens = usage.input_tokens or 0, usage.output_tokens or 0

        def is_another(told: list[LedgerEntry]) -> bool:
            counted = (sum(e.input_tokens for e in told), sum(e.output_tokens for e in told))
            return counted != tokens

        for told in sorted(of_each.values(), key=is_another):
            if sum(entry.unpriced for entry in told) > 0:
                late = inbox.new(
                    self.model,
                    uuid=llm_request.uuid,
                    answer=told[0].answer,
                    number=told[-1].number + 1,
                    at=told[0].at,
                    entered_at=now,
                    day=told[0].day,
                    answers=0,
                    unpriced=-1,
                    spent=cost.amount,
                    useful=cost.amount if is_useful else Decimal(0),
                    cost_source=cost.source,
                    **{name: getattr(told[0], name) for name in BELONGINGS},
                )
                inbox.insert(late, using=self.db)
                return late
        return None


class LedgerEntry(models.Model):
    """One answer of a provider and its cost, or the difference that became known later."""

    uuid = models.UUIDField(_("request uuid"), editable=False)
    answer = models.CharField(_("answer"), max_length=300)
    """Which of the request's: QStash's message id and the attempt, or ``chat``."""
    number = models.PositiveSmallIntegerField(_("number"), default=0)
    """0 is the answer's own; the others hold differences."""
    at = models.DateTimeField(_("answered at"))
    entered_at = models.DateTimeField(_("entered at"))
    """``at``, or when the difference became known, which is put down under the answer's own day."""
    day = models.DateField(_("day"))
    """Of ``at``, in the site's time zone."""

    # for whom it was asked, as it was then
    provider = models.CharField(_("provider"), max_length=64)
    model = models.CharField(_("model"), max_length=255)
    tenant = models.CharField(_("tenant"), max_length=255, blank=True)
    user = models.CharField(_("user"), max_length=255, blank=True)
    """Its primary key as text: it may be of any type, and may be deleted."""
    labels = models.JSONField(_("labels"), default=list, blank=True)
    about_type = models.IntegerField(_("about"), null=True, blank=True)
    """The key of the content type of what it was asked about."""
    api_key = models.CharField(_("API key"), max_length=32, blank=True)
    """Its primary key as text."""

    # what it came to
    spent = USDField(_("spent"), default=Decimal(0))
    useful = USDField(_("useful"), default=Decimal(0))
    answers = models.SmallIntegerField(_("answers"), default=1)
    unpriced = models.SmallIntegerField(_("unpriced"), default=0)
    input_tokens = models.BigIntegerField(_("input tokens"), default=0)
    output_tokens = models.BigIntegerField(_("output tokens"), default=0)
    cached_tokens = models.BigIntegerField(_("cached tokens"), default=0)
    cache_write_tokens = models.BigIntegerField(_("cache write tokens"), default=0)
    reasoning_tokens = models.BigIntegerField(_("reasoning tokens"), default=0)
    cost_source = models.CharField(_("cost source"), max_length=32, blank=True)

    is_folded = models.BooleanField(default=False, editable=False)

    objects = LedgerEntryQuerySet.as_manager()

    class Meta:
        verbose_name = _("ledger entry")
        verbose_name_plural = _("ledger")
        ordering = ("-id",)
        constraints = (
            models.UniqueConstraint(
                fields=["uuid", "answer", "number"], name="llm_ledger_entered_once"
            ),
        )
        indexes = (
            models.Index(fields=["at"], name="llm_ledger_at"),
            models.Index(fields=["id"], name="llm_ledger_unfolded", condition=Q(is_folded=False)),
        )

    def __str__(self) -> str:
        return f"{self.uuid} · {self.answer}"

    @classmethod
    def of_answer(
        cls,
        llm_request: LLMRequest,
        *,
        answer: str,
        usage: Usage,
        cost: Cost | None,
        at: datetime,
        is_useful: bool,
    ) -> LedgerEntry:
        """An unsaved entry. ``is_useful``: whether the request is completed by this answer."""
        amount = Decimal(0) if cost is None else cost.amount
        return inbox.new(
            cls,
            uuid=llm_request.uuid,
            answer=answer,
            at=at,
            entered_at=at,
            day=day_of(at),
            provider=llm_request.provider,
            model=llm_request.model,
            tenant=llm_request.tenant,
            user=_text(llm_request.user_id),
            labels=list(texts_in(llm_request.labels)),
            about_type=llm_request.content_type_id,
            api_key=_text(llm_request.api_key_id),
            spent=amount,
            useful=amount if is_useful else Decimal(0),
            unpriced=int(cost is None),
            cost_source="" if cost is None else cost.source,
            **{name: min(getattr(usage, name) or 0, MOST_TOKENS) for name in TOKENS},
        )


def texts_in(labels: Any) -> tuple[str, ...]:
    """``labels`` without what is none: an ``update`` is checked by nobody, and who adds up what was
    answered is not to be stopped by it."""
    return (
        tuple(x for x in labels if isinstance(x, str)) if isinstance(labels, list | tuple) else ()
    )


def _text(key: Any) -> str:
    return "" if key is None else str(key)


def about_model_of(content_type_id: int | None, using: str) -> str:
    """``app.model``, also of a model that is gone, as long as its content type is there."""
    if content_type_id is None:
        return ""
    types = ContentType.objects.db_manager(using)
    try:
        content_type = types.get_for_id(content_type_id)  # kept by Django from the first time on
    except ContentType.DoesNotExist:
        return ""
    return f"{content_type.app_label}.{content_type.model}"
