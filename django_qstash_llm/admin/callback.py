"""Receipts: what QStash told us, attempt by attempt."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import BinaryField, QuerySet
from django.db.models.functions import Length, Substr
from django.http import HttpRequest, HttpResponse
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext_lazy as _

from ..completions import read_error
from ..models import CallbackResponse, LLMRequest
from ..models.attempt import short_duration
from ..models.callback import CallbackResponseQuerySet, Kind
from ..models.replay import TO_READ_AGAIN
from . import actions, figures, text
from .filters import OrphanFilter, ReceiptAttentionFilter
from .record import RecordAdmin, Tool, filled, lines

_SIGNS: dict[str, str] = {
    Kind.CALLBACK: "→",
    Kind.FAILURE_CALLBACK: "✕",
    Kind.QUARANTINED: "!",
    Kind.PING: "↔",
}
_OF_NO_ATTEMPT = (Kind.QUARANTINED, Kind.PING)


def kind_sign(receipt: CallbackResponse) -> SafeString:
    return format_html(
        '<span class="llm-state llm-kind-{}"><span aria-hidden="true">{}</span> {}</span>',
        receipt.kind,
        _SIGNS.get(receipt.kind, "?"),
        receipt.get_kind_display(),
    )


def attempt(receipt: CallbackResponse) -> str:
    """Which of how many."""
    if receipt.kind in _OF_NO_ATTEMPT:
        return figures.UNKNOWN
    return f"{receipt.attempt} / {receipt.max_retries + 1}"


def status(receipt: CallbackResponse) -> str:
    return figures.UNKNOWN if receipt.kind in _OF_NO_ATTEMPT else figures.status(receipt.status)


def trouble(receipt: CallbackResponse) -> str:
    return receipt.get_trouble_display() or figures.UNKNOWN


def named_wait(receipt: CallbackResponse) -> str:
    """How long the provider asked to wait, and where it said so."""
    if receipt.wait is None:
        return figures.UNKNOWN
    return f"{short_duration(receipt.wait)} ({receipt.wait_source})"


def next_try(receipt: CallbackResponse) -> SafeString | str:
    """When QStash tries again, after which delay and by whose word."""
    if receipt.next_try_at is None:
        return receipt.what_follows if receipt.trouble else figures.UNKNOWN
    return format_html(
        '{} <span class="llm-quiet">{}</span>',
        figures.moment(receipt.next_try_at),
        _("after %(delay)s: %(delayed_by)s")
        % {
            "delay": figures.duration(receipt.next_try_at - receipt.received_at),
            "delayed_by": receipt.get_delayed_by_display(),
        },
    )


def with_beginnings(receipts: QuerySet[CallbackResponse], size: int) -> QuerySet[Any]:
    """``receipts`` with ``beginning``, the first ``size`` bytes of their bodies, and ``body_size``.

    A body may be 10 MB, which is a lot to read for a line of it.
    """
    return receipts.defer("body").annotate(
        beginning=Substr("body", 1, size, output_field=BinaryField()), body_size=Length("body")
    )


def words(receipt: Any) -> str:
    """What the provider said, in short. ``receipt``: of ``with_beginnings``."""
    if receipt.trouble:
        return text.excerpt(": ".join(filter(None, (receipt.code, receipt.words))), 300)
    if 200 <= receipt.status < 300 or receipt.kind in _OF_NO_ATTEMPT:
        return ""
    # Stored before there were columns for it.
    code, message = read_error(text.unpacked(bytes(receipt.beginning or b"")))
    return text.excerpt(f"{code}: {message}" if code and message else code or message, 300)


@admin.register(CallbackResponse)
class CallbackResponseAdmin(RecordAdmin):
    list_display = (
        "kind_column",
        "status_column",
        "attempt_column",
        "request_column",
        "problem_column",
        "seen_count",
        "received_column",
    )
    list_filter = ("kind", "trouble", ReceiptAttentionFilter, OrphanFilter)
    actions = ("read_again",)
    search_fields = ("source_message_id",)
    searched_name = "source_message_id"
    search_help_text = _("The request's UUID, or QStash's message id.")
    heavy_fields = ("header",)

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        return super().get_queryset(request).defer("body")

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        groups = (
            (None, (), ("kind_column", "status_column", "attempt_column", "request_field",
                        "received_at", "seen_count", "problem")),
            (_("Attempt"), ("sentence_field",),
             ("trouble", "code", "wait_field", "next_try_at", "delayed_by", "words")),
            (_("Announcing"), ("to_announce",),
             ("announce_tries", "announce_after", "announce_error")),
            (_("Reading"), ("is_recovered",), ("applied_at", "apply_tries", "apply_after")),
            (_("Response"), ("is_body_cut",), ("body_text", "header_text")),
            (_("At QStash"), ("dead_letter_id", "verified_by_next_key", "cancel_after"),
             ("source_message_id", "callback_message_id")),
        )  # fmt: skip
        wide = {"body_text", "header_text", "problem", "sentence_field", "words", "announce_error"}
        return [
            (name, {"fields": lines(filled(obj, *always, *sometimes), wide=wide)})
            for name, sometimes, always in groups
        ]

    # --- what can be done ---

    def tools(self, obj: CallbackResponse) -> list[Tool]:
        if CallbackResponse.objects.filter(TO_READ_AGAIN, pk=obj.pk).exists():
            return [Tool("read_again", _("Read again"))]
        return []

    @admin.action(permissions=["act"], description=_("Read selected %(verbose_name_plural)s again"))
    def read_again(
        self, request: HttpRequest, queryset: QuerySet[CallbackResponse]
    ) -> HttpResponse | None:
        # Whole: the list leaves out the bodies.
        rows = queryset.defer(None)
        first = queryset.only("pk").first()
        actions.read_again(self, request, rows)
        return actions.back_to_page(self, request, first)

    # --- what is shown ---

    @admin.display(description=_("kind"))
    def kind_column(self, receipt: CallbackResponse) -> SafeString:
        return kind_sign(receipt)

    @admin.display(description=_("status"))
    def status_column(self, receipt: CallbackResponse) -> str:
        return " ".join(filter(None, (status(receipt), receipt.get_trouble_display())))

    @admin.display(description=_("in a sentence"))
    def sentence_field(self, receipt: CallbackResponse) -> str:
        return receipt.sentence

    @admin.display(description=_("wait"))
    def wait_field(self, receipt: CallbackResponse) -> str:
        return named_wait(receipt)

    @admin.display(description=_("attempt"))
    def attempt_column(self, receipt: CallbackResponse) -> str:
        return attempt(receipt)

    @admin.display(description=_("LLM request"))
    def request_column(self, receipt: CallbackResponse) -> SafeString:
        return self._request_link(receipt, str(receipt.uuid)[:8])

    @admin.display(description=_("LLM request"))
    def request_field(self, receipt: CallbackResponse) -> SafeString:
        return self._request_link(receipt, str(receipt.uuid))

    def _request_link(self, receipt: CallbackResponse, label: str) -> SafeString:
        if receipt.llm_request_id is None:
            return format_html(
                '<span class="llm-uuid">{}</span> <span class="llm-note">{}</span>',
                label,
                _("not here"),
            )
        url = self.page_url(LLMRequest(pk=receipt.llm_request_id))
        return format_html('<a class="llm-uuid" href="{}">{}</a>', url, label)

    @admin.display(description=_("problem"))
    def problem_column(self, receipt: CallbackResponse) -> str:
        return text.excerpt(receipt.problem, 120) or figures.UNKNOWN

    @admin.display(description=_("received"))
    def received_column(self, receipt: CallbackResponse) -> SafeString | str:
        return figures.moment(receipt.received_at)

    @admin.display(description=_("body"))
    def body_text(self, receipt: CallbackResponse) -> SafeString:
        return body_text(receipt)

    @admin.display(description=_("header"))
    def header_text(self, receipt: CallbackResponse) -> SafeString | str:
        return text.pretty_json(receipt.header) if receipt.header else figures.UNKNOWN


def body_text(receipt: CallbackResponse) -> SafeString:
    """The stored body as text, as much of it as is shown."""
    rows: CallbackResponseQuerySet = CallbackResponse.objects.filter(pk=receipt.pk)
    row = with_beginnings(rows, text.LONGEST).values_list("beginning", "body_size").first()
    beginning, size = row or (b"", 0)
    if not beginning:
        return format_html('<p class="llm-note">{}</p>', _("empty"))
    is_cut = size > text.LONGEST
    return text.preformatted(text.decoded(bytes(beginning)), size=size if is_cut else None)
