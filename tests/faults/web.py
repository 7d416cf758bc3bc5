"""The WSGI application: our callback view, and our QStash-compatible server, in one site."""

from __future__ import annotations

import os

from django.core.wsgi import get_wsgi_application

# Celery's app, so that what the views ring reaches the broker.
from .work import app as celery_app

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.faults.settings")
application = get_wsgi_application()

__all__ = ["application", "celery_app"]
