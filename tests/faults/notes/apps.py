from __future__ import annotations

from django.apps import AppConfig


class Notes(AppConfig):
    name = "tests.faults.notes"
    label = "notes"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from .. import start

        start.begin()
