from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Permission
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from django_qstash_llm.server import counting, redaction
from django_qstash_llm.server.delivery import Engine
from django_qstash_llm.server.models import (
    DeadLetter,
    FlowControlKey,
    LogEntry,
    Message,
    Queue,
    Schedule,
    SigningKeys,
    UrlGroup,
)

from .conftest import KEYS, PROVIDER, Api, Wire, state

MARKUP = "<script>alert(1)</script>"
MODELS = [
    DeadLetter,
    FlowControlKey,
    LogEntry,
    Message,
    Queue,
    Schedule,
    SigningKeys,
    UrlGroup,
]
FLOW = {
    "Upstash_Flow_Control_Key": "openai",
    "Upstash_Flow_Control_Value": "parallelism=1, rate=5, period=60",
}


@pytest.fixture
def staff(db: None) -> Client:
    client = Client()
    client.force_login(get_user_model().objects.create_superuser("admin", "a@a.test", "pw"))
    return client


@pytest.fixture
def history(api: Api, engine: Engine, wire: Wire) -> str:
    """A message that failed, one that was delivered, one that waits in a queue, one of each else."""
    wire.answers(httpx.Response(500, text=MARKUP, headers={"X-M": MARKUP}), httpx.Response(200))
    failed = api.published(
        body=MARKUP.encode(), Upstash_Retries="0", Upstash_Forward_Authorization="Bearer canary"
    )
    engine.deliver_due()
    api.published(f"{PROVIDER}?q={MARKUP.replace('<', '%3C')}")
    engine.deliver_due()
    api.enqueue("q")
    api.published(**FLOW)
    scheduled(api)
    group(api)
    api.post("/v2/keys/rotate")
    return failed


def scheduled(api: Api) -> Schedule:
    headers = {
        "Upstash-Cron": "0 * * * *",
        "Upstash-Forward-Authorization": "Bearer canary",
        "Upstash-Forward-X-M": MARKUP,
    }
    answer = api.post(f"/v2/schedules/{PROVIDER}", MARKUP.encode(), headers=headers)
    assert answer.status_code == 200, answer.content
    return Schedule.objects.get(schedule_id=answer.json()["scheduleId"])


def group(api: Api, name: str = "everyone", count: int = 5) -> UrlGroup:
    endpoints = [
        {"url": f"https://e{number}.test/", "name": f"n{number}"} for number in range(count)
    ]
    answer = api.post(f"/v2/topics/{name}/endpoints", {"endpoints": endpoints})
    assert answer.status_code == 200, answer.content
    return UrlGroup.objects.get(name=name)


def changelist(model: type) -> str:
    return reverse(f"admin:qstash_server_{model.__name__.lower()}_changelist")


def page_of(row: Any) -> str:
    return reverse(f"admin:qstash_server_{type(row).__name__.lower()}_change", args=[row.pk])


def act(client: Client, action: str, *rows: Any, **values: str) -> str:
    answer = client.post(
        changelist(type(rows[0])),
        {"action": action, "_selected_action": [row.pk for row in rows], **values},
        follow=True,
    )
    assert answer.status_code == 200
    return answer.content.decode()


def confirmed(client: Client, action: str, *rows: Any) -> str:
    """Asked whether that is really meant, and nothing done so far; then it is."""
    asked = act(client, action, *rows)
    assert "Yes, I’m sure" in asked
    assert all(type(row).objects.filter(pk=row.pk).exists() for row in rows)
    return act(client, action, *rows, confirmed="1")


@pytest.mark.parametrize("model", MODELS)
def test_pages_show_foreign_text_as_text_and_no_keys(
    staff: Client, history: str, model: type
) -> None:
    rows = model._default_manager.all()
    assert rows
    for url in [changelist(model), f"{changelist(model)}?q=provider", *map(page_of, rows)]:
        answer = staff.get(url)
        assert answer.status_code == 200
        content = answer.content.decode()
        assert MARKUP not in content
        assert "canary" not in content
        assert KEYS[0] not in content
        assert KEYS[1] not in content


def test_a_failed_message_shows_what_was_asked_and_answered(staff: Client, history: str) -> None:
    letter = DeadLetter.objects.get()
    assert "&lt;script&gt;alert(1)" in staff.get(page_of(letter)).content.decode()
    message = staff.get(page_of(letter.message)).content.decode()
    assert "&lt;script&gt;alert(1)" in message
    assert "REDACTED" in message


