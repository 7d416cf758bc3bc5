from __future__ import annotations

from django.apps import AppConfig
from django.core.checks import Tags, register
from django.utils.translation import gettext_lazy as _


class QStashServerConfig(AppConfig):
    name = "django_qstash_llm.server"
    label = "qstash_server"
    verbose_name = _("QStash server")
    # Fixed here, or the host's setting would make migrations of ours.
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from . import checks, conf

        conf.forget_when_settings_change()
        register(checks.check_settings, Tags.security)
