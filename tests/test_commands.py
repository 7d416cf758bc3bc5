from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from django.core.management import CommandError, call_command
from django.test import override_settings
from django.utils import timezone

from django_qstash_llm.models import CallbackResponse, Lane, LLMRequest, Price
from django_qstash_llm.qstash import Callback, DeadLetter, LogEntry, MessageRecord

from .conftest import ANSWER
from .wire import FakeQStash

pytestmark = pytest.mark.django_db

MESSAGES = [{"role": "user", "content": "?"}]
NOTHING_OVERDUE = "0 callbacks read again. 0 overdue: 0 recovered, 0 failed, 0 lost, 0 waiting.\n"


def sweep(*arguments: str, **streams: StringIO) -> str:
    out = StringIO()
    call_command("llm_sweep", *arguments, stdout=out, **streams)
    return out.getvalue()


def test_sweep_submits_and_announces_here_and_now(
    qstash: FakeQStash, post_callback: Callable[..., Any]
) -> None:
    done = LLMRequest.objects.publish(MESSAGES)
    answer = json.dumps(ANSWER).encode()
    post_callback(done, Callback(status=200, body=answer, source_message_id="msg_1"))
    LLMRequest.objects.bulk_create([LLMRequest(messages=MESSAGES) for _ in range(3)])
    assert sweep() == "3 submitted, 1 announced, 0 still pending.\n" + NOTHING_OVERDUE
    assert LLMRequest.objects.submitted().count() == 3
    done.refresh_from_db()
    assert done.announced_at is not None


def test_sweep_with_nothing_to_do_says_so(qstash: FakeQStash) -> None:
    assert sweep() == "0 submitted, 0 announced, 0 still pending.\n" + NOTHING_OVERDUE
    assert qstash.calls == []


def test_sweep_takes_more_than_one_claim(qstash: FakeQStash) -> None:
    rows = [
        LLMRequest(messages=MESSAGES, provider="openai", model="m", retries=1) for _ in range(2010)
    ]
    LLMRequest.objects.bulk_create(rows)
    assert sweep() == "2010 submitted, 0 announced, 0 still pending.\n" + NOTHING_OVERDUE


def test_sweep_that_qstash_refuses_says_what_to_look_at(qstash: FakeQStash) -> None:
    qstash.answer = lambda request: httpx.Response(401, json={"error": "invalid token"})
    LLMRequest.objects.bulk_create([LLMRequest(messages=MESSAGES)])
    with pytest.raises(CommandError, match="QSTASH_TOKEN"):
        sweep()
    assert LLMRequest.objects.pending().count() == 1


@override_settings(QSTASH_TOKEN="")
def test_sweep_without_a_token_names_the_setting() -> None:
    with pytest.raises(CommandError, match="QSTASH_TOKEN"):
        sweep()


def test_sweep_asks_about_what_is_overdue_and_announces_it(qstash: FakeQStash) -> None:
    now = timezone.now()
    fields = {"messages": MESSAGES, "state": "submitted", "deadline_at": now - timedelta(hours=1)}
    rows = [LLMRequest(**fields, qstash_message_id=f"msg_{n}", inquiries=1) for n in range(150)]
    rows = LLMRequest.objects.bulk_create(rows)
    answered, failed, waiting, *_ = rows
    answer = Callback(status=200, body=json.dumps(ANSWER).encode(), source_message_id="msg_0")
    dead = DeadLetter(
        message_id="msg_back",
        dlq_id="1-1",
        url=f"http://testserver/llm/callback/{answered.uuid}/",
        body=answer.to_json(),
    )
    entry = LogEntry(
        time=1, message_id="msg_1", state="CANCELED", url="", labels=(failed.wire_label,)
    )
    qstash.dead_letters.append(dead.to_json())
    qstash.logs.append(entry.to_json())
    qstash.kept["msg_2"] = MessageRecord(message_id="msg_2", url="").to_json()
    assert sweep() == (
        "0 submitted, 149 announced, 0 still pending.\n"
        "0 callbacks read again. 150 overdue: 1 recovered, 1 failed, 147 lost, 1 waiting.\n"
    )
    waiting.refresh_from_db()
    assert waiting.state == "submitted"


def test_sweep_reads_stored_callbacks_again(qstash: FakeQStash) -> None:
    [row] = LLMRequest.objects.bulk_create([LLMRequest(messages=MESSAGES, state="submitted")])
    CallbackResponse.objects.create(
        uuid=row.uuid,
        llm_request=row,
        kind="callback",
        source_message_id="msg_1",
        status=200,
        body=json.dumps(ANSWER).encode(),
        apply_tries=1,
    )
    assert sweep() == (
        "0 submitted, 1 announced, 0 still pending.\n"
        "1 callbacks read again. 0 overdue: 0 recovered, 0 failed, 0 lost, 0 waiting.\n"
    )


