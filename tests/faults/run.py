"""``python -m tests.faults.run MODULE ARGUMENT…``: that module's ``main``, in a process in which
Celery's app and Django are ready before anything of the product is imported."""

from __future__ import annotations

import os
import sys
from importlib import import_module

import django

from .work import app


def main(module: str, *arguments: str) -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.faults.settings")
    # First, so that tasks are the app's: a crash point or a bug may be put into them.
    app.set_default()
    django.setup()
    import_module(f"tests.faults.{module}").main(*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
