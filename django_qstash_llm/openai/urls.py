"""Mount with ``path("openai/v1/", include("django_qstash_llm.openai.urls"))``, and ``base_url`` is that."""

from __future__ import annotations

from django.urls import path, re_path

from .views import cancel, chat_completion, chat_completions, model, models, unknown

app_name = "django_qstash_llm_openai"
urlpatterns = [
    path("chat/completions", chat_completions, name="chat_completions"),
    path("chat/completions/<str:name>", chat_completion, name="chat_completion"),
    path("chat/completions/<str:name>/cancel", cancel, name="cancel"),
    path("models", models, name="models"),
    # Names of models hold slashes.
    path("models/<path:name>", model, name="model"),
    re_path("", unknown),
]
