"""The list of requests and one request's page."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode
from uuid import UUID

from django.contrib import admin
from django.contrib.contenttypes.models import ContentType
from django.db.models import Model, Q, QuerySet
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.utils import formats, timezone
from django.utils.dateparse import parse_datetime
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.translation import gettext, ngettext
from django.utils.translation import gettext_lazy as _

from ..exceptions import ConfigurationError
from ..models import CallbackResponse, LedgerEntry, LLMRequest, Spend
from ..models.callback import Kind
from ..models.ledger import SUMMED, Total
from ..models.price import PLACES, TokenClass
from ..models.replay import TO_READ_AGAIN, may_be_read_anew
from ..models.request import ANNOUNCED, UNFINISHED, LLMRequestQuerySet, State
from . import about, actions, callback, chat, figures, story, text
from .filters import AttentionFilter, ProviderFilter, TenantFilter, TroubleFilter
from .health import HealthMixin
from .record import RecordAdmin, Tool, filled, lines

_HEX = set("0123456789abcdef")
_SHORTEST_PREFIX = 6
_WIDE = {"metadata_field", "usage_field", "announce_error"}
MOST_ENTRIES = 50
_WORDS_READ = 4096
"""Bytes of an attempt's body that are read for a line about it."""


@dataclass(frozen=True)
class Attempt:
    """One receipt as a line of the timeline."""

    url: str
    receipt: CallbackResponse

    @property
    def sign(self) -> SafeString:
        return callback.kind_sign(self.receipt)

    @property
    def number(self) -> str:
        return callback.attempt(self.receipt)

    @property
    def status(self) -> str:
        return callback.status(self.receipt)

    @property
    def trouble(self) -> str:
        return callback.trouble(self.receipt)

    @property
    def words(self) -> str:
        return callback.words(self.receipt)

    @property
    def named_wait(self) -> str:
        return callback.named_wait(self.receipt)

    @property
    def next_try(self) -> SafeString | str:
        return callback.next_try(self.receipt)

    @property
    def received(self) -> SafeString | str:
        return figures.moment(self.receipt.received_at)


