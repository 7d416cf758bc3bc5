"""API keys: made and revoked here, shown once, and what was spent by each."""

from __future__ import annotations

from typing import Any

from django import forms
from django.contrib import admin, messages
from django.core.exceptions import ValidationError
from django.db.models import Count, QuerySet
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.utils import timezone
from django.utils.safestring import SafeString
from django.utils.translation import gettext_lazy as _
from django.utils.translation import ngettext

from ..conf import app_settings
from ..models import ApiKey, LLMRequest
from ..models.api_key import Scope
from . import actions, figures
from .record import MadeByPeople, Tool


class LinesField(forms.CharField):
    """A list of texts, one a line."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.pop("encoder", None), kwargs.pop("decoder", None)
        super().__init__(widget=forms.Textarea(attrs={"rows": 4}), **kwargs)

    def prepare_value(self, value: Any) -> Any:
        return "\n".join(map(str, value)) if isinstance(value, list) else value

    def to_python(self, value: Any) -> Any:
        return [line.strip() for line in str(value or "").splitlines() if line.strip()]


class ApiKeyForm(forms.ModelForm):  # type: ignore[type-arg]
    scopes = forms.MultipleChoiceField(
        choices=Scope.choices,
        widget=forms.CheckboxSelectMultiple,
        initial=Scope.values,
        label=_("scopes"),
    )
    provider = forms.ChoiceField(
        required=False,
        label=_("provider"),
        help_text=ApiKey._meta.get_field("provider").help_text,
    )
    allowed_models = LinesField(
        required=False,
        label=_("models"),
        help_text=_(
            "The only ones it may ask, one a line: “model”, “provider/model” or “provider/*”."
        ),
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        field = self.fields.get("provider")  # which who may only look has not
        if isinstance(field, forms.ChoiceField):
            names = sorted({*app_settings().providers, self.instance.provider} - {""})
            field.choices = [("", _("the default")), *((name, name) for name in names)]

    def clean_expires_at(self) -> Any:
        expires_at = self.cleaned_data["expires_at"]
        if expires_at and expires_at <= timezone.now() and "expires_at" in self.changed_data:
            raise ValidationError(_("That is over already."))
        return expires_at


@admin.register(ApiKey)
class ApiKeyAdmin(MadeByPeople):
    form = ApiKeyForm
    list_display = (
        "name",
        "key_column",
        "usable_column",
        "user",
        "tenant",
        "requests_column",
        "used_column",
        "expires_column",
    )
    list_select_related = ("user",)
    search_fields = ("name", "prefix", "tenant")
    fields = (
        "name",
        ("user", "tenant"),
        "scopes",
        "provider",
        "allowed_models",
        ("requests_per_minute", "expires_at"),
    )
    raw_id_fields = ("user",)
    actions = ("revoke",)
    readonly_fields = ("key_column", "created_at", "last_used_at", "revoked_at")

    def get_fields(self, request: HttpRequest, obj: ApiKey | None = None) -> Any:
        known = (("key_column", "created_at", "last_used_at", "revoked_at"),) if obj else ()
        return (*known, *self.fields)

    def complete_page(self, request: HttpRequest, rows: list[ApiKey]) -> None:
        counted = (
            LLMRequest.objects.filter(api_key__in=rows)
            .order_by()
            .values_list("api_key")
            .annotate(number=Count("pk"))
        )
        numbers = dict(counted)
        for row in rows:
            row.number_of_requests = numbers.get(row.pk, 0)  # type: ignore[attr-defined]

    @admin.display(description=_("key"))
    def key_column(self, api_key: ApiKey) -> str:
        return f"{api_key.prefix}…"

    @admin.display(description=_("usable"), boolean=True)
    def usable_column(self, api_key: ApiKey) -> bool:
        return api_key.is_usable(timezone.now())

    @admin.display(description=_("requests"))
    def requests_column(self, api_key: Any) -> str:
        return figures.count(api_key.number_of_requests)

    @admin.display(description=_("last used"))
    def used_column(self, api_key: ApiKey) -> SafeString | str:
        return figures.moment(api_key.last_used_at)

    @admin.display(description=_("expires"))
    def expires_column(self, api_key: ApiKey) -> SafeString | str:
        return figures.moment(api_key.expires_at)

    # --- what can be done ---

    def save_model(self, request: HttpRequest, obj: ApiKey, form: Any, change: bool) -> None:
        if not change:
            # Kept on the object alone, which is gone with this response.
            obj.shown_once = obj.renew()  # type: ignore[attr-defined]
        super().save_model(request, obj, form, change)

    def response_add(
        self, request: HttpRequest, obj: Any, post_url_continue: str | None = None
    ) -> HttpResponse:
        """The key, here and now. A message after a redirect would be written into the session."""
        context = {
            **self.admin_site.each_context(request),
            "title": _("The new key"),
            "opts": self.opts,
            "original": obj,
            "key": obj.shown_once,
            "page_url": self.page_url(obj),
            "media": self.media,
        }
        template = "admin/django_qstash_llm/apikey/shown_once.html"
        return TemplateResponse(request, template, context, headers={"Cache-Control": "no-store"})

    def tools(self, obj: ApiKey | None) -> list[Tool]:
        return [Tool("revoke", _("Revoke"))] if obj and obj.revoked_at is None else []

    @admin.action(permissions=["act"], description=_("Revoke selected %(verbose_name_plural)s"))
    def revoke(self, request: HttpRequest, queryset: QuerySet[ApiKey]) -> HttpResponse | None:
        revoked = [api_key for api_key in queryset if api_key.revoke()]
        for api_key in revoked:
            self.log_change(request, api_key, str(_("Revoked.")))
        sentence = ngettext("%d key was revoked.", "%d keys were revoked.", len(revoked))
        self.message_user(request, sentence % len(revoked), messages.SUCCESS)
        return actions.back_to_page(self, request, revoked[0] if revoked else queryset.first())
