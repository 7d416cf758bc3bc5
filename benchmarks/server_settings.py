"""The site whose server ``benchmarks/server.py`` measures: the same in the benchmark and in the
worker that it starts. What differs is in the environment."""

from __future__ import annotations

import os

import environ

POSTGRES = os.environ.get("TEST_POSTGRES_URL", "postgres://postgres@127.0.0.1:5432/postgres")
SCHEMA = "qstash_benchmark"

env = environ.Env()

SECRET_KEY = "benchmark"
DEBUG = False
USE_TZ = True
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "django_qstash_llm.server.urls"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "rest_framework",
    "django_qstash_llm.server",
]
if env.bool("BENCHMARK_ON_POSTGRES", False):
    DATABASES = {"default": environ.Env.db_url_config(POSTGRES)}
    DATABASES["default"] |= {
        "CONN_MAX_AGE": None,
        "OPTIONS": {
            "options": f"-c search_path={SCHEMA}",
            "application_name": env("BENCHMARK_ROLE"),
        },
    }
else:
    DATABASES = {
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": f"{env('BENCHMARK_DIRECTORY')}/server.sqlite3",
            "CONN_MAX_AGE": None,
            "OPTIONS": {
                "timeout": 20,
                "transaction_mode": "IMMEDIATE",
                "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
            },
        }
    }

# As the README advises: without it Celery closes the connection around each task.
CELERY_DB_REUSE_MAX = 1_000_000

QSTASH_SERVER = {
    "TOKEN": "a-token-of-the-benchmark",
    "CURRENT_SIGNING_KEY": "sig_" + "0" * 28,
    "NEXT_SIGNING_KEY": "sig_" + "1" * 28,
    "ALLOW_LOOPBACK": True,
    # The benchmark rings by itself.
    "ENGINE": "thread",
}
