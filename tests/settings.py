"""The suite's settings: SQLite unless DATABASE_URL says otherwise; nothing of ours switched off."""

from __future__ import annotations

import tempfile
from pathlib import Path

import environ

env = environ.Env()

SECRET_KEY = "tests-only-and-long-enough-to-be-a-key-for-signing"
DEBUG = True
ALLOWED_HOSTS = ["*"]
USE_TZ = True
ROOT_URLCONF = "tests.urls"
STATIC_URL = "/static/"
# Django 6.1's word for it; older ones have EMAIL_BACKEND.
MAILERS = {"default": {"BACKEND": "django.core.mail.backends.locmem.EmailBackend"}}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

_directory = Path(env("TEST_DIRECTORY", default=tempfile.gettempdir()))
DATABASES = {
    "default": env.db("DATABASE_URL", default=f"sqlite:///{_directory / 'unused.sqlite3'}")
}
if DATABASES["default"]["ENGINE"].endswith("sqlite3"):
    DATABASES["default"]["OPTIONS"] = {
        "timeout": 20,
        "transaction_mode": "IMMEDIATE",
        "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
    }
    # A file: worker processes and other threads must see what the test sees.
    DATABASES["default"]["TEST"] = {
        "NAME": env(
            "TEST_DATABASE_NAME", default=str(_directory / "test_django_qstash_llm.sqlite3")
        )
    }
else:
    DATABASES["default"]["TEST"] = {
        "NAME": env("TEST_DATABASE_NAME", default="test_django_qstash_llm")
    }
# For a router to put our models there. It is made only for tests that say so.
DATABASES["second"] = {
    **DATABASES["default"],
    "TEST": {"NAME": f"{DATABASES['default']['TEST']['NAME']}_second"},
}

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
    "django.contrib.auth.middleware.LoginRequiredMiddleware",
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
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]

CELERY_BROKER_URL = env("CELERY_BROKER_URL", default="memory://")
CELERY_TASK_ALWAYS_EAGER = True
CELERY_TASK_EAGER_PROPAGATES = True

# A site that is stricter than ours must not change our views.
REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": ["rest_framework.authentication.BasicAuthentication"],
    "DEFAULT_PERMISSION_CLASSES": ["rest_framework.permissions.IsAdminUser"],
    "DEFAULT_THROTTLE_CLASSES": ["rest_framework.throttling.AnonRateThrottle"],
    "DEFAULT_THROTTLE_RATES": {"anon": "1/day"},
    "DEFAULT_PARSER_CLASSES": ["rest_framework.parsers.FormParser"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.BrowsableAPIRenderer"],
    "DEFAULT_VERSIONING_CLASS": "rest_framework.versioning.AcceptHeaderVersioning",
    "ALLOWED_VERSIONS": ["2"],
    "COMPACT_JSON": False,
}

QSTASH_URL = "http://testserver/qstash"
QSTASH_TOKEN = "token-of-the-tests"
QSTASH_CURRENT_SIGNING_KEY = "sig_current_key_of_the_tests_0001"
QSTASH_NEXT_SIGNING_KEY = "sig_next_key_of_the_tests_000002"
QSTASH_LLM = {
    "CALLBACK_BASE_URL": "http://testserver/llm",
    "PROVIDERS": {
        "openai": {
            "API_KEY": "sk-canary-0123456789",
            "BASE_URL": "https://provider.test/v1",
            "ORGANIZATION": "org-1",
        },
        "anthropic": {"API_KEY": "ant-canary-0123456789", "BASE_URL": "https://anthropic.test"},
    },
    "TRANSPORT": "tests.wire.wire",
    "CHAT_TRANSPORT": "tests.wire.wire",
}
QSTASH_SERVER = {
    "TOKEN": QSTASH_TOKEN,
    "CURRENT_SIGNING_KEY": QSTASH_CURRENT_SIGNING_KEY,
    "NEXT_SIGNING_KEY": QSTASH_NEXT_SIGNING_KEY,
    "TRANSPORT": "tests.wire.wire",
    "ALLOW_LOOPBACK": True,
    "ALLOW_PRIVATE_DESTINATIONS": True,
}
