"""A site that is all of QStash that its client 2.0.5 needs to chat."""

from __future__ import annotations

from django.urls import include, path

urlpatterns = [path("llm/v1/", include("django_qstash_llm.openai.urls"))]
