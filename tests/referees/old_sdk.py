"""Calls what its argument names of qstash 2.0.5, the last one with ``upstash()`` and ``event``,
and prints what each call answered. Runs by itself, where that version is the one to import."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from qstash import QStash, Receiver
from qstash.chat import custom, openai, upstash
from qstash.errors import QStashError
from qstash.event import EventState

CALLBACK, BUSY, LATER = (os.environ["SITE"] + path for path in ("/callback", "/busy", "/later"))
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
HOSTED = "meta-llama/Meta-Llama-3-8B-Instruct"
client = QStash(os.environ["QSTASH_TOKEN"], retry=False)


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 15
    while not is_so():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.02)


def ended(message_id: str, state: EventState) -> None:
    def is_so() -> bool:
        events = client.event.list(filter={"message_id": message_id}).events
        return bool(events) and events[0].state is state

    until(is_so)


def refusal(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return {"answered": call(*args, **kwargs)}
    except QStashError as error:
        return str(error)


def chat() -> dict[str, Any]:
    """A chat with a hosted model, the three ways in."""
    hosted = {"name": "llm", "provider": upstash()}
    answers: dict[str, Any] = {}
    answers["publish_json"] = client.message.publish_json(api=hosted, body=CHAT, callback=CALLBACK)
    answers["get"] = client.message.get(answers["publish_json"].message_id)
    answers["enqueue_json"] = client.message.enqueue_json(
        queue="q", api=hosted, body=CHAT, callback=CALLBACK
    )
    answers["batch_json"] = client.message.batch_json(
        [{"api": hosted, "body": CHAT, "callback": CALLBACK}]
    )
    all_three = answers["publish_json"], answers["enqueue_json"], *answers["batch_json"]
    for answer in all_three:
        ended(answer.message_id, EventState.DELIVERED)
    answers["without_callback"] = refusal(client.message.publish_json, api=hosted, body=CHAT)
    return answers


def immediate() -> dict[str, Any]:
    """The same model at once, whole and streamed, both ways of asking."""
    ask: dict[str, Any] = {"messages": CHAT["messages"], "model": HOSTED}
    prompt: dict[str, Any] = {"user": "hi", "model": HOSTED}
    return {
        "create": client.chat.create(**ask),
        "prompt": client.chat.prompt(**prompt, provider=upstash()),
        "create streamed": list(client.chat.create(**ask, stream=True)),
        "prompt streamed": list(client.chat.prompt(**prompt, stream=True)),
    }


def providers() -> dict[str, Any]:
    answers = {}
    for name, provider in (("openai", openai("sk-1")), ("custom", custom("https://a.test", "c"))):
        api = {"name": "llm", "provider": provider}
        answer = client.message.publish_json(api=api, body=CHAT, callback=CALLBACK, delay="1h")
        answers[name] = client.message.get(answer.message_id)
    return answers


def messages() -> dict[str, Any]:
    answers: dict[str, Any] = {}
    everything = {
        "method": "PUT",
        "headers": {"X-Trace": "t"},
        "callback": CALLBACK,
        "failure_callback": CALLBACK,
        "retries": 2,
        "timeout": 30,
        "content_based_deduplication": True,
    }
    publish = {"url": LATER, "body": {"n": 1}, "delay": "1h", **everything}
    answers["publish_json"] = client.message.publish_json(**publish)
    answers["get"] = client.message.get(answers["publish_json"].message_id)
    answers["again"] = client.message.publish_json(**publish)
    answers["enqueue_json"] = client.message.enqueue_json(queue="q", url=LATER, body={"n": 2})
    answers["enqueued"] = client.message.get(answers["enqueue_json"].message_id)
    answers["batch_json"] = client.message.batch_json(
        [
            {"url": LATER, "body": {"n": 3}, "delay": 60},
            {"url": LATER, "body": {"n": 4}, "queue": "q"},
        ]
    )
    ids = [answer.message_id for answer in answers["batch_json"]]
    ended(answers["enqueue_json"].message_id, EventState.DELIVERED)
    ended(ids[1], EventState.DELIVERED)
    answers["cancel"] = client.message.cancel(answers["publish_json"].message_id)
    answers["cancel_many"] = client.message.cancel_many(ids)
    answers["cancel_all"] = client.message.cancel_all()
    return answers


def dead_letters() -> dict[str, Any]:
    answers: dict[str, Any] = {}
    ids = []
    for _ in range(3):
        answer = client.message.publish_json(url=BUSY, body={"n": 1}, retries=0)
        ended(answer.message_id, EventState.FAILED)
        ids.append(answer.message_id)
    listed = client.dlq.list(filter={"message_id": ids[0], "response_status": 503})
    answers["list"] = listed
    [letter] = listed.messages
    answers["get"] = client.dlq.get(letter.dlq_id)
    answers["delete"] = client.dlq.delete(letter.dlq_id)
    page = client.dlq.list(count=1)
    rest = client.dlq.list(cursor=page.cursor)
    answers["pages"] = [len(page.messages), len(rest.messages), rest.cursor]
    others = [letter.dlq_id for letter in page.messages + rest.messages]
    answers["delete_many"] = client.dlq.delete_many(others)
    answers["empty"] = client.dlq.list()
    answers["events"] = client.event.list(filter={"message_id": ids[0]})
    answers["states"] = len(client.event.list(filter={"state": EventState.FAILED}).events)
    return answers


def verify() -> dict[str, Any]:
    """Whether this version's receiver believes what arrived: told on stdin."""
    keys = os.environ["QSTASH_CURRENT_SIGNING_KEY"], os.environ["QSTASH_NEXT_SIGNING_KEY"]
    receiver = Receiver(*keys)
    came = json.load(sys.stdin)
    return {
        "verified": [receiver.verify(**each) for each in came],
        "refused": [refusal(receiver.verify, **each | {"body": "forged"}) for each in came],
    }


def told(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)  # type: ignore[arg-type]
    return value.value


if __name__ == "__main__":
    sections = (chat, immediate, providers, messages, dead_letters, verify)
    answers = {section.__name__: section for section in sections}[sys.argv[1]]()
    sys.stdout.write(json.dumps(answers, default=told))