@pytest.mark.parametrize("model", MODELS)
def test_nothing_is_added_edited_or_deleted(staff: Client, history: str, model: type) -> None:
    row = model._default_manager.first()
    name = f"admin:qstash_server_{model.__name__.lower()}"
    assert staff.get(reverse(f"{name}_add")).status_code == 403
    assert staff.post(reverse(f"{name}_delete", args=[row.pk]), {"post": "yes"}).status_code == 403
    assert staff.post(page_of(row), {"state": "DELIVERED"}).status_code == 403
    assert "delete_selected" not in staff.get(changelist(model)).content.decode()


def test_messages_are_cancelled(staff: Client, api: Api) -> None:
    ids = [api.published(Upstash_Delay="1h") for _ in range(2)]
    assert "2 messages cancelled." in act(staff, "cancel", *Message.objects.all())
    assert [state(message_id) for message_id in ids] == ["CANCELED"] * 2


def test_dead_letters_are_retried_and_deleted(
    staff: Client, api: Api, engine: Engine, wire: Wire
) -> None:
    wire.answers(httpx.Response(500))
    for _ in range(2):
        api.published(Upstash_Retries="0")
    engine.deliver_due()
    first, second = DeadLetter.objects.order_by("pk")
    assert "1 published again." in act(staff, "retry", first)
    assert Message.objects.filter(state="CREATED").count() == 1
    assert "1 dead letter deleted." in confirmed(staff, "discard", second)
    assert not DeadLetter.objects.exists()


def test_a_dead_letter_that_is_refused_now_says_why(
    staff: Client, api: Api, engine: Engine, wire: Wire, configure: Callable[..., None]
) -> None:
    wire.answers(httpx.Response(500))
    api.published(Upstash_Retries="4")
    Message.objects.update(retries=0)
    engine.deliver_due()
    configure(MAX_RETRIES=3)
    assert "quota maxRetries exceeded" in act(staff, "retry", DeadLetter.objects.get())
    assert DeadLetter.objects.count() == 1


def test_a_dead_letter_that_cannot_be_read_any_more_stops_no_other(
    staff: Client, api: Api, engine: Engine, wire: Wire
) -> None:
    wire.answers(httpx.Response(500))
    for _ in range(3):
        api.published(Upstash_Retries="0")
    engine.deliver_due()
    letters = list(DeadLetter.objects.order_by("pk"))
    Message.objects.filter(dead_letter=letters[1]).update(
        headers={"Upstash-Delay": "1h", "Upstash-Retries": "x"}
    )
    shown = act(staff, "retry", *letters)
    assert "retries" in shown.lower()
    assert "2 published again." in shown
    assert DeadLetter.objects.get() == letters[1]


def test_queues_are_paused_and_resumed(staff: Client, api: Api) -> None:
    api.enqueue("q")
    assert "1 queue paused." in act(staff, "pause", Queue.objects.get())
    assert Queue.objects.get().is_paused
    assert "1 queue resumed." in act(staff, "resume", Queue.objects.get())
    assert not Queue.objects.get().is_paused


@pytest.mark.parametrize(("query", "count"), [("", 2), ("?paused=yes", 1), ("?paused=no", 1)])
def test_queues_are_filtered_by_whether_they_are_paused(
    staff: Client, api: Api, query: str, count: int
) -> None:
    api.enqueue("q")
    api.enqueue("r")
    Queue.objects.get(name="r").pause(now=timezone.now())
    answer = staff.get(f"{changelist(Queue)}{query}")
    assert answer.context["cl"].result_count == count


def test_a_queue_is_deleted_with_what_waits_in_it(staff: Client, api: Api) -> None:
    message_id = api.enqueue("q")
    assert "1 queue deleted." in confirmed(staff, "discard", Queue.objects.get())
    assert not Queue.objects.standing().exists()
    assert state(message_id) == "CANCELED"


def test_flow_control_keys_are_paused_resumed_and_count_anew(staff: Client, api: Api) -> None:
    api.published(**FLOW)
    key = FlowControlKey.objects.get()
    assert "1 key paused." in act(staff, "pause", key)
    assert FlowControlKey.objects.get().is_paused
    assert "1 key resumed." in act(staff, "resume", key)
    assert not FlowControlKey.objects.get().is_paused
    FlowControlKey.objects.update(rate_count=5)
    assert "1 key begins to count anew." in act(staff, "reset_rate", key)
    assert FlowControlKey.objects.get().rate_count == 0


