"""What requests are about: any instance of any model, for a whole page in one query per model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from django.contrib.admin import AdminSite
from django.contrib.contenttypes.models import ContentType
from django.core.exceptions import ValidationError
from django.db import models
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _

from ..models import LLMRequest
from .figures import UNKNOWN
from .text import excerpt


def links(
    llm_requests: Sequence[LLMRequest], site: AdminSite, request: HttpRequest
) -> dict[int, SafeString | str]:
    """Primary key of each request -> what it is about, linked where the user may go."""
    by_type: dict[int, list[LLMRequest]] = defaultdict(list)
    shown: dict[int, SafeString | str] = {}
    for row in llm_requests:
        if row.content_type_id is None:
            shown[row.pk] = UNKNOWN
        else:
            by_type[row.content_type_id].append(row)
    for content_type_id, rows in by_type.items():
        # Kept by Django for the life of the process.
        content_type = ContentType.objects.get_for_id(content_type_id)
        shown |= _links_of_one_type(rows, content_type, site, request)
    return shown


def _links_of_one_type(
    rows: list[LLMRequest], content_type: ContentType, site: AdminSite, request: HttpRequest
) -> dict[int, SafeString | str]:
    model = content_type.model_class()
    if model is None:  # its app is gone
        return {row.pk: f"{content_type.name} {excerpt(row.object_id, 40)}" for row in rows}
    is_registered = site.is_registered(model)
    name = str(model._meta.verbose_name)
    if is_registered and not site.get_model_admin(model).has_view_permission(request):
        return {row.pk: f"{name} {excerpt(row.object_id, 40)}" for row in rows}
    instances = _instances(model, {row.object_id for row in rows})
    shown: dict[int, SafeString | str] = {}
    for row in rows:
        instance = instances.get(row.object_id)
        if instance is None:
            gone = _("%(name)s %(key)s (deleted)")
            shown[row.pk] = gone % {"name": name, "key": excerpt(row.object_id, 40)}
            continue
        label = excerpt(str(instance), 60) or f"{name} {row.object_id}"
        shown[row.pk] = _link(site, instance, label) if is_registered else label
    return shown


def _instances(model: type[models.Model], keys: set[str]) -> dict[str, models.Model]:
    field: Any = model._meta.pk
    sound = []
    for key in keys:
        try:
            sound.append(field.to_python(key))
        except ValidationError:
            continue  # the model's key was of another type in its day
    return {str(instance.pk): instance for instance in model._base_manager.filter(pk__in=sound)}


def _link(site: AdminSite, instance: models.Model, label: str) -> SafeString:
    meta = instance._meta
    url = reverse(f"{site.name}:{meta.app_label}_{meta.model_name}_change", args=[instance.pk])
    return format_html('<a href="{}">{}</a>', url, label)
