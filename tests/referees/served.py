"""The suite's settings for a site in a process of its own, at the database of the test."""

from __future__ import annotations

import os

from tests.settings import *  # noqa: F403
from tests.settings import DATABASES, QSTASH_LLM

DATABASES["default"]["NAME"] = os.environ["SERVED_DATABASE"]
QSTASH_LLM |= {
    "CHAT_TRANSPORT": None,
    "PROVIDERS": {"openai": {"API_KEY": "sk-served", "BASE_URL": os.environ["SERVED_PROVIDER"]}},
}