def test_a_flow_control_keys_values_are_pinned_on_its_page(staff: Client, api: Api) -> None:
    api.published(**FLOW)
    key = FlowControlKey.objects.get()
    url = reverse("admin:qstash_server_flowcontrolkey_pin", args=[key.pk])
    assert f'action="{url}"' in staff.get(page_of(key)).content.decode()
    shown = staff.post(url, {"parallelism": "7", "rate": "", "period": ""}, follow=True)
    assert shown.redirect_chain == [(page_of(key), 302)]
    assert "Pinned." in shown.content.decode()
    key.refresh_from_db()
    assert (key.parallelism, key.pins_parallelism, key.pins_rate) == (7, True, False)
    staff.post(url, {"parallelism": "", "rate": "9", "period": "30"})
    key.refresh_from_db()
    assert (key.parallelism, key.rate, key.period, key.pins_rate) == (7, 9, 30, True)
    assert "1 key unpinned." in act(staff, "unpin", key)
    key.refresh_from_db()
    assert (key.pins_parallelism, key.pins_rate) == (False, False)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({}, "Give parallelism, rate or both to pin."),
        ({"period": "5"}, "Give parallelism, rate or both to pin."),
        ({"parallelism": "0"}, "Parallelism: Ensure this value is greater than or equal to 1."),
        ({"rate": "many"}, "Rate: Enter a whole number."),
        ({"rate": "1", "period": "9999999"}, "Period: Ensure this value is less than"),
    ],
)
def test_what_cannot_be_pinned_says_why(
    staff: Client, api: Api, values: dict[str, str], problem: str
) -> None:
    api.published(**FLOW)
    key = FlowControlKey.objects.get()
    url = reverse("admin:qstash_server_flowcontrolkey_pin", args=[key.pk])
    assert problem in staff.post(url, values, follow=True).content.decode()
    key.refresh_from_db()
    assert (key.parallelism, key.rate, key.period) == (1, 5, 60)
    assert (key.pins_parallelism, key.pins_rate) == (False, False)


def test_schedules_are_paused_resumed_and_deleted(staff: Client, api: Api) -> None:
    schedule = scheduled(api)
    assert "1 schedule paused." in act(staff, "pause", schedule)
    assert Schedule.objects.get().next_at is None
    assert "1 schedule resumed." in act(staff, "resume", schedule)
    assert Schedule.objects.get().next_at is not None
    assert "1 schedule deleted." in confirmed(staff, "discard", schedule)
    assert not Schedule.objects.exists()


def test_url_groups_are_deleted(staff: Client, api: Api) -> None:
    everyone = group(api)
    assert "n0: https://e0.test/<br>" in staff.get(changelist(UrlGroup)).content.decode()
    assert "and 2 more" in staff.get(changelist(UrlGroup)).content.decode()
    assert "n4: https://e4.test/" in staff.get(page_of(everyone)).content.decode()
    assert "1 URL group deleted." in confirmed(staff, "discard", everyone)
    assert not UrlGroup.objects.exists()


def test_a_button_on_a_page_comes_back_to_it(staff: Client, api: Api) -> None:
    api.enqueue("q")
    queue = Queue.objects.get()
    page = staff.get(page_of(queue)).content.decode()
    assert 'name="action" value="pause"' in page
    assert 'name="action" value="resume"' not in page
    answer = staff.post(
        changelist(Queue), {"action": "pause", "_selected_action": [queue.pk], "from_page": "1"}
    )
    assert answer["Location"] == page_of(queue)
    page = staff.get(page_of(queue)).content.decode()
    assert 'name="action" value="resume"' in page


def test_what_is_over_is_not_offered_to_be_cancelled(
    staff: Client, api: Api, engine: Engine
) -> None:
    api.published()
    assert 'value="cancel"' in staff.get(page_of(Message.objects.get())).content.decode()
    engine.deliver_due()
    assert 'value="cancel"' not in staff.get(page_of(Message.objects.get())).content.decode()