@admin.register(LLMRequest)
class LLMRequestAdmin(HealthMixin, RecordAdmin):
    list_display = (
        "state_column",
        "request_column",
        "about_column",
        "cost_column",
        "time_column",
    )
    list_display_links = ("request_column",)
    list_filter = ("state", ProviderFilter, "via", TenantFilter, AttentionFilter, TroubleFilter)
    # Only makes the box appear; see get_search_results.
    search_fields = ("uuid",)
    search_help_text = _(
        "A UUID or its beginning, a QStash message id, a tenant, or the primary key of what a "
        "request is about."
    )
    actions = (
        "resubmit",
        "retry_dead_letter",
        "drop_dead_letter",
        "read_again",
        "cancel",
        "announce_again",
    )
    heavy_fields = (
        "messages",
        "parameters",
        "metadata",
        "labels",
        "completion",
        "refusal",
        "tool_calls",
        "usage",
        "cost_basis",
        "error",
        "announce_error",
    )

    # --- the list ---

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        """Lookups that an index can serve; none reads through texts."""
        term = search_term.strip()
        if not term:
            return queryset, False
        if term.startswith("msg_"):
            return queryset.filter(qstash_message_id=term), False
        # With the types named, the index that begins with them serves.
        content_types = list(ContentType.objects.values_list("pk", flat=True))
        wanted = Q(content_type__in=content_types, object_id=term) | Q(tenant=term)
        uuids = _uuids_that_begin(term)
        if uuids:
            wanted |= Q(uuid__range=uuids)
        return queryset.filter(wanted), False

    def complete_page(self, request: HttpRequest, rows: list[LLMRequest]) -> None:
        shown = about.links(rows, self.admin_site, request)
        spent = self._spent(rows)
        for row in rows:
            row.about_shown = shown[row.pk]  # type: ignore[attr-defined]
            row.total = spent.get(row.uuid, Total())  # type: ignore[attr-defined]

    def _spent(self, rows: list[LLMRequest]) -> dict[Any, Total]:
        """What each came to, answers that nobody read included."""
        entries = LedgerEntry.objects.using(rows[0]._state.db) if rows else LedgerEntry.objects
        sums: dict[Any, Total] = defaultdict(Total)
        for entry in entries.filter(uuid__in=[row.uuid for row in rows]):
            sums[entry.uuid] += Total(**{name: getattr(entry, name) for name in SUMMED})
        return sums

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        response = super().changelist_view(request, extra_context)
        if isinstance(response, TemplateResponse) and response.context_data:
            changelist = response.context_data.get("cl")
            rows = changelist.result_list if changelist else ()
            total = sum((row.total for row in rows if hasattr(row, "total")), Total())
            response.context_data["page_total"] = total if total.answers else None
            response.context_data["page_cost"] = figures.total(total)
            response.context_data["page_useful"] = figures.amount(total.useful)
            if self._may_look_at(request, Spend):
                response.context_data["spend_url"] = self.list_url(Spend)
        return response

    def _may_look_at(self, request: HttpRequest, model: type[Model]) -> bool:
        if not self.admin_site.is_registered(model):
            return False
        return self.admin_site.get_model_admin(model).has_view_permission(request)

    # Two lines a cell: the menu and the filter leave little room beside them.

    @admin.display(description=_("state"))
    def state_column(self, llm_request: LLMRequest) -> SafeString:
        number = llm_request.attempts
        attempts = ngettext("%d attempt", "%d attempts", number) % number if number else ""
        return _two_lines(figures.state_sign(llm_request.state), attempts)

    @admin.display(description=_("request"))
    def request_column(self, llm_request: LLMRequest) -> SafeString:
        key = str(llm_request.uuid)[:8]
        model = text.excerpt(llm_request.model, 60)
        return _two_lines(model, format_html("{} · {}", llm_request.provider, key))

    @admin.display(description=_("about · via"))
    def about_column(self, llm_request: LLMRequest) -> SafeString:
        via = llm_request.get_via_display()
        if llm_request.queue:
            via = f"{via} · {text.excerpt(llm_request.queue, 40)}"
        about_shown = getattr(llm_request, "about_shown", figures.UNKNOWN)
        return format_html('{}<br><span class="llm-quiet">{}</span>', about_shown, via)

    @admin.display(description=_("cost · tokens"))
    def cost_column(self, llm_request: LLMRequest) -> SafeString:
        tokens = figures.tokens(llm_request)
        cost = figures.cost(llm_request)
        total: Total = getattr(llm_request, "total", Total())
        second: SafeString | str = "" if tokens == figures.UNKNOWN else tokens
        if total.spent != total.useful and total.cost is not None:
            # Paid for more than once, or in vain.
            spent = format_html(gettext("{} spent"), figures.amount(total.spent))
            second = format_html("{}<br>{}", second, spent) if second else spent
        return _two_lines(cost, second)

    @admin.display(description=_("asked · took"))
    def time_column(self, llm_request: LLMRequest) -> SafeString:
        asked, finished = llm_request.created_at, llm_request.finished_at
        took = figures.duration(finished - asked) if finished else figures.UNKNOWN
        return _two_lines(figures.moment(llm_request.created_at), took)

    # --- the page ---

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        """Only what says something about this one."""
        groups = (
            (
                _("Belongs to"),
                (),
                ("about_field", "user", "tenant_field", "caller", "api_key", "labels_field", "metadata_field", "batch",
                 "conversation", "trigger", "resubmission_of", "resubmissions_field"),
            ),
            (
                _("Delivery"),
                ("collapse",),
                ("via", "queue", "not_before", "retries", "retry_delay", "timeout",
                 "flow_control", "redact", "qstash_message_id", "dead_letter_id",
                 "submission_number", "submission_tries", "first_tried_at", "submit_after",
                 "deadline_at", *(("inquiries",) if getattr(obj, "inquiries", 0) else ())),
            ),
            (
                _("Answer"),
                ("collapse",),
                ("completion_id", "answered_by", "finish_reason", "usage_field"),
            ),
            (
                _("Announcing"),
                ("collapse",),
                ("announced_at", "announce_tries", "announce_after", "announce_error"),
            ),
        )  # fmt: skip
        fieldsets = []
        for name, classes, fields in groups:
            shown = [f for f in filled(obj, *fields) if self._has_something(f, obj)]
            if shown:
                options = {"fields": lines(shown, wide=_WIDE), "classes": classes}
                fieldsets.append((name, options))
        return fieldsets

    def _has_something(self, name: str, obj: LLMRequest) -> bool:
        method = getattr(self, name, None)
        return method is None or method(obj) not in {"", figures.UNKNOWN}

    def page(self, request: HttpRequest, obj: LLMRequest) -> dict[str, Any]:
        first, left_out, last = chat.bubbles(obj.messages)
        attempts = self._attempts(request, obj)
        telling = max(attempts, key=_is_telling, default=None)
        kind_of_trouble, trouble = story.trouble(obj)
        return {
            "state_sign": figures.state_sign(obj.state),
            "sentences": [
                *story.sentences(obj, now=timezone.now()),
                *story.last_attempt(obj, [attempt.receipt for attempt in attempts]),
            ],
            "moments": story.moments(obj),
            "trouble_kind": kind_of_trouble,
            "trouble": text.preformatted(trouble) if trouble else "",
            "announce_trouble": _announce_trouble(obj),
            "first_messages": first,
            "messages_left_out": left_out,
            "last_messages": last,
            "answer": chat.answer(obj),
            "usage_rows": _usage_rows(obj),
            "cost": figures.money(obj.cost, decimals=12) if obj.cost is not None else "",
            "cost_cell": figures.cost(obj),
            "cost_in_words": _cost_in_words(obj),
            "price_in_words": _price_in_words(obj),
            **self._ledger(obj),
            "attempts": attempts,
            "raw_request": _raw_request(obj),
            "raw_response": telling and callback.body_text(telling.receipt),
            "raw_header": telling and _header(telling.receipt),
        }

    def _ledger(self, obj: Any) -> dict[str, Any]:
        """Its entries, and what they come to."""
        entries = LedgerEntry.objects.using(obj._state.db).filter(uuid=obj.uuid).order_by("pk")
        return {
            "entries": [
                (
                    entry.answer,
                    figures.moment(entry.entered_at if entry.number else entry.at),
                    f"{figures.count(entry.input_tokens)} → {figures.count(entry.output_tokens)}",
                    figures.entry_cost(entry, entry.spent),
                    figures.entry_cost(entry, entry.useful),
                    entry.cost_source or figures.UNKNOWN,
                    bool(entry.number),
                )
                for entry in entries[:MOST_ENTRIES]
            ],
            "spent": figures.total(obj.total),
            "useful": figures.amount(obj.total.useful, decimals=12),
            "is_in_vain": obj.total.spent != obj.total.useful,
        }

    def _attempts(self, request: HttpRequest, obj: LLMRequest) -> list[Attempt]:
        if not self.admin_site.is_registered(CallbackResponse):
            return []
        if not self.admin_site.get_model_admin(CallbackResponse).has_view_permission(request):
            return []
        receipts = callback.with_beginnings(obj.callback_responses.defer("header"), _WORDS_READ)
        # What could not be read says of no attempt which one it was.
        in_order = sorted(receipts, key=lambda r: (r.kind == Kind.QUARANTINED, r.retried, r.pk))
        return [Attempt(self.page_url(receipt), receipt) for receipt in in_order]

    @admin.display(description=_("about"))
    def about_field(self, llm_request: LLMRequest) -> SafeString | str:
        shown: SafeString | str = getattr(llm_request, "about_shown", "")
        return shown

    def get_object(self, request: HttpRequest, object_id: str, from_field: Any = None) -> Any:
        llm_request = super().get_object(request, object_id, from_field)
        if llm_request is not None:
            self.complete_page(request, [llm_request])
            # Once: Django asks for the fieldsets several times.
            again = llm_request.resubmissions.only("uuid", "state", "resubmission_of").order_by(
                "id"
            )
            llm_request.resubmitted_as = list(again[:20])
        return llm_request

    @admin.display(description=_("tenant"))
    def tenant_field(self, llm_request: LLMRequest) -> SafeString | str:
        if not llm_request.tenant:
            return ""
        query = urlencode({"tenant": llm_request.tenant})
        url = self.list_url(self.model, f"?{query}")
        return format_html('<a href="{}">{}</a>', url, llm_request.tenant)

    @admin.display(description=_("labels"))
    def labels_field(self, llm_request: LLMRequest) -> SafeString:
        labels = llm_request.labels if isinstance(llm_request.labels, list) else []
        return format_html_join(
            " ", '<span class="llm-label">{}</span>', ((str(label),) for label in labels)
        )

    @admin.display(description=_("metadata"))
    def metadata_field(self, llm_request: LLMRequest) -> SafeString | str:
        return text.pretty_json(llm_request.metadata) if llm_request.metadata else ""

    @admin.display(description=_("usage as reported"))
    def usage_field(self, llm_request: LLMRequest) -> SafeString | str:
        return text.pretty_json(llm_request.usage) if llm_request.usage else ""

    @admin.display(description=_("resubmitted as"))
    def resubmissions_field(self, llm_request: Any) -> SafeString:
        return format_html_join(
            " ",
            '<a class="llm-uuid" href="{}">{}</a> {}',
            (
                (self.page_url(row), str(row.uuid)[:8], figures.state_sign(row.state))
                for row in llm_request.resubmitted_as
            ),
        )

    # --- what can be done ---

    def tools(self, obj: LLMRequest) -> list[Tool]:
        is_unfinished = obj.state in UNFINISHED
        tools = []
        if is_unfinished:
            tools.append(Tool("cancel", _("Cancel")))
        elif obj.messages:  # what was forgotten cannot be asked again
            tools.append(Tool("resubmit", _("Resubmit…")))
        if obj.state == State.FAILED and obj.dead_letter_id:
            tools.append(Tool("retry_dead_letter", _("Retry from dead letter…")))
        if obj.dead_letter_id and not is_unfinished:
            tools.append(Tool("drop_dead_letter", _("Drop dead letter")))
        if obj.callback_responses.filter(TO_READ_AGAIN).exists() or may_be_read_anew(obj):
            tools.append(Tool("read_again", _("Read the answer again")))
        if obj.state in ANNOUNCED and obj.announced_at is None and obj.announce_tries:
            tools.append(Tool("announce_again", _("Announce again")))
        return tools

    @admin.action(permissions=["act"], description=_("Resubmit selected %(verbose_name_plural)s…"))
    def resubmit(self, request: HttpRequest, queryset: LLMRequestQuerySet) -> HttpResponse | None:
        rows = _afresh(queryset)
        if actions.CONFIRMED not in request.POST:
            keys = list(rows.order_by("pk").values_list("pk", flat=True)[: actions.MOST_AT_ONCE])
            return actions.confirm_resubmission(
                self, request, rows, action="resubmit", selected=keys
            )
        outcome = actions.resubmit(self, request, rows)
        return actions.back_to_page(
            self, request, outcome.done[0][1] if outcome.done else rows.first()
        )

    @admin.action(
        permissions=["act"],
        description=_("Retry selected %(verbose_name_plural)s from their dead letters…"),
    )
    def retry_dead_letter(
        self, request: HttpRequest, queryset: LLMRequestQuerySet
    ) -> HttpResponse | None:
        rows = _afresh(queryset)
        if actions.CONFIRMED not in request.POST:
            return actions.confirm_retry(self, request, rows, action="retry_dead_letter")
        first = rows.first()
        actions.retry_dead_letter(self, request, rows)
        return actions.back_to_page(self, request, first)

    @admin.action(
        permissions=["act"],
        description=_("Drop the dead letters of selected %(verbose_name_plural)s"),
    )
    def drop_dead_letter(
        self, request: HttpRequest, queryset: LLMRequestQuerySet
    ) -> HttpResponse | None:
        rows = _afresh(queryset)
        first = rows.first()
        actions.drop_dead_letter(self, request, rows)
        return actions.back_to_page(self, request, first)

    @admin.action(
        permissions=["act"],
        description=_("Read the answers of selected %(verbose_name_plural)s again"),
    )
    def read_again(self, request: HttpRequest, queryset: LLMRequestQuerySet) -> HttpResponse | None:
        rows = _afresh(queryset)
        first = rows.first()
        actions.read_again(self, request, rows)
        return actions.back_to_page(self, request, first)

    @admin.action(permissions=["act"], description=_("Cancel selected %(verbose_name_plural)s"))
    def cancel(self, request: HttpRequest, queryset: LLMRequestQuerySet) -> HttpResponse | None:
        rows = _afresh(queryset)
        actions.cancel(self, request, rows)
        return actions.back_to_page(self, request, rows.first())

    @admin.action(
        permissions=["act"], description=_("Announce selected %(verbose_name_plural)s again")
    )
    def announce_again(
        self, request: HttpRequest, queryset: LLMRequestQuerySet
    ) -> HttpResponse | None:
        rows = _afresh(queryset)
        actions.announce_again(self, request, rows)
        return actions.back_to_page(self, request, rows.first())


