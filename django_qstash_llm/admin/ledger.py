"""The ledger: one line for each answer that was billed. Nobody writes in it here."""

from __future__ import annotations

from datetime import datetime, time, timedelta
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils import timezone
from django.utils.dateparse import parse_date
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext_lazy as _

from ..models import LedgerEntry, LLMRequest
from . import figures, text
from .filters import ProviderFilter
from .record import RecordAdmin, as_uuid, lines

if TYPE_CHECKING:
    from django.utils.functional import _StrOrPromise

Lookups = list[tuple[Any, "_StrOrPromise"]]

MOST_FILTERED = 200_000
SOURCES: tuple[tuple[str, Any], ...] = (
    ("reported", _("reported by the provider")),
    ("own", _("a price of yours")),
    ("setting", _("a setting")),
    ("hosted", _("the hosted models' price")),
    ("genai-prices", "genai-prices"),
    ("estimated", _("estimated")),
)


class SourceFilter(admin.SimpleListFilter):
    title = _("source of its cost")
    parameter_name = "source"

    def lookups(self, request: HttpRequest, model_admin: Any) -> Lookups:
        return list(SOURCES)

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(cost_source=self.value()) if self.value() else queryset


class KindFilter(admin.SimpleListFilter):
    title = _("what it says")
    parameter_name = "kind"

    def lookups(self, request: HttpRequest, model_admin: Any) -> Lookups:
        return [
            ("unpriced", _("unpriced")),
            ("in_vain", _("paid for in vain")),
            ("difference", _("a difference that became known later")),
        ]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        match self.value():
            case "unpriced":
                return queryset.filter(unpriced__gt=0)
            case "in_vain":
                return queryset.filter(spent__gt=0, useful=0)
            case "difference":
                return queryset.filter(number__gt=0)
        return queryset


class TypedFilter(admin.SimpleListFilter):
    """Of what somebody has typed or followed a link to: there are too many values to list them."""

    template = "admin/django_qstash_llm/typed_filter.html"

    def lookups(self, request: HttpRequest, model_admin: Any) -> Lookups:
        return [("", "")]  # without any Django leaves the filter out

    def choices(self, changelist: Any) -> Any:
        others = changelist.get_filters_params()
        others.pop(self.parameter_name, None)
        yield {
            "value": self.value() or "",
            "type": "text",
            "others": [(name, each) for name, values in others.items() for each in values],
            "is_selected": bool(self.value()),
            "clear": changelist.get_query_string(remove=[self.parameter_name]),
        }


class ModelFilter(TypedFilter):
    title = _("model")
    parameter_name = "model"

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(model=self.value()) if self.value() else queryset


class DayFilter(TypedFilter):
    title = _("day")
    parameter_name = "day"

    def choices(self, changelist: Any) -> Any:
        for choice in super().choices(changelist):
            yield choice | {"type": "date"}

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        try:
            day = parse_date(self.value() or "")
        except ValueError:  # the 30th of February
            day = None
        if day is None:
            return queryset
        # The index is over moments. A day of whatever time zone is among these three.
        start = datetime.combine(day, time.min) - timedelta(days=1)
        if settings.USE_TZ:
            start = timezone.make_aware(start)
        return queryset.filter(day=day, at__gte=start, at__lt=start + timedelta(days=3))


