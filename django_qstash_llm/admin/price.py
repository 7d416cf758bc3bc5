"""Prices: what a model costs and has cost, a form to set another, and the models without one."""

from __future__ import annotations

from typing import Any

from django import forms
from django.contrib import admin, messages
from django.contrib.admin.widgets import AdminSplitDateTime
from django.core.exceptions import PermissionDenied, ValidationError
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import path
from django.utils import timezone
from django.utils.safestring import SafeString
from django.utils.translation import gettext, ngettext
from django.utils.translation import gettext_lazy as _

from ..exceptions import InvalidRequest
from ..models import LLMRequest, Price
from ..models.price import KEY, NOTICE, PLACES
from . import actions, figures
from .record import RecordAdmin, Tool


class PriceForm(forms.ModelForm):  # type: ignore[type-arg]
    """One class of a model from a moment on. It is set when it is looked through: only so is it known
    whether it can be."""

    since = forms.SplitDateTimeField(
        required=False,
        widget=AdminSplitDateTime,
        label=_("since"),
        help_text=_("Empty is now; a change of a known price begins in a minute."),
    )

    class Meta:
        model = Price
        fields = (*KEY, "amount", "since", "source")

    def clean(self) -> dict[str, Any]:
        given = super().clean() or {}
        if self.errors:
            return given
        further = {name: given[name] for name in ("tier", "above", "since")}
        amounts = {given["token_class"]: given["amount"]}
        try:
            self.new = Price.objects.set(
                given["provider"],
                given["model"],
                amounts,
                source=given["source"] or self.who,
                **further,
            )
        except InvalidRequest as error:
            name = "amount" if error.field == "amounts" else error.field
            raise ValidationError({name: error.problem}) from error
        if not self.new:
            raise ValidationError({"amount": _("It costs that already.")})
        return given

    new: list[Price]
    who: str

    def _get_validation_exclusions(self) -> set[str]:
        # Seen to by ``set``. Django 5.2 has no other name for that.
        return {*super()._get_validation_exclusions(), *KEY}  # type: ignore[misc]

    def validate_constraints(self) -> None:
        """None are left to be kept: what was to be written is."""


@admin.register(Price)
class PriceAdmin(RecordAdmin):
    list_display = (
        "model_column",
        "token_class",
        "tier",
        "above_column",
        "amount_column",
        "since",
        "until",
        "source",
    )
    list_filter = ("provider", ("until", admin.EmptyFieldListFilter), "tier", "token_class")
    search_fields = ("model", "provider")
    actions = ("withdraw",)
    change_list_template = "admin/django_qstash_llm/price/change_list.html"
    fields = (
        ("provider", "model"),
        ("token_class", "amount"),
        ("tier", "above"),
        "since",
        "source",
    )

    def get_fields(self, request: HttpRequest, obj: Price | None = None) -> Any:
        return (*self.fields, "until", "created_at") if obj else self.fields

    def get_urls(self) -> list[Any]:
        meta = self.model._meta
        view = self.admin_site.admin_view(self.unpriced_view)
        name = f"{meta.app_label}_{meta.model_name}_unpriced"
        return [path("unpriced/", view, name=name), *super().get_urls()]

    def unpriced_view(self, request: HttpRequest) -> HttpResponse:
        """Models in use without a price, and how often they answered."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        context = {
            **self.admin_site.each_context(request),
            "opts": self.opts,
            "title": _("Models without a price"),
            "media": self.media,
            "rows": LLMRequest.objects.unpriced_models(),
            "list_url": self.list_url(self.model),
        }
        request.current_app = self.admin_site.name
        return TemplateResponse(request, "admin/django_qstash_llm/price/unpriced.html", context)

    # --- setting one ---

    def has_add_permission(self, request: HttpRequest) -> bool:
        return admin.ModelAdmin.has_add_permission(self, request)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        # Costs that were charged by it would lose their reason.
        return False

    def has_act_permission(self, request: HttpRequest) -> bool:
        return self.has_add_permission(request)

    def get_form(
        self, request: HttpRequest, obj: Any = None, change: bool = False, **kwargs: Any
    ) -> Any:
        if obj is None:
            kwargs["form"] = type("PriceForm", (PriceForm,), {"who": str(request.user)})
        return super().get_form(request, obj, change, **kwargs)

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        obj.pk = form.new[0].pk
        obj.refresh_from_db()

    def add_view(self, request: HttpRequest, form_url: str = "", extra_context: Any = None) -> Any:
        title = {"title": _("Set a price")}
        return super().add_view(request, form_url, {**title, **(extra_context or {})})

    # --- what is shown ---

    @admin.display(description=_("model"))
    def model_column(self, price: Price) -> str:
        return f"{price.provider}/{price.model}"

    @admin.display(description=_("above"))
    def above_column(self, price: Price) -> str:
        return figures.count(price.above) if price.above else ""

    @admin.display(description=_("USD per million"))
    def amount_column(self, price: Price) -> SafeString | str:
        return figures.money(price.amount, decimals=PLACES)

    # --- what can be done ---

    def tools(self, obj: Price) -> list[Tool]:
        is_to_come = obj.until is None and obj.since >= timezone.now() + NOTICE
        return [Tool("withdraw", _("Withdraw"))] if is_to_come else []

    @admin.action(permissions=["act"], description=_("Withdraw selected %(verbose_name_plural)s"))
    def withdraw(self, request: HttpRequest, queryset: QuerySet[Price]) -> HttpResponse | None:
        outcome = actions.use_verb(queryset, lambda price: _withdraw(self, request, price))
        number = len(outcome.done)
        sentence = ngettext("%d change is withdrawn.", "%d changes are withdrawn.", number)
        level = messages.SUCCESS if number else messages.WARNING
        self.message_user(request, sentence % number, level)
        for _price, reason in outcome.refused:
            self.message_user(request, reason, messages.ERROR)
        return None


def _withdraw(model_admin: PriceAdmin, request: HttpRequest, price: Price) -> None:
    pk, words = price.pk, gettext("Withdrawn: %s") % price
    price.withdraw()
    price.pk = pk
    model_admin.log_change(request, price, words)
