from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.http import HttpRequest
from django.utils.translation import gettext_lazy as _

from ..models import SigningKeys
from ..overview import DEFAULT
from .record import RecordAdmin


@admin.register(SigningKeys)
class SigningKeysAdmin(RecordAdmin):
    """Only that there are some, and since when: whoever knows them can sign."""

    actions = None
    heavy_fields = ("current", "next")
    list_display = ("owner", "changed")
    sections = ((None, ("owner", "updated_at")),)
    ordering = ("account",)

    @admin.display(description=_("account"))
    def owner(self, keys: SigningKeys) -> str:
        return keys.account or DEFAULT

    def get_list_display(self, request: HttpRequest) -> list[Any]:
        return list(self.list_display)

    def get_list_filter(self, request: HttpRequest) -> list[Any]:
        return []