@admin.register(LedgerEntry)
class LedgerEntryAdmin(RecordAdmin):
    list_display = (
        "when_column",
        "request_column",
        "model_column",
        "tokens_column",
        "spent_column",
        "useful_column",
        "source_column",
    )
    list_display_links = ("when_column",)
    list_filter = (ProviderFilter, ModelFilter, SourceFilter, KindFilter, DayFilter)
    # Only makes the box appear; see get_search_results.
    search_fields = ("uuid",)
    search_help_text = _(
        "The UUID of a request. Filters look at the newest 200,000 entries; with a day, at all of it."
    )

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        term = search_term.strip()
        if not term:
            return self._newest(request, queryset), False
        uuid = as_uuid(term)
        return (queryset.filter(uuid=uuid) if uuid else queryset.none()), False

    def _newest(self, request: HttpRequest, rows: QuerySet[Any]) -> QuerySet[Any]:
        """No index serves the other filters, and the last page of what is seldom is far away."""
        if not rows.query.where or request.GET.get(DayFilter.parameter_name):
            return rows
        last = (
            LedgerEntry.objects.using(rows.db).order_by("-pk").values_list("pk", flat=True).first()
        )
        return rows.filter(pk__gt=(last or 0) - MOST_FILTERED)

    def complete_page(self, request: HttpRequest, rows: list[LedgerEntry]) -> None:
        """Which requests are still there to be looked at."""
        uuids = {row.uuid for row in rows}
        there: dict[Any, Any] = {}
        if self._may_look_at_requests(request):
            found = LLMRequest.objects.filter(uuid__in=uuids)
            there = dict(found.values_list("uuid", "pk"))
        for row in rows:
            row.request_pk = there.get(row.uuid)  # type: ignore[attr-defined]

    def _may_look_at_requests(self, request: HttpRequest) -> bool:
        if not self.admin_site.is_registered(LLMRequest):
            return False
        return self.admin_site.get_model_admin(LLMRequest).has_view_permission(request)

    def get_object(self, request: HttpRequest, object_id: str, from_field: Any = None) -> Any:
        entry = super().get_object(request, object_id, from_field)
        if entry is not None:
            self.complete_page(request, [entry])
        return entry

    # --- what is shown ---

    @admin.display(description=_("answered"))
    def when_column(self, entry: LedgerEntry) -> SafeString | str:
        return figures.moment(entry.at)

    @admin.display(description=_("request"))
    def request_column(self, entry: Any) -> SafeString | str:
        key = str(entry.uuid)
        if getattr(entry, "request_pk", None) is None:
            return format_html('<span class="llm-uuid llm-quiet">{}</span>', key)
        url = self.page_url(LLMRequest(pk=entry.request_pk))
        return format_html('<a class="llm-uuid" href="{}">{}</a>', url, key[:8])

    @admin.display(description=_("model"))
    def model_column(self, entry: LedgerEntry) -> SafeString:
        model = text.excerpt(entry.model, 60)
        return format_html('{}<br><span class="llm-quiet">{}</span>', model, entry.provider)

    @admin.display(description=_("tokens"))
    def tokens_column(self, entry: LedgerEntry) -> str:
        return f"{figures.count(entry.input_tokens)} → {figures.count(entry.output_tokens)}"

    @admin.display(description=_("spent"))
    def spent_column(self, entry: LedgerEntry) -> SafeString:
        return figures.entry_cost(entry, entry.spent)

    @admin.display(description=_("of it useful"))
    def useful_column(self, entry: LedgerEntry) -> SafeString:
        return figures.entry_cost(entry, entry.useful)

    @admin.display(description=_("source"))
    def source_column(self, entry: LedgerEntry) -> str:
        source = entry.cost_source or figures.UNKNOWN
        return f"{source} · {_('difference')}" if entry.number else source

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        whose = [n for n in ("tenant", "user", "about_model", "api_key", "labels_field")
                 if getattr(obj, n, "") or (n == "labels_field" and obj.labels)]  # fmt: skip
        tokens = [n for n in ("input_tokens", "output_tokens", "cached_tokens", "cache_write_tokens",
                              "reasoning_tokens") if getattr(obj, n)]  # fmt: skip
        groups = (
            (None, ["request_column", "answer", "number", "at", "entered_at", "day"]),
            (_("Money"), ["spent_column", "useful_column", "source_column", "answers", "unpriced"]),
            (_("Tokens"), tokens),
            (_("Of"), ["provider", "model", *whose]),
        )
        return [(name, {"fields": lines(fields)}) for name, fields in groups if fields]

    @admin.display(description=_("labels"))
    def labels_field(self, entry: LedgerEntry) -> str:
        return ", ".join(map(str, entry.labels))
