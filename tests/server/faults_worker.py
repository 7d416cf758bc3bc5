"""The site whose workers test_faults kills: its settings, and its Celery app.

The test says what the settings are, in the environment.
"""

from __future__ import annotations

import json
import os

from celery import Celery

from testproject.settings import *  # noqa: F403

DEBUG = False
ALLOWED_HOSTS = ["127.0.0.1"]
QSTASH_SERVER = json.loads(os.environ["FAULTS_SERVER"])
DATABASES["default"]["OPTIONS"] = {"application_name": os.environ["FAULTS_NAME"]}  # noqa: F405
CELERY_BEAT_SCHEDULE = {
    "sweep": {"task": "qstash_server.sweep", "schedule": float(os.environ["FAULTS_SWEEP"])}
}
# A worker that finds no broker looks again soon.
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_BROKER_TRANSPORT_OPTIONS = {"socket_connect_timeout": 1}

app = Celery("faults")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
