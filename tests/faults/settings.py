"""The settings of the site whose processes these tests kill. ``FAULTS`` in the environment says
where its parts are; ``site`` and ``scenarios`` write it."""

from __future__ import annotations

import json
import os
from typing import Any

from testproject.settings import *  # noqa: F403

CANARY = "sk-canary-of-the-faults-0123456789"
"""The provider's key. It must turn up nowhere but at the provider."""

FAULTS: dict[str, Any] = {
    "folder": "/nowhere",
    "name": "nobody",
    "front": "http://127.0.0.1:1",
    "provider": "http://127.0.0.1:1",
    "claim_seconds": 6.0,
    "sweep": 1.0,
    "llm": {},
    "server": {},
    **json.loads(os.environ.get("FAULTS", "{}")),
}

DEBUG = False
SECRET_KEY = "of-the-faults-and-of-nothing-else-0123456789abcdef"
ALLOWED_HOSTS = ["127.0.0.1", "front.test"]
INSTALLED_APPS = [
    "tests.faults.notes.apps.Notes" if app == "testproject.articles" else app
    for app in INSTALLED_APPS  # noqa: F405
]
# Whose connection it is, in the database's own list and in the history of the rows.
DATABASES["default"] |= {  # noqa: F405
    "OPTIONS": {"application_name": f"{FAULTS['name']}:{os.getpid()}", "connect_timeout": 3},
    "CONN_MAX_AGE": 30,
    "CONN_HEALTH_CHECKS": True,
}
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["console"], "level": "WARNING"},
}

CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_BROKER_TRANSPORT_OPTIONS = {"socket_connect_timeout": 1}
# As our server advises: its engines wait for slow providers, in workers of their own.
CELERY_TASK_ROUTES = {"qstash_server.*": {"queue": "qstash"}}
CELERY_BEAT_SCHEDULE = {
    "llm-sweep": {"task": "django_qstash_llm.sweep", "schedule": FAULTS["sweep"]},
    "qstash-server-sweep": {"task": "qstash_server.sweep", "schedule": FAULTS["sweep"]},
}

QSTASH_URL = f"{FAULTS['front']}/qstash"
QSTASH_TOKEN = "the-canary-token-of-the-faults-0123456789"
QSTASH_CURRENT_SIGNING_KEY = "sig_current-canary-of-the-faults-0001"
QSTASH_NEXT_SIGNING_KEY = "sig_next-canary-of-the-faults-000002"
SECRETS = (CANARY, QSTASH_TOKEN, QSTASH_CURRENT_SIGNING_KEY, QSTASH_NEXT_SIGNING_KEY)
QSTASH_LLM = {
    "CALLBACK_BASE_URL": f"{FAULTS['front']}/llm",
    "PROVIDERS": {"fake": {"BASE_URL": f"{FAULTS['provider']}/v1", "API_KEY": CANARY}},
    "DEFAULT_PROVIDER": "fake",
    "DEFAULT_MODEL": "fake-1",
    "PRICES": {"fake/fake-1": {"input": "1", "output": "2"}},
    # More than any outage here lasts: a callback that is given up on has tests of its own.
    "CALLBACK_RETRIES": 50,
    "BATCH_SIZE": 25,
    "DEADLINE": 60,
    # Less than half of a claim, as 30 seconds are of two minutes.
    "SUBMIT_TIMEOUT": 2.0,
    **FAULTS["llm"],
}
QSTASH_SERVER = {
    "TOKEN": QSTASH_TOKEN,
    "CURRENT_SIGNING_KEY": QSTASH_CURRENT_SIGNING_KEY,
    "NEXT_SIGNING_KEY": QSTASH_NEXT_SIGNING_KEY,
    "ALLOW_LOOPBACK": True,
    "LEASE": 3.0,
    "GRACE": 2.0,
    "CONCURRENCY": 20,
    # The provider here refuses by chance and not for its rate: a gate would believe it, and slow down.
    "GATES": False,
    **FAULTS["server"],
}
