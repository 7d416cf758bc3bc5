"""Mount with ``path("conversations/", include("django_qstash_llm.browser.urls"))``, wherever you like."""

from __future__ import annotations

from django.urls import path

from .views import conversation

app_name = "django_qstash_llm_browser"
urlpatterns = [path("<uuid:uuid>/", conversation, name="conversation")]
