"""What an attempt at a provider came to: the columns of a receipt that say so, and the sentence.

Read from what the provider said when it did not answer. An attempt that succeeded leaves all of it
empty, and costs nothing here.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from django.db import models
from django.utils import timezone
from django.utils.text import Truncator
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from .. import limits
from ..conf import app_settings
from ..limits import Trouble
from ..qstash import Callback
from ..qstash.durations import SECONDS_PER_UNIT
from ..qstash.retry import delay_before_retry, delay_from_headers
from .moments import aware

LONGEST_LINE = 300
"""Characters of the provider's words that stand in a sentence."""
TROUBLES = [(each.value, each.value.replace("_", " ")) for each in Trouble]


class DelayedBy(models.TextChoices):
    """Who says when QStash tries again."""

    PROVIDER = "provider", gettext_lazy("the provider's header")
    REQUEST = "request", gettext_lazy("the request's retry delay")
    QSTASH = "qstash", gettext_lazy("QStash's back-off")


class Attempt(models.Model):
    """The part of a receipt that tells of the attempt.

    The database knows the defaults: what succeeded is stored without all this, and so it is by a
    process that does not know these columns yet.
    """

    if TYPE_CHECKING:
        status: Any
        retried: Any
        max_retries: Any
        dead_letter_id: Any

    trouble = models.CharField(
        gettext_lazy("trouble"),
        max_length=16,
        blank=True,
        default="",
        db_default="",
        choices=TROUBLES,
    )
    """Empty where the provider answered."""
    code = models.CharField(
        gettext_lazy("provider's code"), max_length=64, blank=True, default="", db_default=""
    )
    words = models.TextField(
        gettext_lazy("provider's words"), blank=True, default="", db_default=""
    )
    wait = models.FloatField(
        gettext_lazy("wait"),
        null=True,
        blank=True,
        help_text=gettext_lazy("Seconds that the provider asks to wait."),
    )
    wait_source = models.CharField(
        gettext_lazy("wait named by"),
        max_length=64,
        blank=True,
        default="",
        db_default="",
        help_text=gettext_lazy("The header or the words that the wait was read from."),
    )
    next_try_at = models.DateTimeField(
        gettext_lazy("next try"),
        null=True,
        blank=True,
        help_text=gettext_lazy("About when QStash tries again; empty is never."),
    )
    delayed_by = models.CharField(
        gettext_lazy("delay chosen by"),
        max_length=16,
        blank=True,
        default="",
        db_default="",
        choices=DelayedBy,
    )

    # telling
    to_announce = models.BooleanField(
        gettext_lazy("to be announced"), default=False, db_default=False
    )
    """Whether ``request_attempted`` is still to be sent. Where nobody listens and nothing is wrong
    it never is, so that the index of those that are stays empty."""
    announce_tries = models.PositiveSmallIntegerField(
        gettext_lazy("announce tries"), default=0, db_default=0
    )
    announce_after = models.DateTimeField(gettext_lazy("announce after"), null=True, blank=True)
    announce_error = models.TextField(
        gettext_lazy("announce error"), blank=True, default="", db_default=""
    )

    # having QStash try no more
    cancel_after = models.DateTimeField(
        gettext_lazy("cancel after"),
        null=True,
        blank=True,
        help_text=gettext_lazy("When QStash is asked (again) to try no more; empty is not at all."),
    )
    cancel_tries = models.PositiveSmallIntegerField(
        gettext_lazy("cancel tries"), default=0, db_default=0
    )

    class Meta:
        abstract = True

    def read_trouble(
        self, callback: Callback, body: bytes, *, at: datetime, expression: str
    ) -> None:
        """What was wrong and what comes next. ``body`` is unpacked and without our keys, ``at`` when
        it was told, ``expression`` the request's ``Upstash-Retry-Delay``.

        A 200 that holds no error has no trouble, whatever else is wrong with it.
        """
        without_secrets = app_settings().without_secrets
        now = aware(at).timestamp()
        headers = {name.lower(): values[0] for name, values in callback.header.items() if values}
        reading = limits.read(callback.status, headers, body, now=now)
        self.trouble = reading.trouble or ""
        self.code = without_secrets(reading.code, limit=64)
        self.words = without_secrets(reading.words, limit=2000)
        self.wait, self.wait_source = reading.wait, without_secrets(reading.wait_source, limit=64)
        self.next_try_at, self.delayed_by = None, ""
        if reading.trouble is None or callback.is_last:
            return
        # What the server says of it counts before what we make of the rest.
        is_retried = reading.should_retry
        if is_retried or (is_retried is None and reading.trouble.is_passing):
            delay = delay_before_retry(
                callback.retried,
                status=callback.status,
                headers=headers,
                expression=expression,
                now=now,
            )
            self.next_try_at = at + timedelta(seconds=delay)
            is_named = delay_from_headers(callback.status, headers, now=now) is not None
            by_itself = DelayedBy.REQUEST if expression else DelayedBy.QSTASH
            self.delayed_by = DelayedBy.PROVIDER if is_named else by_itself

    @property
    def left_to_the_database(self) -> frozenset[str]:
        """The columns that need not be named when the receipt is stored."""
        return _NOTHING if self.trouble or self.to_announce else _EVERYTHING

    @property
    def is_end(self) -> bool:
        """Whether this trouble is the last word: no try is left, or none would help."""
        return bool(self.trouble) and self.next_try_at is None

    @property
    def remedy(self) -> str:
        """What a person can do where time alone does not cure it."""
        trouble = Trouble(self.trouble) if self.trouble else None
        return trouble.remedy if trouble and not trouble.is_passing else ""

    @property
    def sentence(self) -> str:
        """The attempt in a line, in the current time zone: ``429 rate: tokens reset in 6m0s; next
        try 14:03:12``."""
        told = _("no response") if self.status < 0 else str(self.status)
        if not self.trouble:
            return told
        said = self._named_wait() or Truncator(self.words.rstrip(".")).chars(LONGEST_LINE)
        line = "; ".join(filter(None, (said, self.what_follows)))
        line = f"{told} {self.get_trouble_display()}: {line}".removesuffix(": ")
        return f"{line}. {self.remedy}" if self.remedy else line

    @property
    def what_follows(self) -> str:
        """``next try 14:03:12``, or why there is none."""
        if self.next_try_at:
            return _("next try %s") % clock_time(self.next_try_at)
        if self.retried >= self.max_retries or self.dead_letter_id or self.status == 200:
            return _("no try is left")
        # What no try would help says its remedy.
        return "" if self.remedy else _("the provider asks not to try again")

    def _named_wait(self) -> str:
        """``tokens reset in 6m0s``, ``retry-after 20s``; what was read from words says it itself."""
        if self.wait is None or " " in self.wait_source:
            return ""
        span = short_duration(self.wait)
        if "reset" not in self.wait_source:
            return f"{self.wait_source} {span}"
        bucket = re.sub(
            r"^(x-|anthropic-)*(priority|ratelimit(bysize)?|tokenlimit)|reset", "", self.wait_source
        )
        what = " ".join(filter(None, bucket.split("-"))) or _("limit")
        return _("%(what)s reset in %(span)s") % {"what": what, "span": span}


_EVERYTHING = frozenset(field.attname for field in Attempt._meta.local_concrete_fields)
_NOTHING: frozenset[str] = frozenset()


def short_duration(seconds: float) -> str:
    """As Go and the providers write it: ``6m0s``, ``1h2m3s``, ``0.25s``."""
    if seconds < 60:
        return f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"
    left, written = round(seconds), ""
    for unit in ("d", "h", "m", "s"):
        number, left = divmod(left, int(SECONDS_PER_UNIT[unit]))
        written += f"{number}{unit}" if number or written else ""
    return written


def clock_time(at: datetime) -> str:
    """``14:03:12``, with the date unless it is today's."""
    local, today = _local(at), _local(timezone.now()).date()
    return local.strftime("%H:%M:%S" if local.date() == today else "%Y-%m-%d %H:%M:%S")


def _local(at: datetime) -> datetime:
    return timezone.localtime(at) if timezone.is_aware(at) else at
