from __future__ import annotations

from django.contrib import admin
from django.urls import include, path
from django.views.generic import RedirectView

from .articles.views import talk

urlpatterns = [
    path("", RedirectView.as_view(pattern_name="admin:index")),
    path("admin/", admin.site.urls),
    path("talk/", talk, name="talk"),
    path("conversations/", include("django_qstash_llm.browser.urls")),
    path("llm/", include("django_qstash_llm.urls")),
    path("openai/v1/", include("django_qstash_llm.openai.urls")),
    path("qstash/", include("django_qstash_llm.server.urls")),
]
