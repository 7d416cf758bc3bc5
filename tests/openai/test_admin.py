"""Keys as people make them: in the admin, and by ``manage.py llm_keys``."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from typing import Any
from uuid import uuid4

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import User
from django.contrib.sessions.models import Session
from django.core.management import CommandError, call_command
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from django_qstash_llm.models import ApiKey, BatchInput, File, FilePart, LLMRequest
from django_qstash_llm.models.batch_input import begin
from django_qstash_llm.models.caller import Caller
from django_qstash_llm.models.request import CallerKind
from tests.test_admin import Page, act, assert_inert, staff_client

from .conftest import ASK

__all__ = ["staff_client"]  # a fixture

pytestmark = pytest.mark.django_db

LIST = "admin:django_qstash_llm_apikey_changelist"
ADD = "admin:django_qstash_llm_apikey_add"
CHANGE = "admin:django_qstash_llm_apikey_change"
FORM = {
    "name": "phone",
    "user": "",
    "tenant": "acme",
    "scopes": ["chat", "models"],
    "provider": "anthropic",
    "allowed_models": "openai/*\r\n\r\n gpt-5.4-mini ",
    "requests_per_minute": "60",
    "expires_at_0": "",
    "expires_at_1": "",
}


def key_on(page: Page) -> str:
    [key] = [text.strip() for text in page.texts if text.strip().startswith("qllm_")]
    return key


def test_a_key_is_made_and_shown_once(admin_client: Client) -> None:
    response = admin_client.post(reverse(ADD), FORM)
    page = Page(response)
    assert_inert(page)
    assert "no-store" in response.headers["Cache-Control"]
    key = key_on(page)
    api_key = ApiKey.objects.of(key, now=timezone.now())
    assert api_key
    assert (api_key.tenant, api_key.scopes) == ("acme", ["chat", "models"])
    assert api_key.provider == "anthropic"
    assert (api_key.allowed_models, api_key.requests_per_minute) == (
        ["openai/*", "gpt-5.4-mini"],
        60,
    )
    # Nowhere else, and never again.
    for url in (reverse(LIST), reverse(CHANGE, args=[api_key.pk])):
        page = Page(admin_client.get(url))
        assert_inert(page)
        assert key not in page.html
        assert f"{api_key.prefix}…" in page.text
    kept = [*LogEntry.objects.values(), *ApiKey.objects.values()]
    kept += [session.get_decoded() for session in Session.objects.all()]
    assert key not in str(kept)


def test_a_form_that_is_wrong_makes_no_key(admin_client: Client) -> None:
    for change in ({"scopes": []}, {"name": ""}, {"requests_per_minute": "0"}, {"provider": "x"}):
        page = Page(admin_client.post(reverse(ADD), FORM | change))
        assert "correct the error" in page.text
    assert not ApiKey.objects.exists()


def test_a_key_is_changed_and_stays_the_same(admin_client: Client) -> None:
    api_key, key = ApiKey.objects.issue("phone", allowed_models=["a", "b"])
    url = reverse(CHANGE, args=[api_key.pk])
    assert "a\nb" in Page(admin_client.get(url)).html
    response = admin_client.post(url, FORM | {"name": "tablet"})
    assert response.status_code == 302
    changed = ApiKey.objects.of(key, now=timezone.now())
    assert changed
    assert (changed.name, changed.requests_per_minute) == ("tablet", 60)


def test_a_key_is_revoked_from_its_page_and_from_the_list(admin_client: Client) -> None:
    first, second, third = (ApiKey.objects.issue(name)[0] for name in "abc")
    page = Page(admin_client.get(reverse(CHANGE, args=[first.pk])))
    assert page.buttons() == ["revoke"]
    response = act(admin_client, LIST, "revoke", first, from_page=1)
    assert response.url == reverse(CHANGE, args=[first.pk])
    assert Page(admin_client.get(response.url)).buttons() == []
    act(admin_client, LIST, "revoke", first, second)
    assert list(ApiKey.objects.filter(revoked_at=None)) == [third]
    assert LogEntry.objects.count() == 2


def test_who_may_only_view_makes_changes_and_revokes_nothing(
    staff_client: Callable[..., Client],
) -> None:
    api_key, _ = ApiKey.objects.issue("phone")
    client = staff_client("view_apikey")
    page = Page(client.get(reverse(CHANGE, args=[api_key.pk])))
    assert page.buttons() == []
    assert client.post(reverse(ADD), FORM).status_code == 403
    assert client.post(reverse(CHANGE, args=[api_key.pk]), FORM).status_code == 403
    act(client, LIST, "revoke", api_key)
    api_key.refresh_from_db()
    assert (ApiKey.objects.count(), api_key.revoked_at) == (1, None)


def test_the_list_says_what_was_asked_by_each(admin_client: Client) -> None:
    for name in "ab":
        api_key, _ = ApiKey.objects.issue(name)
        rows = [LLMRequest(messages=ASK, state="completed", api_key=api_key) for _ in range(1234)]
        LLMRequest.objects.bulk_create(rows)
    page = Page(admin_client.get(reverse(LIST)))
    assert page.text.count("1,234") == 2


# --- by command ----------------------------------------------------------------------------------


def keys(*arguments: str) -> tuple[str, str]:
    out, err = StringIO(), StringIO()
    call_command("llm_keys", *arguments, stdout=out, stderr=err, no_color=True)
    return out.getvalue(), err.getvalue()


def test_a_key_by_command() -> None:
    user = User.objects.create_user("ann")
    out, err = keys(
        *("create", "cron job", "--user", "ann", "--tenant", "acme", "--scope", "chat"),
        *("--model", "openai/*", "--model", "m", "--per-minute", "9", "--expires", "30"),
        *("--provider", "openai"),
    )
    api_key = ApiKey.objects.of(out.strip(), now=timezone.now())
    assert api_key
    assert out.strip() not in err
    assert (api_key.user, api_key.tenant, api_key.scopes) == (user, "acme", ["chat"])
    assert (api_key.allowed_models, api_key.requests_per_minute) == (["openai/*", "m"], 9)
    assert api_key.expires_at
    assert 29 <= (api_key.expires_at - timezone.now()).days <= 30


def test_keys_are_listed_and_revoked_by_their_beginning() -> None:
    first, _ = ApiKey.objects.issue("first")
    second, key = ApiKey.objects.issue("second")
    assert keys("revoke", f"{first.prefix}…")[0] == f"{first}: revoked.\n"
    assert keys("revoke", first.prefix)[0] == f"{first}: was revoked before.\n"
    listed = keys("list")[0].splitlines()
    assert listed[0] == f"{first.prefix}  revoked  used never  first"
    assert listed[1] == f"{second.prefix}  usable  used never  second"
    assert keys("revoke", key)[0] == f"{second}: revoked.\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["revoke", "qllm_"], "several"),
        (["revoke", ""], "no key"),
        (["revoke", "qllm_nothing"], "no key"),
        (["create", "k", "--user", "nobody"], "nobody"),
        (["create", "k", "--provider", "nobody"], "PROVIDERS"),
        (["create", "k", "--per-minute", "0"], "requests_per_minute"),
        (["create", ""], "name"),
    ],
)
def test_what_cannot_be_done_is_said(arguments: list[str], said: Any) -> None:
    for name in "ab":
        ApiKey.objects.issue(name)
    with pytest.raises(CommandError, match=said):
        keys(*arguments)
    assert ApiKey.objects.filter(revoked_at=None).count() == 2


# --- files and batches ---------------------------------------------------------------------------


def asked_by_a_file(*lines: bytes) -> BatchInput:
    api_key, _ = ApiKey.objects.issue("phone")
    caller = Caller(kind=CallerKind.KEY, api_key=api_key)
    file = File(purpose="batch", filename="<moons>.jsonl", **caller.owner)
    File.objects.store(file, lines)
    return begin(file, caller, uuid=uuid4(), metadata={}, keep_seconds=None, now=timezone.now())


def test_a_file_is_shown_with_its_beginning_and_its_batches(admin_client: Client) -> None:
    batch_input = asked_by_a_file(b"<b>{" + b"x" * 40_000 + b"\n")
    file = File.objects.get()
    page = Page(admin_client.get(reverse("admin:django_qstash_llm_file_changelist")))
    assert_inert(page)
    assert "40,005" in page.text
    page = Page(admin_client.get(reverse("admin:django_qstash_llm_file_change", args=[file.pk])))
    assert_inert(page)
    assert "<b>{xxx" in page.text
    assert "Cut here" in page.text
    assert reverse("admin:django_qstash_llm_batch_change", args=[batch_input.batch_id]) in page.html
    found = admin_client.get(
        reverse("admin:django_qstash_llm_file_changelist"), {"q": f"file-{file.uuid.hex}"}
    )
    assert "moons" in Page(found).text
    assert admin_client.get(reverse("admin:django_qstash_llm_file_add")).status_code == 403


def test_a_batch_says_what_is_wrong_with_its_file(
    admin_client: Client, django_capture_on_commit_callbacks: Any
) -> None:
    with django_capture_on_commit_callbacks(execute=True):
        batch_input = asked_by_a_file(b"<b>\n")
    url = reverse("admin:django_qstash_llm_batch_change", args=[batch_input.batch_id])
    page = Page(admin_client.get(url))
    assert_inert(page)
    for shown in ("failed", "0 / –", "invalid_json_line", "phone"):
        assert shown in page.text
    File.objects.all().delete()
    assert "gone" in Page(admin_client.get(url)).text


def test_a_file_is_deleted_with_its_text(admin_client: Client) -> None:
    asked_by_a_file(b"{}\n")
    url = reverse("admin:django_qstash_llm_file_delete", args=[File.objects.get().pk])
    assert admin_client.post(url, {"post": "yes"}).status_code == 302
    assert not FilePart.objects.exists()