def test_sweep_that_cannot_ask_says_so_and_ends_as_usual(qstash: FakeQStash) -> None:
    qstash.answer = lambda request: httpx.Response(503)
    fields = {"messages": MESSAGES, "state": "submitted", "deadline_at": timezone.now()}
    LLMRequest.objects.bulk_create([LLMRequest(**fields) for _ in range(3)])
    errors = StringIO()
    assert "1 overdue: 0 recovered, 0 failed, 0 lost, 1 waiting." in sweep(stderr=errors)
    assert "Some could not be asked about: QStash answered 503" in errors.getvalue()
    assert len(qstash.calls) == 1


def test_sweep_of_another_database_is_named() -> None:
    assert (
        sweep("--database", "default")
        == "0 submitted, 0 announced, 0 still pending.\n" + NOTHING_OVERDUE
    )


@pytest.mark.django_db(databases=["default", "second"], transaction=True)
def test_commands_look_where_a_router_has_put_our_rows(
    second_database: str, qstash: FakeQStash
) -> None:
    LLMRequest.objects.bulk_create([LLMRequest(messages=MESSAGES)])
    assert sweep("--database", "default").startswith("0 submitted, 0 announced, 0 still pending.")
    assert sweep().startswith("1 submitted, 0 announced, 0 still pending.")
    row = LLMRequest.objects.get()
    ended_at = timezone.now() - timedelta(days=3)
    LLMRequest.objects.update(state="completed", finished_at=ended_at, announced_at=ended_at)
    out = StringIO()
    call_command("llm_purge", "--older-than", "1", stdout=out)
    assert out.getvalue().startswith("1 requests forgotten")
    call_command("llm_replay", "--failed", stdout=out)
    with pytest.raises(CommandError, match="1 of 1 could not be done"):
        call_command("llm_replay", str(row.uuid), "--dead-letters", "drop", stdout=out)
    assert f"{row.uuid} - refused: {row.uuid} has no known dead letter." in out.getvalue()


def lanes(*arguments: str) -> str:
    out = StringIO()
    call_command("llm_lanes", *arguments, stdout=out)
    return out.getvalue()


def test_a_lane_is_paused_listed_and_resumed(qstash: FakeQStash) -> None:
    assert lanes() == ""
    told = lanes("pause", "--provider", "openai", "--reason", "a new key", "--by", "ada")
    lane = Lane.objects.get()
    LLMRequest.objects.bulk_create([LLMRequest(messages=MESSAGES)])
    assert told == f"{lane.pause_in_words} 0 wait.\n"
    assert lanes() == f"{lane.pause_in_words} 1 wait.\n"
    assert sweep().startswith("0 submitted, 0 announced, 1 still pending.\n")
    assert lane.pause_in_words in sweep()
    assert lanes("resume", "--provider", "openai") == "openai: open. QStash is being told.\n"
    lane.refresh_from_db()
    assert (lane.is_paused, lane.resumed_by) == (False, "llm_lanes")
    assert sweep().startswith("1 submitted")


def test_a_lane_is_paused_for_a_while(qstash: FakeQStash) -> None:
    lanes("pause", "--tenant", "acme", "--for", "1h30m")
    span = Lane.objects.get().paused_until - timezone.now()
    assert timedelta(minutes=89) < span <= timedelta(minutes=90)
    lanes("pause", "--tenant", "acme", "--until", "2999-01-01T08:00+01:00")
    assert Lane.objects.get().paused_until.isoformat() == "2999-01-01T07:00:00+00:00"


def test_sweep_tells_qstash_of_lanes(qstash: FakeQStash) -> None:
    lanes("pause", "--queue", "slow")
    assert Lane.objects.get().is_held is None
    qstash.answer = lambda request: httpx.Response(200)
    sweep()
    assert Lane.objects.get().is_held is True
    assert qstash.calls == ["POST /v2/queues/slow/pause"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["pause"], "--provider: name at least one of provider, model, tenant, queue"),
        (["pause", "--provider", "opnai"], "--provider: there is no 'opnai'"),
        (["pause", "--tenant", "a", "--for", "long"], "--for long: give a duration"),
        (["pause", "--tenant", "a", "--until", "noon"], "--until noon: give a moment"),
        (["pause", "--tenant", "a", "--until", "2026-13-01T00:00"], "--until 2026-13"),
        (["pause", "--tenant", "a", "--until", "2001-01-01T00:00"], "--until: .* has passed"),
        (["resume", "--tenant", "a"], "There is no lane --tenant a"),
        (["resume", "--queue", "open"], "Lane queue open is not paused"),
    ],
)
def test_what_is_wrong_with_a_lane_names_the_option(arguments: list[str], problem: str) -> None:
    Lane.objects.create(queue="open")
    with pytest.raises(CommandError, match=problem):
        lanes(*arguments)


# --- prices ---


def llm_prices(*arguments: str) -> str:
    out = StringIO()
    call_command("llm_prices", *arguments, stdout=out)
    return out.getvalue()


