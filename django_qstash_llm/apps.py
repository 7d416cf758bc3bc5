from __future__ import annotations

from django.apps import AppConfig
from django.utils.module_loading import autodiscover_modules
from django.utils.translation import gettext_lazy as _


class QStashLLMConfig(AppConfig):
    name = "django_qstash_llm"
    label = "django_qstash_llm"
    verbose_name = _("LLM requests")
    # Fixed here, or the host's setting would make migrations of ours.
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from . import checks  # noqa: F401 - importing registers them

        # Triggers live in the apps' llm.py, as admin classes live in admin.py.
        autodiscover_modules("llm")
