"""``{% paused_lanes %}``: what a provider's trouble has paused, at the top of the admin's pages."""

from __future__ import annotations

from typing import Any

from django import template
from django.contrib.auth import get_permission_codename
from django.urls import NoReverseMatch, reverse
from django.utils import timezone

from ..models import Lane

MOST_SHOWN = 5

register = template.Library()


@register.inclusion_tag("admin/django_qstash_llm/paused_lanes.html", takes_context=True)
def paused_lanes(context: template.RequestContext) -> dict[str, Any]:
    request = context.request
    codename = get_permission_codename("view", Lane._meta)
    if not request.user.has_perm(f"{Lane._meta.app_label}.{codename}"):
        return {"lanes": []}
    lanes = Lane.objects.paused(timezone.now()).exclude(trouble="").order_by("-paused_at")
    site = getattr(request, "current_app", "admin")
    return {"lanes": [(lane, _url(site, lane)) for lane in lanes[:MOST_SHOWN]]}


def _url(site: str, lane: Lane) -> str:
    try:
        return reverse(f"{site}:django_qstash_llm_lane_change", args=[lane.pk])
    except NoReverseMatch:  # an admin site that does not show lanes
        return ""
