"""``CostColumn``: for any site's own ModelAdmin, what requests about each of its objects cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.contrib.admin.views.main import ChangeList
from django.http import HttpRequest
from django.utils.safestring import SafeString
from django.utils.translation import gettext_lazy as _

from ..models import Spend
from . import figures

if TYPE_CHECKING:
    _ModelAdmin = admin.ModelAdmin[Any]
    _ChangeList = ChangeList
else:
    _ModelAdmin = _ChangeList = object


class _CostList(_ChangeList):
    """Adds up what the page's objects cost, once."""

    def get_results(self, request: HttpRequest) -> None:
        super().get_results(request)
        rows = list(self.result_list)
        totals = Spend.for_objects(rows)
        for row in rows:
            row._llm_total = totals[row.pk]
        self.result_list = rows


class CostColumn(_ModelAdmin):
    """Before ``ModelAdmin``, or whatever class of it, among the bases; the last column is then ``llm_cost``, unless
    ``list_display`` names it elsewhere. One query a page.

    Everybody who may see the list sees it.
    """

    def get_list_display(self, request: HttpRequest) -> Any:
        shown = super().get_list_display(request)
        return shown if "llm_cost" in shown else (*shown, "llm_cost")

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        usual = super().get_changelist(request, **kwargs)
        return type("CostList", (_CostList, usual), {})

    @admin.display(description=_("cost of LLM requests"))
    def llm_cost(self, obj: Any) -> SafeString | str:
        total = getattr(obj, "_llm_total", None)
        return figures.total(Spend.for_object(obj) if total is None else total)
