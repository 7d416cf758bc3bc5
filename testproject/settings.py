"""A site that uses the public names only. Everything comes from the environment; nothing has to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import environ

from django_qstash_llm.checks import SQLITE_OPTIONS
from django_qstash_llm.conf import from_env

env = environ.Env()
BASE_DIR = Path(__file__).resolve().parent

SECRET_KEY = env("SECRET_KEY", default="for-development-on-this-machine-only-and-nowhere-else")
DEBUG = env.bool("DEBUG", default=True)
ALLOWED_HOSTS = env.list("ALLOWED_HOSTS", default=["127.0.0.1", "localhost"])
ROOT_URLCONF = "testproject.urls"
WSGI_APPLICATION = "testproject.wsgi.application"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
STATIC_URL = "/static/"
USE_TZ = True
TIME_ZONE = "UTC"

DATABASES = {"default": env.db("DATABASE_URL", default=f"sqlite:///{BASE_DIR / 'db.sqlite3'}")}
if DATABASES["default"]["ENGINE"].endswith("sqlite3"):
    DATABASES["default"]["OPTIONS"] = SQLITE_OPTIONS

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
    "rest_framework",
    "django_qstash_llm",
    "django_qstash_llm.server",
    "testproject.articles",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]

# Without a broker to install, Celery runs inside the process that the demo starts.
CELERY_BROKER_URL = env("CELERY_BROKER_URL", default="memory://")
CELERY_BROKER_TRANSPORT_OPTIONS = (
    {"polling_interval": 0.05} if CELERY_BROKER_URL.startswith("memory:") else {}
)
# Several sites may share one broker.
CELERY_TASK_DEFAULT_QUEUE = env("CELERY_TASK_DEFAULT_QUEUE", default="celery")
CELERY_TASK_IGNORE_RESULT = True
CELERY_WORKER_HIJACK_ROOT_LOGGER = False
# Finds what a killed worker or a lost broker has left behind.
SWEEP_SECONDS = env.float("SWEEP_SECONDS", default=10.0)
CELERY_BEAT_SCHEDULE = {
    "llm-sweep": {"task": "django_qstash_llm.sweep", "schedule": SWEEP_SECONDS},
    "qstash-server-sweep": {"task": "qstash_server.sweep", "schedule": SWEEP_SECONDS},
}

# Where this site is reached: by QStash, which here is the server mounted at /qstash/.
SITE_URL = env("SITE_URL", default="http://127.0.0.1:8000")
QSTASH_URL = f"{SITE_URL}/qstash"
# The public identity of QStash's development server. Outside DEBUG it is refused.
QSTASH_TOKEN = "eyJVc2VySUQiOiJkZWZhdWx0VXNlciIsIlBhc3N3b3JkIjoiZGVmYXVsdFBhc3N3b3JkIn0="
QSTASH_CURRENT_SIGNING_KEY = "sig_7kYjw48mhY7kAjqNGcy6cr29RJ6r"
QSTASH_NEXT_SIGNING_KEY = "sig_5ZB6DVzB1wjE8S6rZ7eenA8Pdnhs"
globals().update(from_env(env))

QSTASH_LLM: dict[str, Any] = globals()["QSTASH_LLM"]
QSTASH_LLM.setdefault("CALLBACK_BASE_URL", f"{SITE_URL}/llm")
if "PROVIDERS" not in QSTASH_LLM:
    # No key in the environment: the offline provider answers, and says so in its model's name.
    QSTASH_LLM["PROVIDERS"] = {
        "offline": {
            "BASE_URL": env("OFFLINE_PROVIDER_URL", default="http://127.0.0.1:9000/v1"),
            "API_KEY": "offline",
        }
    }
    QSTASH_LLM.setdefault("DEFAULT_PROVIDER", "offline")
    QSTASH_LLM.setdefault("DEFAULT_MODEL", "extractive-offline-1")
elif "openai" not in QSTASH_LLM["PROVIDERS"]:
    QSTASH_LLM.setdefault("DEFAULT_PROVIDER", "anthropic")
    QSTASH_LLM.setdefault("DEFAULT_MODEL", "claude-haiku-4-5")
# Upstash no longer answers for the models it hosted. Here the offline provider does.
QSTASH_SERVER: dict[str, Any] = {
    "HOSTED_MODELS_URL": env("OFFLINE_PROVIDER_URL", default="http://127.0.0.1:9000/v1"),
    "HOSTED_MODELS_KEY": "offline",
    "HOSTED_MODELS": {
        "meta-llama/Meta-Llama-3-8B-Instruct": "extractive-offline-1",
        "mistralai/Mistral-7B-Instruct-v0.2": "extractive-offline-1",
    },
}
