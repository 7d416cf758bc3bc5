"""Mount with ``path("llm/", include("django_qstash_llm.urls"))``; ``CALLBACK_BASE_URL`` names that place."""

from __future__ import annotations

from django.urls import path

from .views import attempts, budgets, callback, health, llm_request, ping, spend

app_name = "django_qstash_llm"
urlpatterns = [
    path("callback/<uuid:uuid>/", callback, name="callback"),
    # Without the slash too: a redirect would count as a failed delivery.
    path("callback/<uuid:uuid>", callback),
    path("ping/<uuid:uuid>/", ping, name="ping"),
    path("ping/<uuid:uuid>", ping),
    path("health/", health, name="health"),
    path("requests/<uuid:uuid>/", llm_request, name="request"),
    path("requests/<uuid:uuid>/attempts/", attempts, name="attempts"),
    path("spend/", spend, name="spend"),
    path("budgets/", budgets, name="budgets"),
]
