"""Anthropic's Messages API in the words of OpenAI's chat completions, both directions.

Asked with OpenAI's messages, tools and parameters, it is asked in its own; what it answers, whole or
streamed, comes back as a ``chat.completion``. What is Anthropic's own already passes as it is, and so
does every parameter that has no other name there: nothing is dropped silently, and what Anthropic does
not take it refuses itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from .cleaning import clean_json

Json = dict[str, Any]

FINISH_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "tool_use": "tool_calls",
}
_SYSTEM = {"system", "developer"}

# --- what is asked ---------------------------------------------------------------------------


def request_body(
    model: str, messages: Sequence[Json], parameters: Mapping[str, Any], *, max_tokens: int
) -> Json:
    """The body of a request. ``max_tokens`` is a must there, and is this where none is asked for."""
    fields: Json = {"model": model, "max_tokens": max_tokens}
    system = [m["content"] for m in messages if m["role"] in _SYSTEM]
    if system:
        all_text = all(isinstance(content, str) for content in system)
        fields["system"] = "\n\n".join(system) if all_text else _text_blocks(system)
    fields["messages"] = _messages([m for m in messages if m["role"] not in _SYSTEM])
    return fields | _parameters(parameters)


def _text_blocks(contents: Sequence[Any]) -> list[Any]:
    blocks: list[Any] = []
    for content in contents:
        blocks += [{"type": "text", "text": content}] if isinstance(content, str) else content
    return blocks


def _messages(messages: Sequence[Json]) -> list[Json]:
    translated: list[Json] = []
    for message in messages:
        if message["role"] != "tool":
            translated.append(_message(message))
            continue
        # The answers to one message's calls have to stand together, in one message of the user's.
        if not translated or not _holds_tool_results(translated[-1]):
            translated.append({"role": "user", "content": []})
        translated[-1]["content"].append(_tool_result(message))
    return translated


def _holds_tool_results(message: Json) -> bool:
    content = message["content"]
    return (
        message["role"] == "user"
        and isinstance(content, list)
        and all(isinstance(block, dict) and block.get("type") == "tool_result" for block in content)
    )


def _tool_result(message: Json) -> Json:
    content = message.get("content")
    return {
        "type": "tool_result",
        "tool_use_id": message.get("tool_call_id", ""),
        "content": [_block(part) for part in content] if isinstance(content, list) else content,
    }


def _message(message: Json) -> Json:
    content, calls = message.get("content"), message.get("tool_calls")
    if not isinstance(calls, list):
        if content is None:
            content = message.get("refusal") or ""
        if isinstance(content, list):
            content = [_block(part) for part in content]
        return {"role": message["role"], "content": content}
    blocks = [_block(part) for part in _text_blocks([content])] if content else []
    return {"role": message["role"], "content": blocks + [_tool_use(call) for call in calls]}


def _tool_use(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments or "{}")
    name = function.get("name")
    return {"type": "tool_use", "id": call.get("id"), "name": name, "input": arguments}


_DATA_URL = re.compile(r"data:(?P<type>[^;,]+);base64,(?P<data>.*)", re.DOTALL)


def _block(part: Any) -> Any:
    if not isinstance(part, dict) or part.get("type") not in {"image_url", "refusal"}:
        return part
    if part["type"] == "refusal":
        return {"type": "text", "text": part.get("refusal", "")}
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, dict) else image
    match = _DATA_URL.fullmatch(url) if isinstance(url, str) else None
    if match is None:
        return {"type": "image", "source": {"type": "url", "url": url}}
    source = {"type": "base64", "media_type": match["type"], "data": match["data"]}
    return {"type": "image", "source": source}


def _parameters(parameters: Mapping[str, Any]) -> Json:
    # OpenAI's clients send null for what is left out.
    fields = {name: value for name, value in parameters.items() if value is not None}
    fields.pop("stream_options", None)  # usage comes unasked
    if "max_completion_tokens" in fields:
        fields["max_tokens"] = fields.pop("max_completion_tokens")
    if "stop" in fields:
        stop = fields.pop("stop")
        fields["stop_sequences"] = [stop] if isinstance(stop, str) else stop
    if isinstance(fields.get("tools"), list):
        fields["tools"] = [_tool(tool) for tool in fields["tools"]]
    if "tool_choice" in fields:
        fields["tool_choice"] = _tool_choice(fields["tool_choice"])
    if "parallel_tool_calls" in fields:
        one_at_a_time = fields.pop("parallel_tool_calls") is False
        if one_at_a_time and fields.get("tools"):
            choice = fields.get("tool_choice") or {"type": "auto"}
            fields["tool_choice"] = {**choice, "disable_parallel_tool_use": True}
    if isinstance(fields.get("user"), str):
        fields["metadata"] = {"user_id": fields.pop("user")}
    shape = fields.get("response_format")
    if isinstance(shape, dict) and shape.get("type") == "json_schema":
        del fields["response_format"]
        schema = _dict(shape, "json_schema").get("schema")
        fields["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
    return fields


def _tool(tool: Any) -> Any:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict):
        return tool
    described = {"description": function["description"]} if function.get("description") else {}
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    return {"name": function.get("name"), **described, "input_schema": schema}


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, str):
        return {"type": {"required": "any"}.get(choice, choice)}
    function = choice.get("function") if isinstance(choice, dict) else None
    return {"type": "tool", "name": function.get("name")} if isinstance(function, dict) else choice


# --- what is answered ------------------------------------------------------------------------


def is_message(answer: Mapping[str, Any]) -> bool:
    return answer.get("type") == "message" and isinstance(answer.get("content"), list)


def completion(answer: Mapping[str, Any], *, created: int = 0) -> Json:
    """A message of Anthropic's as a ``chat.completion``. ``created``: unix seconds, which it does
    not tell."""
    blocks = [block for block in answer["content"] if isinstance(block, dict)]
    texts = [block.get("text") for block in blocks if block.get("type") == "text"]
    calls = [_tool_call(block) for block in blocks if block.get("type") == "tool_use"]
    text = "".join(text for text in texts if isinstance(text, str))
    message: Json = {"role": "assistant", "content": text if text or not calls else None}
    if calls:
        message["tool_calls"] = calls
    reason = finish_reason(answer.get("stop_reason"))
    return {
        "id": answer.get("id"),
        "object": "chat.completion",
        "created": created,
        "model": answer.get("model"),
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": reason}],
        "usage": usage(answer.get("usage")),
    }


def finish_reason(stop_reason: Any) -> Any:
    return FINISH_REASONS.get(stop_reason, stop_reason) if isinstance(stop_reason, str) else None


def _tool_call(block: Json) -> Json:
    function = {"name": block.get("name"), "arguments": json.dumps(clean_json(block.get("input")))}
    return {"id": block.get("id"), "type": "function", "function": function}


def usage(theirs: Any) -> Json | None:
    """Anthropic counts what the cache gave and took outside its input, OpenAI inside."""
    if not isinstance(theirs, dict):
        return None
    count = {name: each for name, each in theirs.items() if type(each) is int}
    cached = count.get("cache_read_input_tokens", 0)
    written = count.get("cache_creation_input_tokens", 0)
    prompt = count.get("input_tokens", 0) + cached + written
    output = count.get("output_tokens", 0)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached, "cache_write_tokens": written},
    }


class Chunks:
    """A stream of Anthropic's events as ``chat.completion.chunk``s."""

    def __init__(self, *, created: int) -> None:
        """``created``: unix seconds, which Anthropic does not tell."""
        self.usage: Json = {}
        """As Anthropic counted so far: of its cumulative counts the last."""
        self._head: Json = {"id": "", "object": "chat.completion.chunk", "created": created}
        self._calls: dict[Any, int] = {}
        """Index of a block -> of its tool call."""
        self._with_arguments: set[int] = set()

    def translate(self, event: Json) -> Iterator[Json]:
        kind = event.get("type")
        if kind == "message_start":
            yield from self._start(_dict(event, "message"))
        elif kind == "content_block_start":
            yield from self._block_start(event.get("index"), _dict(event, "content_block"))
        elif kind == "content_block_delta":
            yield from self._block_delta(event.get("index"), _dict(event, "delta"))
        elif kind == "content_block_stop":
            call = self._calls.get(event.get("index"))
            if call is not None and call not in self._with_arguments:
                yield self._arguments(call, "{}")
        elif kind == "message_delta":
            self._count(event)
            reason = finish_reason(_dict(event, "delta").get("stop_reason"))
            if reason:
                yield self._chunk({}, finish_reason=reason)
                yield self._head | {"choices": [], "usage": usage(self.usage)}

    def _start(self, message: Json) -> Iterator[Json]:
        self._head |= {"id": message.get("id"), "model": message.get("model")}
        self._count(message)
        yield self._chunk({"role": "assistant", "content": ""})

    def _count(self, told: Json) -> None:
        self.usage |= {name: n for name, n in _dict(told, "usage").items() if n is not None}

    def _block_start(self, index: Any, block: Json) -> Iterator[Json]:
        if block.get("type") == "text" and block.get("text"):
            yield self._chunk({"content": block["text"]})
        if block.get("type") != "tool_use":
            return
        number = self._calls[index] = len(self._calls)
        function = {"name": block.get("name"), "arguments": ""}
        call = {"index": number, "id": block.get("id"), "type": "function", "function": function}
        yield self._chunk({"tool_calls": [call]})
        if block.get("input"):
            yield self._arguments(number, json.dumps(block["input"]))

    def _block_delta(self, index: Any, delta: Json) -> Iterator[Json]:
        if delta.get("type") == "text_delta":
            yield self._chunk({"content": delta.get("text", "")})
        elif delta.get("partial_json") and index in self._calls:
            yield self._arguments(self._calls[index], delta["partial_json"])

    def _arguments(self, call: int, arguments: str) -> Json:
        self._with_arguments.add(call)
        return self._chunk({"tool_calls": [{"index": call, "function": {"arguments": arguments}}]})

    def _chunk(self, delta: Json, *, finish_reason: str | None = None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._head | {"choices": [choice]}


def _dict(event: Json, name: str) -> Json:
    value = event.get(name)
    return value if isinstance(value, dict) else {}