def viewer_of(*models: type, codename: str = "view") -> Client:
    user = get_user_model().objects.create_user("viewer", is_staff=True)
    for model in models:
        name = f"{codename}_{model.__name__.lower()}"
        ours = Permission.objects.filter(content_type__app_label="qstash_server")
        user.user_permissions.add(ours.get(codename=name))
    client = Client()
    client.force_login(user)
    return client


def test_who_may_only_look_is_offered_no_actions(staff: Client, history: str) -> None:
    viewer = viewer_of(*MODELS)
    for model in MODELS:
        listed = viewer.get(changelist(model))
        assert listed.status_code == 200
        assert 'name="action"' not in listed.content.decode()
        row = model._default_manager.order_by("-pk").first()
        page = viewer.get(page_of(row))
        assert page.status_code == 200
        assert 'name="action"' not in page.content.decode()
        assert "pin-heading" not in page.content.decode()
    waiting = Message.objects.filter(state="CREATED")
    before = waiting.count()
    viewer.post(
        changelist(Message), {"action": "cancel", "_selected_action": [row.pk for row in waiting]}
    )
    assert waiting.count() == before
    key = FlowControlKey.objects.get()
    url = reverse("admin:qstash_server_flowcontrolkey_pin", args=[key.pk])
    assert viewer.post(url, {"parallelism": "9"}).status_code == 403
    key.refresh_from_db()
    assert key.parallelism == 1


def test_who_may_change_one_kind_may_not_change_another(history: str) -> None:
    client = viewer_of(Queue, codename="change")
    assert "1 queue paused." in act(client, "pause", Queue.objects.get())
    for model in (Message, DeadLetter, FlowControlKey, Schedule):
        assert client.get(changelist(model)).status_code == 403


def test_the_list_says_what_messages_wait_for(staff: Client, api: Api) -> None:
    api.enqueue("summaries")
    api.enqueue("summaries")
    api.published(Upstash_Delay="1h")
    [api.published(**FLOW) for _ in range(2)]
    Message.objects.claim(engine="host/1:7:2", limit=1, now=timezone.now(), lease=30)
    shown = staff.get(changelist(Message)).content.decode()
    for words in (
        "turn in queue summaries, next",
        "delayed until ",
        "held by host, process 7",
        "flow control openai",
    ):
        assert words in shown
    waiting = Message.objects.filter(waits_for="queue").last()
    assert waiting is not None
    assert "turn in queue summaries" in staff.get(page_of(waiting)).content.decode()


@pytest.mark.parametrize(
    ("query", "count"),
    [
        ("waits=answer", 1),
        ("waits=time", 1),
        ("waits=queue", 1),
        ("waits=flow", 1),
        ("waits=whatever", 4),
        ("state__exact=ACTIVE", 1),
        ("queue=nonsense", 4),
        ("queue=999999", 0),
        ("q=provider", 4),
        ("q=msg_", 4),
        ("q=msg_nowhere", 0),
        ("q=nowhere", 0),
    ],
)
def test_messages_are_filtered_and_found(staff: Client, api: Api, query: str, count: int) -> None:
    api.published(Upstash_Delay="1h")
    api.published(**FLOW)
    api.published()
    Message.objects.filter(waits_for="", due_at__lte=timezone.now()).update(
        claim_token="t", claimed_by="x:1:2", state="ACTIVE"
    )
    api.enqueue("q")
    answer = staff.get(f"{changelist(Message)}?{query}")
    assert answer.status_code == 200
    assert answer.context["cl"].result_count == count


def test_a_message_is_found_by_its_id_wherever_it_is_told_of(staff: Client, history: str) -> None:
    for model, count in ((Message, 1), (DeadLetter, 1), (LogEntry, 4)):
        answer = staff.get(f"{changelist(model)}?q={history}")
        assert answer.context["cl"].result_count == count


@pytest.mark.parametrize(
    ("status", "query"), [(429, "429"), (404, "4xx"), (503, "5xx"), (-1, "none")]
)
def test_dead_letters_are_filtered_by_their_last_answer(
    staff: Client, api: Api, engine: Engine, wire: Wire, status: int, query: str
) -> None:
    wire.answers(httpx.Response(500))
    api.published(Upstash_Retries="0")
    engine.deliver_due()
    DeadLetter.objects.update(response_status=status)
    for value in ("429", "4xx", "5xx", "none"):
        answer = staff.get(f"{changelist(DeadLetter)}?answer={value}")
        assert answer.context["cl"].result_count == (value == query)


