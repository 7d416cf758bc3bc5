"""npm's ``openai`` at our OpenAI-compatible endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django_qstash_llm.models import ApiKey, LLMRequest

from ..openai.conftest import wsgi
from ..wire import FakeQStash
from .conftest import HERE, Site, run_script


def test_the_javascript_client(
    node_openai: Path, site: Site, settings: Any, transactional_db: None, qstash: FakeQStash
) -> None:
    settings.QSTASH_LLM = {
        **settings.QSTASH_LLM,
        "CHAT_TRANSPORT": None,
        "PROVIDERS": {"openai": {"API_KEY": "sk-of-the-site-0001", "BASE_URL": site.url}},
    }
    _, key = ApiKey.objects.issue("node")
    with wsgi() as url:
        environment = {"SDK": str(node_openai), "BASE_URL": f"{url}/openai/v1", "API_KEY": key}
        answers = run_script("node", HERE / "openai.mjs", url=url, environment=environment)
    assert answers == {
        "batches": {"same": True, "status": True, "total": 2, "listed": [True], "deleted": True},
        "whole": "hi there to you too.",
        "said": ["hi", " there to you too.", None],
        "models": ["gpt-5.4-mini"],
        "refused": [404, "model_not_found"],
    }
    assert LLMRequest.objects.completed().count() == 2
