"""The settings of ``benchmarks/callback.py``, for each contender and for the benchmark itself. Whom
they are for and where the rows are is in the environment."""

from __future__ import annotations

import os

import environ

POSTGRES = os.environ.get("TEST_POSTGRES_URL", "postgres://postgres@127.0.0.1:5432/postgres")
SCHEMA = "llm_callback_benchmark"
CALLBACK_URL = "https://site.example/llm"
SIGNING_KEYS = ("sig_" + "0" * 28, "sig_" + "1" * 28)
MODEL = "gpt-5.4-mini"
PRICE = {"input": "0.75", "cached": "0.075", "output": "4.5"}
BELLS = "llm-callback-benchmark"

env = environ.Env()
CONTENDER = env("BENCHMARK_CONTENDER", default="benchmark")
"""``ours``, ``telling``, ``typical``, ``django_qstash``, ``bare``; or ``benchmark``, which sees all rows."""
BROKER = env("BENCHMARK_BROKER", default="memory://")

SECRET_KEY = "benchmark"
DEBUG = False
USE_TZ = True
ALLOWED_HOSTS = ["*"]
MIDDLEWARE: list[str] = []
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
WSGI_APPLICATION = "benchmarks.callback_peers.wsgi.application"
APPS = {
    "ours": ["rest_framework", "django_qstash_llm"],
    "telling": ["rest_framework", "django_qstash_llm"],
    "typical": ["rest_framework", "benchmarks.callback_peers"],
    "django_qstash": ["django_qstash.results", "benchmarks.callback_peers"],
    "bare": [],
    "benchmark": ["rest_framework", "django_qstash_llm", "benchmarks.callback_peers"],
}
INSTALLED_APPS = ["django.contrib.auth", "django.contrib.contenttypes", *APPS[CONTENDER]]
if CONTENDER == "benchmark" and env.bool("BENCHMARK_HAS_DJANGO_QSTASH", False):
    INSTALLED_APPS += ["django_qstash.results"]
ROOT_URLCONF = {
    "typical": "benchmarks.callback_peers.typical",
    "django_qstash": "benchmarks.callback_peers.django_qstash_urls",
}.get(CONTENDER, "django_qstash_llm.urls")
if env.bool("BENCHMARK_ON_POSTGRES", False):
    DATABASES = {
        "default": {
            **environ.Env.db_url_config(POSTGRES),
            "CONN_MAX_AGE": None,
            # As the README says for a database that is reached without a pooler. The bare function
            # has it without saying so, and nobody else loses by it.
            "OPTIONS": {"options": f"-c search_path={SCHEMA}", "prepare_threshold": 5},
        }
    }
else:
    DATABASES = {
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": f"{env('BENCHMARK_DIRECTORY')}/callback.sqlite3",
            "CONN_MAX_AGE": None,
            "OPTIONS": {
                "timeout": 20,
                "transaction_mode": "IMMEDIATE",
                "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
            },
        }
    }

QSTASH_TOKEN = "a-token-of-the-benchmark"
QSTASH_CURRENT_SIGNING_KEY, QSTASH_NEXT_SIGNING_KEY = SIGNING_KEYS
QSTASH_LLM = {
    "CALLBACK_BASE_URL": CALLBACK_URL,
    "PROVIDERS": {"openai": {"API_KEY": "sk-benchmark-benchmark"}},
    "PRICES": {f"openai/{MODEL}": PRICE},
}
# the typical way's
QSTASH_CALLBACK_URL = CALLBACK_URL
PRICES = {MODEL: PRICE}
# django-qstash's, at its defaults otherwise
DJANGO_QSTASH_DOMAIN = "https://site.example"
DJANGO_QSTASH_WEBHOOK_PATH = "/qstash/webhook/"
