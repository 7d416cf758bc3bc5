"""What the development server serves: the API and, at its root, a page that shows what goes on.

Not for sites to mount: the page knows no login.
"""

from __future__ import annotations

from django.urls import include, path

from . import page

urlpatterns = [
    path("", page.page),
    path("page/fragment", page.fragment),
    path("page/page.js", page.file, {"name": "page.js"}),
    path("page/page.css", page.file, {"name": "page.css"}),
    path("", include("django_qstash_llm.server.urls")),
]