@pytest.mark.parametrize("model", [m for m in MODELS if m is not SigningKeys])
def test_accounts_are_told_only_where_there_are_several(
    staff: Client, history: str, configure: Callable[..., None], model: type
) -> None:
    assert "By account" not in staff.get(changelist(model)).content.decode()
    configure(ACCOUNTS={"other": {"TOKEN": "others"}})
    shown = staff.get(changelist(model)).content.decode()
    assert "By account" in shown
    assert '<td class="field-account_name">default</td>' in shown
    for name, is_there in (("default", True), ("other", False)):
        answer = staff.get(f"{changelist(model)}?account={name}")
        assert bool(answer.context["cl"].result_count) is is_there


def test_a_body_that_is_gone_is_said_to_be(staff: Client, history: str) -> None:
    Message.objects.update(is_purged=True, body=b"")
    page = staff.get(page_of(Message.objects.get(message_id=history))).content.decode()
    assert "Gone: it was finished so long ago." in page


# --- what it costs -------------------------------------------------------------------------------


def test_of_a_long_list_nothing_is_counted_far(staff: Client, api: Api) -> None:
    api.enqueue("q")
    [row] = Message.objects.all()
    Message.objects.bulk_create(
        (
            Message(
                message_id=f"msg_{number}",
                url=PROVIDER,
                method="POST",
                retries=0,
                timeout=1,
                queue=row.queue,
                waits_for="queue",
                created_at=row.created_at,
                not_before=row.not_before,
            )
            for number in range(counting.MOST + 50)
        ),
        batch_size=500,
    )
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("ANALYZE qstash_server_message")
    whole = staff.get(changelist(Message))
    assert whole.context["cl"].result_count == counting.MOST + 51
    assert "Beyond 10,000 the number is not exact" in whole.content.decode()
    filtered = staff.get(f"{changelist(Message)}?waits=queue")
    assert filtered.context["cl"].result_count == counting.MOST + 1
    assert "turn in queue q, 1,000+ before it" in filtered.content.decode()
    short = staff.get(f"{changelist(Message)}?q=msg_{counting.MOST}")
    assert "Beyond 10,000" not in short.content.decode()


@pytest.mark.parametrize("model", MODELS)
def test_a_list_looks_at_no_whole_table(staff: Client, history: str, model: type) -> None:
    """No distinct values, no first and last date, no facets, and a limit to each count."""
    with CaptureQueriesContext(connection) as captured:
        staff.get(changelist(model))
    for query in captured.captured_queries:
        sql = query["sql"]
        if model._meta.db_table not in sql:
            continue
        assert "DISTINCT" not in sql
        assert "MIN(" not in sql
        assert " LIMIT " in sql or model is SigningKeys or "COUNT" not in sql


@pytest.mark.parametrize("model", MODELS)
def test_a_list_takes_the_same_queries_however_long_it_is(
    staff: Client, api: Api, engine: Engine, wire: Wire, model: type
) -> None:
    wire.answers(httpx.Response(500))

    def queries() -> int:
        number = Queue.objects.count()
        api.published(Upstash_Retries="0")
        engine.deliver_due()
        [api.enqueue(f"q{number}") for _ in range(3)]
        flow = FLOW | {"Upstash_Flow_Control_Key": f"k{number}"}
        [api.published(**flow) for _ in range(3)]
        api.published(Upstash_Delay="1h")
        Message.objects.claim(engine="host/1:7:2", limit=2, now=timezone.now(), lease=30)
        scheduled(api)
        group(api, f"g{number}")
        with CaptureQueriesContext(connection) as captured:
            staff.get(changelist(model))
        return len(captured)

    queries()
    assert queries() == queries()


def test_a_callbacks_page_hides_what_its_original_asks_to_hide(
    staff: Client, api: Api, engine: Engine
) -> None:
    api.published(
        body=b"very private",
        Upstash_Redact_Fields="body,header[Authorization]",
        Upstash_Forward_Authorization="Bearer k",
        Upstash_Callback="https://site.test/callback/",
    )
    engine.deliver_due()
    original, callback = Message.objects.order_by("pk")
    page = staff.get(page_of(callback)).content.decode()
    assert redaction.fingerprint(bytes(callback.body)) in page
    page = staff.get(page_of(original)).content.decode()
    assert redaction.fingerprint(b"Bearer k") in page
