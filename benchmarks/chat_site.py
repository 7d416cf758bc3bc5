"""The settings of ``benchmarks/chat.py``, for each site that it starts and for the benchmark itself,
and the minimal view. Who is served and where the rows are is in the environment."""

from __future__ import annotations

import os

import environ

POSTGRES = os.environ.get("TEST_POSTGRES_URL", "postgres://postgres@127.0.0.1:5432/postgres")
SCHEMA = "llm_chat_benchmark"

env = environ.Env()
SITE = env("BENCHMARK_SITE", default="benchmark")
"""``ours`` or ``minimal``; ``benchmark`` sees the rows."""
IS_ASGI = env.bool("BENCHMARK_IS_ASGI", False)
PROVIDER = env("BENCHMARK_PROVIDER", default="http://127.0.0.1:9/v1")
PROVIDER_KEY = "sk-benchmark-benchmark"

SECRET_KEY = "benchmark"
DEBUG = False
USE_TZ = True
ALLOWED_HOSTS = ["*"]
MIDDLEWARE: list[str] = []
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "rest_framework",
    "django_qstash_llm",
]
ROOT_URLCONF = {
    ("minimal", False): "benchmarks.chat_minimal.blocking",
    ("minimal", True): "benchmarks.chat_minimal.awaiting",
}.get((SITE, IS_ASGI), "django_qstash_llm.openai.urls")
if env.bool("BENCHMARK_ON_POSTGRES", True):
    options = {"options": f"-c search_path={SCHEMA}"}
    # Each as the README advises: kept connections of threads that stay, a pool where they do not.
    pool = {"pool": {"min_size": 4, "max_size": 16}} if IS_ASGI else {}
    DATABASES = {
        "default": {
            **environ.Env.db_url_config(POSTGRES),
            "CONN_MAX_AGE": 0 if IS_ASGI else None,
            "OPTIONS": options | pool,
        }
    }
else:
    DATABASES = {
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": f"{env('BENCHMARK_DIRECTORY')}/chat.sqlite3",
            "CONN_MAX_AGE": None,
            "OPTIONS": {
                "timeout": 20,
                "transaction_mode": "IMMEDIATE",
                "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
            },
        }
    }

QSTASH_LLM = {
    "PROVIDERS": {"openai": {"API_KEY": PROVIDER_KEY, "BASE_URL": PROVIDER}},
    "PRICES": {
        "openai/gpt-5.4-mini-2026-03-17": {"input": "0.75", "cached": "0.075", "output": "4.5"}
    },
}
