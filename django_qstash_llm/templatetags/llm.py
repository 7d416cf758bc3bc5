"""``{% load llm %}{% llm_cost article %}``: what requests about an instance cost."""

from __future__ import annotations

from django import template
from django.db import models

from ..models import Spend

register = template.Library()


@register.simple_tag
def llm_cost(instance: models.Model | None) -> str:
    """``$0.0123``, ``unpriced``, ``$0.0123 + 2 unpriced``; a dash where nothing was answered. Give it a
    name with ``as`` to say it twice: each time is a query."""
    # An instance that is not saved, or none: nothing can have been asked about it.
    if not isinstance(instance, models.Model) or instance.pk is None:
        return "–"
    return Spend.for_object(instance).in_words