def test_price_is_set_listed_and_changed(settings: Any) -> None:
    assert llm_prices("list") == "None.\n"
    settings.TIME_ZONE = "Europe/Berlin"
    llm_prices("set", "openai", "gpt-5*", "input=1", "output=8", "--since", "2026-01-01")
    assert llm_prices("add", "openai", "gpt-5*", "input=1.0") == "None.\n"
    changed = llm_prices("set", "openai", "gpt-5*", "input=2", "--since", "2999-01-01T00:00+01:00")
    assert "openai/gpt-5* · input: $2/M since 2999-01-01 00:00+01:00" in changed
    listed = llm_prices("list", "--provider", "openai")
    assert listed.count("\n") == 2
    assert "$1/M since 2026-01-01 00:00+01:00 until 2999-01-01 00:00+01:00 (llm_prices)" in listed
    rows = json.loads(llm_prices("list", "--all", "--json"))
    assert [row["amount"] for row in rows] == ["1.00000000", "2.00000000", "8.00000000"]
    new = Price.objects.get(until=None, token_class="input")
    assert "withdrawn" in llm_prices("withdraw", str(new.pk))
    assert "until" not in llm_prices("list", "--at", "2998-01-01")


def test_prices_are_imported_from_a_file_all_or_none(tmp_path: Path) -> None:
    file = tmp_path / "prices.csv"
    head = "provider,model,token_class,amount,tier,above,since\n"
    file.write_text(
        head + "openai,m,input,1,,,\nopenai,m,output,2,,,\nopenai,m,input,0.5,flex,,\n"
        "openai,m,input,3,,200000,2026-01-01\n"
    )
    with pytest.raises(CommandError, match="line 5: since"):  # m has a price by then
        llm_prices("import", str(file))
    assert not Price.objects.exists()
    file.write_text(file.read_text().replace(",2026-01-01", ",2999-01-01"))
    assert llm_prices("import", str(file)).count("csv prices.csv") == 4
    assert llm_prices("import", str(file)) == "None.\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("provider,model,amount\n", "no column 'token_class'"),
        ("provider,model,token_class,amount,price\n", "no column 'price'"),
        ("provider,model,token_class,amount\na,m,inputs,1\n", "line 2: amounts: there is no class"),
        ("provider,model,token_class,amount,above\na,m,input,1,far\n", "line 2: invalid literal"),
        (
            "provider,model,token_class,amount,since\na,m,input,1,noon\n",
            "line 2: noon: give a moment",
        ),
        ("\udcff", "prices.csv"),
    ],
)
def test_file_of_prices_that_is_wrong_says_where(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "prices.csv"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CommandError, match=problem):
        llm_prices("import", str(file))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["set", "openai", "m", "input"], "input: give a class and its price"),
        (["set", "openai", "m", "input=free"], "amounts: 'free' is no price"),
        (["set", "openai", "m", "input=1", "--since", "soon"], "soon: give a moment"),
        (["withdraw", "7"], "There is no price 7"),
        (["import", "/no/such/file.csv"], "No such file"),
    ],
)
def test_what_is_wrong_with_a_price_names_it(arguments: list[str], problem: str) -> None:
    with pytest.raises(CommandError, match=problem):
        llm_prices(*arguments)


def test_prices_of_what_is_in_use_are_imported_and_price_it(settings: Any) -> None:
    pytest.importorskip("genai_prices")
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PROVIDERS": {"openai": {"API_KEY": "sk-x"}}}
    assert "output: $15/M" in llm_prices("import", "genai-prices", "openai/gpt-5.4")
    assert llm_prices("import", "genai-prices", "openai/gpt-5.4") == "None.\n"
    with pytest.raises(CommandError, match="no price for openai/unheard-of"):
        llm_prices("import", "genai-prices", "openai/unheard-of")
    assert llm_prices("import", "genai-prices") == "None.\n"


def test_unpriced_are_listed_and_priced() -> None:
    usage = {"prompt_tokens": 1_000_000, "completion_tokens": 0}
    answered = {"state": "completed", "provider": "openai", "model": "m", "answered_by": "m-1"}
    answered |= {"finished_at": timezone.now(), "usage": usage, "input_tokens": 1_000_000}
    LLMRequest.objects.create(**answered, output_tokens=0)
    LLMRequest.objects.create(**answered | {"usage": {}, "service_tier": "flex"})
    assert llm_prices("unpriced").splitlines() == [
        "       1  openai/m, answered by m-1",
        "       1  openai/m, answered by m-1, flex (1 without a count of tokens)",
    ]
    assert llm_prices("reprice") == "2 stay unpriced.\n"
    llm_prices("set", "openai", "m*", "input=2", "output=8", "--since", "2026-01-01")
    planned = llm_prices("reprice", "--dry-run")
    assert planned == "       1  openai/m would cost $2.00000000 (own)\n1 stay unpriced.\n"
    assert LLMRequest.objects.cost() is None
    [told] = json.loads(llm_prices("reprice", "--json"))
    assert (told["requests"], told["cost"]) == (1, "2.00000000")
    assert LLMRequest.objects.cost() == 2
    assert llm_prices("reprice") == "1 stay unpriced.\n"
