"""Files: what callers of the OpenAI-compatible endpoint have uploaded, and what batches answered."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.http import HttpRequest
from django.utils.safestring import SafeString
from django.utils.translation import gettext_lazy as _

from ..models import BatchInput, File
from . import figures, text
from .record import RecordAdmin


@admin.register(File)
class FileAdmin(RecordAdmin):
    list_display = (
        "filename",
        "purpose",
        "size_column",
        "api_key",
        "user",
        "created_column",
        "expires_column",
    )
    list_filter = ("purpose",)
    list_select_related = ("api_key", "user")
    search_fields = ("filename",)
    searched_name = "filename"
    uuid_prefix = "file-"
    search_help_text = _("The file's id or UUID, or its exact name.")
    fields = (
        ("uuid", "purpose", "size_column"),
        ("caller", "api_key", "user"),
        ("batch", "created_at", "expires_at"),
    )
    readonly_fields = ("size_column",)

    @admin.display(description=_("bytes"))
    def size_column(self, file: File) -> str:
        return figures.count(file.size)

    @admin.display(description=_("made"))
    def created_column(self, file: File) -> SafeString | str:
        return figures.moment(file.created_at)

    @admin.display(description=_("expires"))
    def expires_column(self, file: File) -> SafeString | str:
        return figures.moment(file.expires_at)

    def page(self, request: HttpRequest, obj: File) -> dict[str, Any]:
        beginning = obj.beginning(text.LONGEST)
        inputs = BatchInput.objects.filter(file_uuid=obj.uuid).select_related("batch")
        batches = [each.batch for each in inputs] or ([obj.batch] if obj.batch else [])
        return {
            "beginning": text.preformatted(beginning.decode("utf-8", "replace"), size=obj.size)
            if beginning
            else "",
            "batches": [(str(batch), self.page_url(batch)) for batch in batches],
        }
