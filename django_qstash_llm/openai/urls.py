"""Mount with ``path("openai/v1/", include("django_qstash_llm.openai.urls"))``, and ``base_url`` is that."""

from __future__ import annotations

from django.urls import path, re_path

from .views import (
    batch,
    batches,
    cancel,
    cancel_batch,
    chat_completion,
    chat_completions,
    file,
    file_content,
    files,
    model,
    models,
    unknown,
)

app_name = "django_qstash_llm_openai"
urlpatterns = [
    path("chat/completions", chat_completions, name="chat_completions"),
    path("chat/completions/<str:name>", chat_completion, name="chat_completion"),
    path("chat/completions/<str:name>/cancel", cancel, name="cancel"),
    path("files", files, name="files"),
    path("files/<str:name>", file, name="file"),
    path("files/<str:name>/content", file_content, name="file_content"),
    path("batches", batches, name="batches"),
    path("batches/<str:name>", batch, name="batch"),
    path("batches/<str:name>/cancel", cancel_batch, name="cancel_batch"),
    path("models", models, name="models"),
    # Names of models hold slashes.
    path("models/<path:name>", model, name="model"),
    re_path("", unknown),
]