def _afresh(queryset: LLMRequestQuerySet) -> LLMRequestQuerySet:
    """The same rows, whole: the list leaves out the heavy fields."""
    return queryset.defer(None)


def _uuids_that_begin(term: str) -> tuple[UUID, UUID] | None:
    """The first and the last UUID that begin with ``term``."""
    digits = term.lower().replace("-", "")
    if not _SHORTEST_PREFIX <= len(digits) <= 32 or not set(digits) <= _HEX:
        return None
    return UUID(digits.ljust(32, "0")), UUID(digits.ljust(32, "f"))


def _two_lines(first: SafeString | str, second: SafeString | str) -> SafeString:
    if not second:
        return format_html('<span class="llm-figure">{}</span>', first)
    return format_html(
        '<span class="llm-figure">{}</span><br><span class="llm-quiet">{}</span>', first, second
    )


def _is_telling(attempt: Attempt) -> tuple[bool, int]:
    """The answer tells more than any failure, and later news more than earlier."""
    return 200 <= attempt.receipt.status < 300, attempt.receipt.pk


def _announce_trouble(obj: LLMRequest) -> SafeString | str:
    is_open = obj.announced_at is None and obj.announce_error
    return text.preformatted(obj.announce_error) if is_open else ""


def _usage_rows(obj: LLMRequest) -> Iterator[tuple[Any, str]]:
    names = (
        (_("input"), obj.input_tokens),
        (_("of it read from a cache"), obj.cached_tokens),
        (_("of it written to a cache"), obj.cache_write_tokens),
        (_("output"), obj.output_tokens),
        (_("of it reasoning"), obj.reasoning_tokens),
    )
    counted = obj.counted
    more = (
        (_("of it kept in a cache for an hour"), counted.cache_write_1h_tokens or None),
        (_("of the input sound"), counted.audio_input_tokens or None),
        (_("of the output sound"), counted.audio_output_tokens or None),
        (_("of the input images"), counted.image_input_tokens or None),
        (_("of the output images"), counted.image_output_tokens or None),
        (_("web searches"), counted.web_searches or None),
    )
    return ((name, figures.count(n)) for name, n in (*names, *more) if n is not None)


def _cost_in_words(obj: LLMRequest) -> str:
    """How it comes about: ``1,200 input × $0.25/M + 300 output × $2.00/M``."""
    return " + ".join(
        f"{figures.count(line.number)} {TokenClass(line.token_class).label}"
        f" × {figures.money(line.price, decimals=PLACES)}/M"
        for line in obj.cost_lines
    )


def _price_in_words(obj: LLMRequest) -> str:
    """Which price that was, and of when."""
    at = parse_datetime(obj.cost_basis.get("at") or "")
    moment = formats.date_format(timezone.localtime(at), "DATETIME_FORMAT") if at else ""
    return ", ".join(filter(None, [obj.cost_basis.get("price", ""), moment]))


def _raw_request(obj: LLMRequest) -> SafeString:
    try:
        asked = json.loads(obj.body())
    except (ConfigurationError, TypeError, ValueError):
        # Its provider has left the settings since: what the row holds says it as well.
        asked = {"model": obj.model, "messages": obj.messages, **(obj.parameters or {})}
    return text.pretty_json(asked)


def _header(receipt: CallbackResponse) -> SafeString | str:
    header = CallbackResponse.objects.values_list("header", flat=True).get(pk=receipt.pk)
    return text.pretty_json(header) if header else ""
