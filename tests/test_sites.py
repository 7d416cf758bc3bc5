"""The same callbacks at every kind of site: what the host has chosen for itself changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from django.conf import settings
from django.db import connections
from django.test import Client, override_settings
from django.urls import URLPattern, URLResolver, get_resolver
from django.utils import timezone
from rest_framework.settings import DEFAULTS
from rest_framework.views import APIView

from django_qstash_llm.models import CallbackResponse, LLMRequest
from django_qstash_llm.qstash import Callback, sign

from .conftest import ANSWER
from .wire import FakeQStash

BEHIND_A_PROXY = {
    "SECURE_SSL_REDIRECT": True,
    "SECURE_PROXY_SSL_HEADER": ("HTTP_X_FORWARDED_PROTO", "https"),
    "USE_X_FORWARDED_HOST": True,
    "ALLOWED_HOSTS": ["internal", "shop.example"],
}


@dataclass
class Site:
    settings: dict[str, Any] = field(default_factory=dict)
    base: str = "http://testserver/llm"
    """What we published: ``CALLBACK_BASE_URL``."""
    path: str = "/llm"
    """Where that arrives inside."""
    extra: dict[str, Any] = field(default_factory=dict)
    database: dict[str, Any] = field(default_factory=dict)
    """Settings of every database, also of that which these tests must not touch."""


SITES = {
    "plain": Site(),
    "atomic requests": Site(database={"ATOMIC_REQUESTS": True}),
    "connections kept": Site(database={"CONN_MAX_AGE": None, "CONN_HEALTH_CHECKS": True}),
    "local time": Site({"USE_TZ": False, "TIME_ZONE": "America/New_York"}),
    "another language": Site({"LANGUAGE_CODE": "de", "USE_I18N": True}),
    "slashes are appended": Site({"APPEND_SLASH": True}),
    "slashes are not appended": Site({"APPEND_SLASH": False}),
    "behind a proxy that ends TLS": Site(
        BEHIND_A_PROXY,
        base="https://shop.example/llm",
        extra={
            "HTTP_HOST": "internal",
            "HTTP_X_FORWARDED_HOST": "shop.example",
            "HTTP_X_FORWARDED_PROTO": "https",
        },
    ),
    "behind a proxy that tells nothing": Site(
        {"ALLOWED_HOSTS": ["10.0.0.7"]},
        base="https://shop.example:8443/llm",
        extra={"HTTP_HOST": "10.0.0.7:8000"},
    ),
    "behind a proxy that cuts a prefix off": Site(base="https://shop.example/api/v1/llm"),
    "mounted below a path": Site(
        {"FORCE_SCRIPT_NAME": "/shop"},
        base="https://example.com/shop/llm",
        path="/llm",
        extra={"SCRIPT_NAME": "/shop"},
    ),
    "nobody uploads much": Site(
        {"DATA_UPLOAD_MAX_MEMORY_SIZE": 10, "DATA_UPLOAD_MAX_NUMBER_FIELDS": 1}
    ),
    "no framework's defaults": Site({"REST_FRAMEWORK": {}}),
    "nobody without a certificate": Site(
        {"REST_FRAMEWORK": {"UNAUTHENTICATED_USER": None, "EXCEPTION_HANDLER": "no.such.handler"}}
    ),
    "everything cached": Site(
        {
            "MIDDLEWARE": [
                "django.middleware.cache.UpdateCacheMiddleware",
                "django.middleware.http.ConditionalGetMiddleware",
                "django.middleware.gzip.GZipMiddleware",
                *settings.MIDDLEWARE,
                "django.middleware.cache.FetchFromCacheMiddleware",
            ]
        }
    ),
    "no middleware": Site({"MIDDLEWARE": []}),
}


@contextmanager
def standing(site: Site) -> Iterator[None]:
    ours = {**settings.QSTASH_LLM, "CALLBACK_BASE_URL": site.base}
    databases = [each.settings_dict for each in connections.all()]
    before = [{name: each[name] for name in site.database} for each in databases]
    for each in databases:
        each.update(site.database)
    try:
        with override_settings(**site.settings, QSTASH_LLM=ours):
            yield
    finally:
        for each, settings_before in zip(databases, before, strict=True):
            each.update(settings_before)


@pytest.fixture(params=SITES.values(), ids=SITES.keys())
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    # Entered first, so that the rows are written as that site writes them.
    with standing(request.param):
        yield request.param


@pytest.fixture
def llm_request(site: Site, transactional_db: None, qstash: FakeQStash) -> LLMRequest:
    return LLMRequest.objects.publish([{"role": "user", "content": "How many roads?"}])


@pytest.fixture
def deliver(site: Site, llm_request: LLMRequest) -> Callable[..., int]:
    def post(callback: Callback | bytes, key: str = settings.QSTASH_CURRENT_SIGNING_KEY) -> int:
        body = callback if isinstance(callback, bytes) else callback.to_json()
        place = f"/callback/{llm_request.uuid}/"
        signature = sign(body, url=site.base + place, key=key, now=timezone.now().timestamp())
        answer = Client(enforce_csrf_checks=True).generic(
            "POST",
            site.path + place,
            body,
            content_type="application/json",
            headers={"Upstash-Signature": signature},
            **site.extra,
        )
        return answer.status_code

    return post


def test_callbacks_are_taken_and_forgeries_refused_at_every_site(
    llm_request: LLMRequest, deliver: Callable[..., int]
) -> None:
    body = json.dumps(ANSWER).encode()
    busy = Callback(status=503, body=b"busy", max_retries=3, source_message_id="msg_1")
    done = Callback(status=200, body=body, retried=1, max_retries=3, source_message_id="msg_1")
    assert deliver(busy) == 200
    llm_request.refresh_from_db()
    assert (llm_request.state, llm_request.attempts) == ("submitted", 1)
    assert llm_request.deadline_at > llm_request.created_at
    assert deliver(done, key="sig_somebody_elses_signing_key_01") == 401
    assert deliver(b"[]") == 489
    assert deliver(done) == 200
    assert deliver(done) == 200
    llm_request.refresh_from_db()
    assert (llm_request.state, llm_request.completion) == ("completed", "Forty-two.")
    kinds = CallbackResponse.objects.order_by("id").values_list("kind", "seen_count")
    assert list(kinds) == [("callback", 1), ("quarantined", 1), ("callback", 2)]


def test_evidence_survives_at_every_site(
    llm_request: LLMRequest, deliver: Callable[..., int], site: Site
) -> None:
    """Reading breaks: with ATOMIC_REQUESTS and a naive view that would roll the receipt back."""
    ours = {**settings.QSTASH_LLM, "PRICES": ["broken"]}
    with override_settings(QSTASH_LLM=ours):
        body = json.dumps(ANSWER).encode()
        assert deliver(Callback(status=200, body=body, source_message_id="msg_1")) == 200
    receipt = CallbackResponse.objects.get()
    assert receipt.applied_at is None
    assert receipt.apply_again()
    llm_request.refresh_from_db()
    assert llm_request.state == "completed"


def views_of(resolver: URLResolver) -> Iterator[type[APIView]]:
    """All of ours that Django REST framework serves."""
    for each in resolver.url_patterns:
        if isinstance(each, URLResolver):
            yield from views_of(each)
        elif isinstance(each, URLPattern) and hasattr(each.callback, "cls"):
            yield each.callback.cls


# Whatever has a default that the host can set.
TAKEN_FROM_THE_HOST = [
    "get_exception_handler",
    "schema",
    *(
        name.removeprefix("DEFAULT_").lower()
        for name in DEFAULTS
        if hasattr(APIView, name.removeprefix("DEFAULT_").lower())
    ),
]


@pytest.mark.parametrize(
    "view", sorted(set(views_of(get_resolver())), key=lambda view: view.__name__)
)
@pytest.mark.parametrize("name", TAKEN_FROM_THE_HOST)
def test_no_view_of_ours_takes_anything_from_the_host(view: type[APIView], name: str) -> None:
    settled_by = next(each for each in view.__mro__ if name in vars(each))
    assert settled_by.__module__.startswith("django_qstash_llm.")


def test_what_a_host_can_set_is_known() -> None:
    assert set(TAKEN_FROM_THE_HOST) >= {
        "authentication_classes",
        "content_negotiation_class",
        "metadata_class",
        "parser_classes",
        "permission_classes",
        "renderer_classes",
        "throttle_classes",
        "versioning_class",
    }
