"""``RecordAdmin``: an admin that shows what is there, and changes it by verbs only."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.admin.views.main import ChangeList
from django.db import models
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils import timezone
from django.utils.text import capfirst
from django.utils.translation import gettext_lazy as _
from django.utils.translation import ngettext

from ...limits import Trouble
from ...paging import LongListPaginator
from ..models import Gate
from ..overview import DEFAULT
from ..waiting import at
from .filters import AccountFilter, are_several_accounts

if TYPE_CHECKING:
    from django.utils.functional import _StrOrPromise

    # At run time ModelAdmin takes no subscript.
    _ModelAdmin = admin.ModelAdmin[Any]
else:
    _ModelAdmin = admin.ModelAdmin

_EMPTY: tuple[Any, ...] = (None, "", [], {})
FROM_PAGE = "from_page"
"""In a POST: the button on the object's page was used, so go back there."""
CONFIRMED = "confirmed"
MOST_TROUBLED = 10
"""Gates that a list warns of."""


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
    """No adding, editing or deleting by form."""

    heavy_fields: Sequence[str] = ()
    """Not read for the list."""
    sections: Sequence[tuple[_StrOrPromise | None, Sequence[str]]] = ()
    """What the page of one object shows, each section under its title."""
    wide: Collection[str] = ()
    """Those that get a line of their own."""
    change_list_template = "admin/qstash_server/change_list.html"
    account_filter: type[AccountFilter] = AccountFilter
    account_field = "account"
    list_per_page = 50
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    paginator = LongListPaginator
    # Only the primary key has an index in the order of the list.
    sortable_by = ()

    class Media:
        css = {"all": ["qstash_server/admin.css"]}

    # --- who may what ---

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        # The actions change something; the form must not.
        return obj is None and super().has_change_permission(request, obj)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    # --- what is shown ---

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return RecordList

    def complete_page(self, request: HttpRequest, rows: list[Any]) -> None:
        """Give the rows of one page of the list what they show of other tables, all at once."""

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        # Nothing is selected "to change".
        title = capfirst(str(self.opts.verbose_name_plural))
        context = {"title": title, "troubled": self.troubled(request), **(extra_context or {})}
        return super().changelist_view(request, context)

    def troubled(self, request: HttpRequest) -> list[tuple[Gate, str, str]]:
        """What stands still until a person does something: the gate, its page, and what to do."""
        if not request.user.has_perm(f"{self.opts.app_label}.view_gate"):
            return []
        view = f"{self.admin_site.name}:{self.opts.app_label}_gate_change"
        return [
            (gate, reverse(view, args=[gate.pk]), Trouble(gate.trouble).remedy)
            for gate in Gate.objects.troubled()[:MOST_TROUBLED]
        ]

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        return [name for _title, names in self.sections for name in names]

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> list[Any]:
        """Three short fields to a line, and none that says nothing."""
        shown: list[Any] = []
        for title, names in self.sections:
            said = [name for name in names if getattr(obj, name, True) not in _EMPTY]
            short = [name for name in said if name not in self.wide]
            in_threes = [tuple(short[first : first + 3]) for first in range(0, len(short), 3)]
            lines = [*in_threes, *(name for name in said if name in self.wide)]
            if lines:
                shown.append((title, {"fields": lines}))
        return shown

    def get_list_display(self, request: HttpRequest) -> list[Any]:
        first, *others = super().get_list_display(request)
        return [first, *(["account_name"] if are_several_accounts() else []), *others]

    def get_list_filter(self, request: HttpRequest) -> list[Any]:
        filters = list(super().get_list_filter(request))
        return [self.account_filter, *filters] if are_several_accounts() else filters

    @admin.display(description=_("account"))
    def account_name(self, obj: Any) -> str:
        owner = obj
        for name in self.account_field.split("__"):
            owner = getattr(owner, name)
        return str(owner) or DEFAULT

    @admin.display(description=_("changed"))
    def changed(self, obj: Any) -> str:
        return at(obj.updated_at, timezone.now())

    # --- what can be done ---

    def tools(self, obj: Any) -> list[Tool]:
        """The buttons that make sense for ``obj`` as it is."""
        return []

    def page(self, request: HttpRequest, obj: Any) -> dict[str, Any]:
        """What the template of one object's page shows beside its fields."""
        return {}

    def render_change_form(
        self, request: HttpRequest, context: dict[str, Any], *args: Any, **kwargs: Any
    ) -> HttpResponse:
        obj = context["original"]
        may_act = super().has_change_permission(request)
        context |= {"may_act": may_act, "tools": self.tools(obj) if may_act else []}
        context |= {"tools_url": self.list_url(), "from_page": FROM_PAGE}
        context |= self.page(request, obj)
        return super().render_change_form(request, context, *args, **kwargs)

    def say(self, request: HttpRequest, one: str, many: str, count: int) -> None:
        self.message_user(request, ngettext(one, many, count) % {"count": count}, messages.SUCCESS)

    def use(
        self,
        request: HttpRequest,
        rows: QuerySet[Any],
        verb: Callable[[Any], Any],
        *,
        note: str,
        one: str,
        many: str,
    ) -> HttpResponse | None:
        """Use ``verb`` on each of ``rows``, and keep in Django's own log who did."""
        chosen = list(rows)
        for row in chosen:
            # First: its verb may take its key from it.
            self.log_change(request, row, note)
            verb(row)
        self.say(request, one, many, len(chosen))
        return self.back(request, chosen[0] if chosen and chosen[0].pk else None)

    def back(self, request: HttpRequest, obj: models.Model | None) -> HttpResponse | None:
        """To ``obj``'s page when its button was used; None leaves it to Django: the list."""
        if FROM_PAGE in request.POST and obj is not None:
            return HttpResponseRedirect(self.page_url(obj))
        return None

    def confirm(
        self, request: HttpRequest, rows: QuerySet[Any], *, title: str, text: str
    ) -> HttpResponse:
        """The page that asks whether that is really meant."""
        request.current_app = self.admin_site.name
        context = {
            **self.admin_site.each_context(request),
            "title": title,
            "text": text,
            "opts": self.opts,
            "media": self.media,
            "rows": [str(row) for row in rows[:20]],
            "action": request.POST["action"],
            "selected": request.POST.getlist(ACTION_CHECKBOX_NAME),
            "select_across": request.POST.get("select_across", "0"),
            "checkbox_name": ACTION_CHECKBOX_NAME,
            "confirmed": CONFIRMED,
            "post_url": request.get_full_path(),
        }
        return TemplateResponse(request, "admin/qstash_server/confirmation.html", context)

    def list_url(self) -> str:
        return reverse(f"{self._url_name}_changelist")

    def page_url(self, obj: models.Model) -> str:
        return reverse(f"{self._url_name}_change", args=[obj.pk])

    @property
    def _url_name(self) -> str:
        return f"{self.admin_site.name}:{self.opts.app_label}_{self.opts.model_name}"
