"""``RecordAdmin``: an admin that shows what happened and does not edit it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from django.contrib import admin
from django.contrib.admin.views.main import ChangeList
from django.contrib.auth import get_permission_codename
from django.db import models
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.urls import reverse

from ..models import LLMRequest
from ..paging import LongListPaginator

if TYPE_CHECKING:
    from django.utils.functional import _StrOrPromise

    # At run time ModelAdmin takes no subscript.
    _ModelAdmin = admin.ModelAdmin[Any]
else:
    _ModelAdmin = admin.ModelAdmin

_EMPTY: tuple[Any, ...] = (None, "", [], {})


@dataclass(frozen=True)
class Tool:
    """A button on an object's page, that runs one action on this object."""

    action: str
    label: _StrOrPromise


class RecordList(ChangeList):
    model_admin: RecordAdmin
    is_exact = True

    def get_queryset(self, request: HttpRequest, exclude_parameters: Any = None) -> QuerySet[Any]:
        rows = super().get_queryset(request, exclude_parameters)
        return rows.defer(*self.model_admin.heavy_fields)

    def get_results(self, request: HttpRequest) -> None:
        super().get_results(request)
        self.is_exact = getattr(self.paginator, "is_exact", True)
        rows = list(self.result_list)
        self.model_admin.complete_page(request, rows)
        self.result_list = rows


class RecordAdmin(_ModelAdmin):
    """No adding and no changing. What changes a row is a verb of its model, used by an action."""

    heavy_fields: Sequence[str] = ()
    """Not read for the list."""
    searched_name = ""
    """The field that is searched for what is no UUID: whole, so that an index serves."""
    uuid_prefix = ""
    """What may stand before a UUID where it is shown elsewhere."""
    ordering = ("-id",)
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    paginator = LongListPaginator
    list_per_page = 50
    # Only the primary key has an index in the order of the list.
    sortable_by = ()

    class Media:
        css = {"all": ["django_qstash_llm/admin.css"]}

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_act_permission(self, request: HttpRequest) -> bool:
        """Whether the user may use verbs. It is requests that they change, from whatever page."""
        codename = get_permission_codename("change", LLMRequest._meta)
        return request.user.has_perm(f"{LLMRequest._meta.app_label}.{codename}")

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return RecordList

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        term = search_term.strip()
        if not (term and self.searched_name):
            return super().get_search_results(request, queryset, search_term)
        uuid = as_uuid(term.removeprefix(self.uuid_prefix))
        wanted = {"uuid": uuid} if uuid else {self.searched_name: term}
        return queryset.filter(**wanted), False

    def complete_page(self, request: HttpRequest, rows: list[Any]) -> None:
        """Give the rows of one page of the list what they show of other tables, all at once."""

    def tools(self, obj: Any) -> list[Tool]:
        """The buttons that make sense for ``obj`` in its state."""
        return []

    def page(self, request: HttpRequest, obj: Any) -> dict[str, Any]:
        """What the template of one object's page shows beside its fields."""
        return {}

    def render_change_form(
        self, request: HttpRequest, context: dict[str, Any], *args: Any, **kwargs: Any
    ) -> HttpResponse:
        obj = context["original"]
        if obj is None:  # it is being added
            return super().render_change_form(request, context, *args, **kwargs)
        context["tools"] = self.tools(obj) if self.has_act_permission(request) else []
        # To the list and not here: Django runs this page's POST in a transaction, and a verb may
        # have to call QStash.
        context["tools_url"] = self.list_url(self.model)
        context |= self.page(request, obj)
        return super().render_change_form(request, context, *args, **kwargs)

    def list_url(self, model: type[models.Model], query: str = "") -> str:
        return _url(self.admin_site, model, "changelist") + query

    def page_url(self, obj: models.Model) -> str:
        return _url(self.admin_site, type(obj), "change", obj.pk)


class MadeByPeople(RecordAdmin):
    """Of what, unlike what happened, is for people to make and change."""

    def has_add_permission(self, request: HttpRequest) -> bool:
        return _ModelAdmin.has_add_permission(self, request)

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return _ModelAdmin.has_change_permission(self, request, obj)

    def has_act_permission(self, request: HttpRequest) -> bool:
        return self.has_change_permission(request)


def _url(site: admin.AdminSite, model: type[models.Model], view: str, *args: Any) -> str:
    meta = model._meta
    return reverse(f"{site.name}:{meta.app_label}_{meta.model_name}_{view}", args=args)


def filled(obj: models.Model, *names: str) -> list[str]:
    """Those of ``names`` that say something about ``obj``; a 0 does, a no does not."""
    values = {name: getattr(obj, name, True) for name in names}
    return [n for n, value in values.items() if value is not False and value not in _EMPTY]


def lines(names: Sequence[str], *, wide: Collection[str] = ()) -> list[str | tuple[str, ...]]:
    """For a fieldset: three short fields to a line, each of ``wide`` on its own."""
    short = [name for name in names if name not in wide]
    in_threes = [tuple(short[first : first + 3]) for first in range(0, len(short), 3)]
    return [*in_threes, *(name for name in names if name in wide)]


def as_uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None
