from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from testproject import provider as provider_module
from testproject.provider import MODEL, Bucket, Provider, count_tokens, go_duration

FIXTURE = Path(provider_module.__file__).parent / "articles" / "fixtures" / "articles.json"
ARTICLES = [row["fields"] for row in json.loads(FIXTURE.read_text(encoding="utf-8"))]
LAMP = next(article["body"] for article in ARTICLES if article["title"] == "The Lamp")
KEY = "sk-not-a-secret"


class Clock:
    """Time that passes when somebody sleeps, or when told."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def offline(clock: Clock, **options: Any) -> Provider:
    return Provider(clock=clock, sleep=clock.sleep, **options)


def chat_body(**fields: Any) -> bytes:
    messages = [{"role": "user", "content": f"Summarise in two sentences:\n\n{LAMP}"}]
    return json.dumps({"model": MODEL, "messages": messages} | fields).encode()


def post(
    provider: Provider, headers: dict[str, str] | None = None, **fields: Any
) -> tuple[int, dict[str, str], Any]:
    status, answered, body = provider.respond(
        "POST",
        "/v1/chat/completions",
        {"Authorization": f"Bearer {KEY}"} | (headers or {}),
        chat_body(**fields),
    )
    return status, answered, json.loads(body)


def says(provider: Provider, text: str, **fields: Any) -> str:
    """What the provider answers to one user message."""
    status, _, body = post(provider, messages=[{"role": "user", "content": text}], **fields)
    assert status == 200, body
    return str(body["choices"][0]["message"]["content"])


def events(body: bytes) -> list[Any]:
    lines = body.decode().split("\n\n")
    assert lines.pop() == ""
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def streamed(provider: Provider, **fields: Any) -> list[Any]:
    headers = {"authorization": f"Bearer {KEY}"}
    status, answered, body = provider.respond(
        "POST", "/v1/chat/completions", headers, chat_body(stream=True, **fields)
    )
    assert (status, answered["content-type"]) == (200, "text/event-stream; charset=utf-8")
    return events(body)


def test_an_answer_has_the_shape_of_a_chat_completion(clock: Clock) -> None:
    status, headers, body = post(offline(clock))
    assert (status, headers["content-type"]) == (200, "application/json")
    content = body["choices"][0]["message"]["content"]
    usage = body["usage"]
    assert body == {
        "id": body["id"],
        "object": "chat.completion",
        "created": body["created"],
        "model": "extractive-offline-1",
        "system_fingerprint": "fp_extractive_1",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": content, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": usage["prompt_tokens"],
            "completion_tokens": count_tokens(content),
            "total_tokens": usage["prompt_tokens"] + usage["completion_tokens"],
        },
    }


@pytest.mark.parametrize("article", ARTICLES, ids=lambda article: article["title"])
def test_a_summary_is_two_sentences_of_the_article_in_their_order(
    clock: Clock, article: dict[str, str]
) -> None:
    body = article["body"]
    summary = says(offline(clock), f"Summarise in two sentences.\n\n{article['title']}\n\n{body}")
    chosen = [s for s in provider_module.sentences(body) if s in summary]
    assert " ".join(chosen) == summary
    assert len(chosen) == 2


def test_every_article_is_a_short_text_with_a_source() -> None:
    assert len(ARTICLES) >= 30
    assert len({article["title"] for article in ARTICLES}) == len(ARTICLES)
    for article in ARTICLES:
        assert 120 <= len(article["body"].split()) <= 400, article["title"]
        assert re.fullmatch(r"[A-Z][\w. ]+, .+ \(1[789]\d\d\)", article["source"])
        assert article["summary"] == ""


@pytest.mark.parametrize(
    ("instruction", "count"),
    [
        ("Summarise.", 2),
        ("Summarise in one sentence.", 1),
        ("A one-sentence summary, please.", 1),
        ("Give me three short sentences.", 3),
        ("At most 4 sentences.", 4),
        ("Say it in 99 sentences.", 10),
    ],
)
def test_the_instruction_says_how_many_sentences(
    clock: Clock, instruction: str, count: int
) -> None:
    summary = says(offline(clock), f"{instruction}\n\n{LAMP}")
    assert len(provider_module.sentences(summary)) == count


def test_the_instruction_may_stand_in_the_system_message(clock: Clock) -> None:
    messages = [
        {"role": "system", "content": "You answer in one sentence."},
        {"role": "user", "content": LAMP},
    ]
    _, _, body = post(offline(clock), messages=messages)
    assert len(provider_module.sentences(body["choices"][0]["message"]["content"])) == 1


def test_the_instruction_itself_is_not_part_of_the_answer(clock: Clock) -> None:
    text = "Please summarise in one sentence: Whales swim. Whales sing and whales swim in the sea."
    assert says(offline(clock), text) == "Whales sing and whales swim in the sea."


def test_a_question_about_what_was_said_before_is_answered_from_it(clock: Clock) -> None:
    messages = [
        {"role": "user", "content": f"Summarise in two sentences:\n\n{LAMP}"},
        {"role": "assistant", "content": "…"},
        {"role": "user", "content": "And now in one sentence?"},
    ]
    _, _, body = post(offline(clock), messages=messages)
    answer = body["choices"][0]["message"]["content"]
    assert answer in LAMP
    assert len(provider_module.sentences(answer)) == 1


def test_a_text_without_sentences_comes_back_as_it_is(clock: Clock) -> None:
    assert says(offline(clock), "  milk, eggs, flour \n") == "milk, eggs, flour"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            'Mr. Bennet was odd. "Was he?" Mrs. B. Long said so.',
            ["Mr. Bennet was odd.", '"Was he?"', "Mrs. B. Long said so."],
        ),
        ("A sea, i.e.  deep water. And\nland.", ["A sea, i.e.  deep water.", "And\nland."]),
        ("A heading\n\nA text.\n\nA list: one, two", ["A text."]),
        ("海は深い。鯨がいる。", ["海は深い。", "鯨がいる。"]),
    ],
)
def test_a_sentence_ends_where_a_reader_would_end_it(text: str, found: list[str]) -> None:
    assert provider_module.sentences(text) == found


def test_content_may_come_in_parts(clock: Clock) -> None:
    parts = [{"type": "text", "text": "In one sentence."}, {"type": "text", "text": "Ahab smoked."}]
    _, _, body = post(offline(clock), messages=[{"role": "user", "content": parts}])
    assert body["choices"][0]["message"]["content"] == "Ahab smoked."


def test_every_message_counts_as_prompt(clock: Clock) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who's there?"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": "The sea."},
    ]
    _, _, body = post(offline(clock), messages=messages)
    # Be brief . | Who ' s there ? | The sea .
    assert body["usage"] == {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_stops_at_its_token_limit(clock: Clock, name: str) -> None:
    _, _, body = post(offline(clock), **{name: 4})
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["choices"][0]["message"]["content"] == "Had you descended from"
    assert body["usage"]["completion_tokens"] == 4


def test_an_answer_stops_before_a_stop_sequence(clock: Clock) -> None:
    provider = offline(clock)
    assert (
        says(provider, "The sea is deep and wide.", stop=["nowhere", " and"]) == "The sea is deep"
    )


def test_n_answers_are_counted_n_times(clock: Clock) -> None:
    _, _, one = post(offline(clock))
    _, _, three = post(offline(clock), n=3)
    assert [choice["index"] for choice in three["choices"]] == [0, 1, 2]
    assert three["usage"]["completion_tokens"] == 3 * one["usage"]["completion_tokens"]
    assert three["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]


def test_a_stream_adds_up_to_the_plain_answer(clock: Clock) -> None:
    provider = offline(clock)
    _, _, plain = post(provider)
    chunks = streamed(provider)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    text = "".join(delta.get("content", "") for delta in deltas)
    assert text == plain["choices"][0]["message"]["content"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_stream_tells_its_usage_only_when_asked(clock: Clock) -> None:
    provider = offline(clock)
    _, _, plain = post(provider)
    *chunks, last = streamed(provider, stream_options={"include_usage": True})
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    assert (last["choices"], last["usage"]) == ([], plain["usage"])
    assert all("usage" not in chunk for chunk in streamed(provider))


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"model": None}, "model", "missing_required_parameter"),
        ({"model": 7}, "model", "invalid_type"),
        ({"messages": None}, "messages", "missing_required_parameter"),
        ({"messages": "hello"}, "messages", "invalid_type"),
        ({"messages": []}, "messages", "empty_array"),
        ({"messages": ["hello"]}, "messages[0]", "invalid_type"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [{"role": "robot"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": ["user"]}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
            "invalid_type",
        ),
        ({"n": 0}, "n", "integer_below_min_value"),
        ({"n": 129}, "n", "integer_above_max_value"),
        ({"n": True}, "n", "invalid_type"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "integer_below_min_value"),
        (
            {"max_tokens": 1, "max_completion_tokens": 1},
            "max_tokens",
            "invalid_parameter_combination",
        ),
        ({"stop": 5}, "stop", "invalid_type"),
        ({"stream": "yes"}, "stream", "invalid_type"),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"stream": True, "stream_options": []}, "stream_options", "invalid_type"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    ],
)
def test_a_bad_body_is_refused_by_the_name_of_what_is_bad(
    clock: Clock, fields: dict[str, Any], param: str, code: str | None
) -> None:
    status, _, body = post(offline(clock), **fields)
    error = body["error"]
    assert status == 400
    assert error == {
        "message": error["message"],
        "type": "invalid_request_error",
        "param": param,
        "code": code,
    }
    assert param in error["message"] or code == "invalid_value"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_refused(clock: Clock, body: bytes) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    status, _, answer = offline(clock).respond("POST", "/v1/chat/completions", headers, body)
    assert status == 400
    assert "JSON body" in json.loads(answer)["error"]["message"]


def test_another_model_is_not_found(clock: Clock) -> None:
    status, _, body = post(offline(clock), model="gpt-5.4-mini")
    assert status == 404
    assert body["error"] == {
        "message": "The model `gpt-5.4-mini` does not exist or you do not have access to it.",
        "type": "invalid_request_error",
        "param": None,
        "code": "model_not_found",
    }


def test_the_models_are_the_one_there_is(clock: Clock) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    status, _, body = offline(clock).respond("GET", "/v1/models", headers)
    listed = json.loads(body)
    assert (status, listed["object"]) == (200, "list")
    assert [model["id"] for model in listed["data"]] == [MODEL]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/models/extractive-offline-1", 200),
        ("GET", "/v1/models/gpt-5.4-mini", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("POST", "/v1/responses", 404),
        ("POST", "/chat/completions", 404),
    ],
)
def test_other_addresses_say_what_is_wrong(
    clock: Clock, method: str, path: str, status: int
) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    answered, _, body = offline(clock).respond(method, path, headers)
    assert answered == status
    assert ("error" in json.loads(body)) == (status != 200)


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer  ", "Basic abc"])
def test_a_call_without_a_key_is_refused(clock: Clock, header: str) -> None:
    status, _, body = post(offline(clock), {"Authorization": header})
    assert (status, body["error"]["type"]) == (401, "invalid_request_error")
    assert "didn't provide an API key" in body["error"]["message"]


def test_a_key_that_is_not_listed_is_refused_and_never_repeated(clock: Clock) -> None:
    provider = offline(clock, api_keys={"sk-good"})
    status, _, body = post(provider, {"Authorization": "Bearer sk-bad"})
    assert (status, body["error"]["code"]) == (401, "invalid_api_key")
    assert "sk-bad" not in json.dumps(body)
    assert post(provider, {"Authorization": "Bearer sk-good"})[0] == 200


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0001, "1ms"),
        (0.1 + 0.02, "120ms"),
        (1, "1s"),
        (1.5, "1.5s"),
        (59.999, "59.999s"),
        (360, "6m0s"),
        (3661.25, "1h1m1.25s"),
    ],
)
def test_durations_are_written_as_go_writes_them(seconds: float, text: str) -> None:
    assert go_duration(seconds) == text


def test_a_bucket_never_holds_more_than_its_capacity() -> None:
    bucket = Bucket(60, capacity=8, now=0)
    bucket.level = 2
    bucket.refill(3)
    assert (bucket.level, bucket.seconds_until(8)) == (5, 3)
    bucket.refill(1000)
    assert (bucket.level, bucket.seconds_until(8)) == (8, 0)


def test_an_answer_tells_what_is_left_and_when_it_will_be_full(clock: Clock) -> None:
    _, headers, body = post(offline(clock, rpm=60, tpm=60_000))
    used = body["usage"]["total_tokens"]
    limits = {name: value for name, value in headers.items() if name.startswith("x-ratelimit")}
    assert limits == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "60000",
        "x-ratelimit-remaining-tokens": str(60_000 - used),
        "x-ratelimit-reset-tokens": f"{used}ms",
    }


def test_a_429_names_when_one_request_fits(clock: Clock) -> None:
    provider = offline(clock, rpm=60)
    assert {post(provider)[0] for _ in range(60)} == {200}
    status, headers, body = post(provider)
    assert status == 429
    assert body["error"] == {
        "message": "Rate limit reached for extractive-offline-1 on requests per min (RPM): "
        "Limit 60, Used 60, Requested 1. Please try again in 1s.",
        "type": "requests",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    assert headers["retry-after"] == "1"
    assert headers["retry-after-ms"] == "1000"
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert headers["x-ratelimit-reset-requests"] == "1m0s"


def test_who_waits_as_long_as_told_is_let_in_and_no_sooner(clock: Clock) -> None:
    provider = offline(clock, rpm=70, burst=1)
    post(provider)
    clock.now += 0.3
    _, headers, _ = post(provider)
    wait = int(headers["retry-after-ms"]) / 1000
    assert (wait, headers["retry-after"]) == (0.558, "1")
    clock.now += wait - 0.002
    assert post(provider)[0] == 429
    clock.now += 0.002
    assert post(provider)[0] == 200


def test_a_small_burst_makes_thirty_requests_meet_limits(clock: Clock) -> None:
    provider = offline(clock, rpm=60, burst=8)
    assert Counter(post(provider)[0] for _ in range(30)) == {200: 8, 429: 22}


def test_tokens_are_limited_by_the_longest_answer_allowed(clock: Clock) -> None:
    provider = offline(clock, tpm=1000)
    status, headers, _ = post(provider, max_tokens=600)
    remaining = int(headers["x-ratelimit-remaining-tokens"])
    prompt = 1000 - 600 - remaining
    assert status == 200
    status, headers, body = post(provider, max_tokens=600)
    assert status == 429
    wait = (prompt + 600 - remaining) * 0.06
    assert body["error"] == {
        "message": "Rate limit reached for extractive-offline-1 on tokens per min (TPM): "
        f"Limit 1000, Used {1000 - remaining}, Requested {prompt + 600}. "
        f"Please try again in {go_duration(wait)}.",
        "type": "tokens",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    clock.now += int(headers["retry-after-ms"]) / 1000
    assert post(provider, max_tokens=600)[0] == 200


def test_a_request_larger_than_the_limit_is_not_told_to_try_again(clock: Clock) -> None:
    status, headers, body = post(offline(clock, tpm=1000), max_tokens=5000)
    assert status == 429
    assert re.fullmatch(
        r"Request too large for extractive-offline-1 on tokens per min \(TPM\): "
        r"Limit 1000, Requested 5\d\d\d\. .+",
        body["error"]["message"],
    )
    assert body["error"]["code"] == "rate_limit_exceeded"
    assert "retry-after" not in headers


def test_a_refused_request_uses_up_neither_limit(clock: Clock) -> None:
    provider = offline(clock, rpm=60, tpm=1000)
    post(provider, max_tokens=600)
    _, refused, _ = post(provider, max_tokens=600)
    _, again, _ = post(provider, max_tokens=600)
    assert refused == again
    assert refused["x-ratelimit-remaining-requests"] == "59"


def test_each_key_has_its_own_limits(clock: Clock) -> None:
    provider = offline(clock, rpm=1)
    statuses = [post(provider, {"Authorization": f"Bearer {key}"})[0] for key in "aab"]
    assert statuses == [200, 429, 200]


def test_limits_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="burst"):
        Provider(burst=0)


def test_an_answer_takes_its_latency_and_its_tokens(clock: Clock) -> None:
    _, _, body = post(offline(clock, latency=0.3, per_token=0.01), max_tokens=20)
    assert body["usage"]["completion_tokens"] == 20
    assert clock.slept == [pytest.approx(0.5)]


def test_a_stream_thinks_before_each_token(clock: Clock) -> None:
    streamed(offline(clock, latency=0.3, per_token=0.01), max_tokens=3)
    assert clock.slept == [0.3, 0.01, 0.01, 0.01]


def test_a_refusal_takes_no_time(clock: Clock) -> None:
    post(offline(clock, latency=0.3), model="gpt-5.4-mini")
    assert clock.slept == []


@pytest.mark.parametrize(
    ("fault", "status", "kind", "code"),
    [
        ("500", 500, "server_error", None),
        ("503", 503, "server_error", "server_is_overloaded"),
        ("429", 429, "requests", "rate_limit_exceeded"),
        ("418", 418, "invalid_request_error", None),
        ("never", 400, "invalid_request_error", None),
    ],
)
def test_a_request_can_ask_to_fail(
    clock: Clock, fault: str, status: int, kind: str, code: str | None
) -> None:
    provider = offline(clock, rpm=60)
    answered, headers, body = post(provider, {"X-Fail": fault})
    assert (answered, body["error"]["type"], body["error"]["code"]) == (status, kind, code)
    assert ("retry-after" in headers) == (status == 429)
    assert post(provider)[1]["x-ratelimit-remaining-requests"] == "59"


def test_fail_next_fails_as_often_as_told(clock: Clock) -> None:
    provider = offline(clock)
    provider.fail_next(2, status=503)
    provider.fail_next()
    assert [post(provider)[0] for _ in range(4)] == [503, 503, 500, 200]


def test_a_fault_of_the_wire_is_an_error_of_the_wire(clock: Clock) -> None:
    provider = offline(clock)
    with pytest.raises(TimeoutError):
        post(provider, {"X-Fail": "hang"})
    with pytest.raises(ConnectionResetError):
        post(provider, {"X-Fail": "cut"})
    assert [call.status for call in provider.journal] == [None, 200]


def test_the_journal_has_every_call_and_no_key(clock: Clock) -> None:
    provider = offline(clock, rpm=1)
    headers = {"Upstash-Message-Id": "msg_1", "Upstash-Retried": "0"}
    post(provider, headers)
    clock.now += 1
    post(provider, headers | {"Upstash-Retried": "1"})
    post(provider, {"Authorization": ""}, model=None)
    key = provider.journal[0].key
    assert provider.journal == [
        provider_module.Call(1000.0, key, MODEL, 200, "msg_1", 0),
        provider_module.Call(1001.0, key, MODEL, 429, "msg_1", 1),
        provider_module.Call(1001.0, "", None, 401, None, None),
    ]
    assert re.fullmatch("[0-9a-f]{12}", key)
    assert KEY not in repr(provider.journal) + repr(vars(provider))


def test_it_can_stand_behind_a_mock_transport(clock: Clock) -> None:
    provider = offline(clock)

    def answer(request: httpx.Request) -> httpx.Response:
        status, headers, body = provider.respond(
            request.method, request.url.path, request.headers, request.content
        )
        return httpx.Response(status, headers=headers, content=body)

    with httpx.Client(transport=httpx.MockTransport(answer)) as client:
        response = client.post(
            "https://provider.example/v1/chat/completions",
            headers={"Authorization": f"Bearer {KEY}"},
            content=chat_body(),
        )
    assert response.json()["model"] == MODEL


@pytest.fixture
def client() -> httpx.Client:
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.Client(headers=headers, timeout=5, trust_env=False)


def test_one_connection_carries_many_calls(client: httpx.Client) -> None:
    with Provider() as provider, client:
        url = f"{provider.base_url}/chat/completions"
        ports = set()
        for status in (200, 500, 200):
            faults = {"X-Fail": "500"} if status == 500 else {}
            response = client.post(url, content=chat_body(), headers=faults)
            assert response.status_code == status
            stream = response.extensions["network_stream"]
            ports.add(stream.get_extra_info("client_addr"))
        assert client.get(f"{provider.base_url}/models").status_code == 200
    assert len(ports) == 1


def test_a_stream_arrives_event_by_event(client: httpx.Client) -> None:
    thinking = threading.Event()

    def think(seconds: float) -> None:
        # Only a reader that has the first event lets the model think on.
        assert thinking.wait(5)

    with Provider(per_token=1, sleep=think) as provider, client:
        url = f"{provider.base_url}/chat/completions"
        with client.stream("POST", url, content=chat_body(stream=True)) as response:
            lines = response.iter_lines()
            assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["delta"] == {
                "role": "assistant",
                "content": "",
            }
            thinking.set()
            assert list(lines)[-2:] == ["data: [DONE]", ""]


@pytest.mark.parametrize("stream", [False, True])
def test_a_cut_answer_ends_in_the_middle(client: httpx.Client, stream: bool) -> None:
    with Provider() as provider, client:
        url = f"{provider.base_url}/chat/completions"
        provider.fail_next(status="cut")
        with pytest.raises(httpx.RemoteProtocolError):
            client.post(url, content=chat_body(stream=stream))
        assert client.post(url, content=chat_body()).status_code == 200


def test_a_hanging_call_ends_when_the_provider_stops(client: httpx.Client) -> None:
    with client:
        provider = Provider().start()
        url = f"{provider.base_url}/chat/completions"
        ended: list[Exception] = []

        def ask() -> None:
            try:
                client.post(url, content=chat_body(), headers={"X-Fail": "hang"})
            except httpx.TransportError as error:
                ended.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        while not provider.journal:
            assert asking.is_alive()
        provider.stop()
        provider.stop()
        asking.join(5)
    assert isinstance(ended[0], httpx.RemoteProtocolError | httpx.ReadError)


def test_a_stopped_provider_answers_on_no_kept_connection(client: httpx.Client) -> None:
    with client:
        with Provider() as provider:
            url = f"{provider.base_url}/models"
            assert client.get(url).status_code == 200
        with pytest.raises(httpx.TransportError):
            client.get(url)
    with pytest.raises(RuntimeError, match="started"):
        _ = provider.base_url


def test_a_body_without_a_length_is_refused(client: httpx.Client) -> None:
    with Provider() as provider, client:
        url = f"{provider.base_url}/chat/completions"
        response = client.post(url, content=iter([chat_body()]))
        assert (response.status_code, response.headers["connection"]) == (411, "close")


def test_many_callers_at_once_share_one_limit() -> None:
    clock = Clock()
    with Provider(rpm=60, burst=8, clock=clock) as provider:
        statuses: list[int] = []

        def ask() -> None:
            headers = {"Authorization": f"Bearer {KEY}"}
            url = f"{provider.base_url}/chat/completions"
            response = httpx.post(url, content=chat_body(), headers=headers, trust_env=False)
            statuses.append(response.status_code)

        callers = [threading.Thread(target=ask) for _ in range(20)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert Counter(statuses) == {200: 8, 429: 12}
    assert len(provider.journal) == 20


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_in_the_foreground_it_says_where_it_is_and_stops_quietly(name: str) -> None:
    command = [sys.executable, provider_module.__file__, "--port", "0", "--rpm", "60"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        assert process.stdout
        base_url = process.stdout.readline().strip()
        response = httpx.get(f"{base_url}/models", trust_env=False)
        process.send_signal(signal.Signals[name])
        output, errors = process.communicate(timeout=10)
    assert response.status_code == 401
    assert (process.returncode, output, errors) == (0, "", "")
