"""What this server serves, told to machines: the OpenAPI description at ``GET /openapi.json``.

Every call is one ``_call``: what it takes, what it answers, and the refusals that are its own.
Those that any call can end in are added there. What no schema can say stands in a sentence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .. import __version__
from ..qstash.options import LONGEST_PERIOD, METHODS
from . import conf, filters
from .views import dead_letters, logs

JSON = "application/json"
Described = dict[str, Any]

NAME: Described = {"type": "string", "pattern": r"^(?!\.{1,2}$)[A-Za-z0-9_.-]{1,256}$"}
TEXT: Described = {"type": "string"}
WHOLE: Described = {"type": "integer"}
TRUTH: Described = {"type": "boolean"}
COUNT: Described = {"type": "integer", "minimum": 0}
POSITIVE: Described = {"type": "integer", "minimum": 1, "maximum": 2**31 - 1}
MILLISECONDS: Described = {
    "type": "integer",
    "minimum": 0,
    "description": "Unix time in milliseconds.",
}
BASE64: Described = {"type": "string", "contentEncoding": "base64"}
HEADER: Described = {
    "type": "object",
    "additionalProperties": {"type": "array", "items": TEXT},
    "description": "Name to list of values.",
}
DURATION: Described = {"type": "string", "format": "go-duration", "examples": ["30s", "1d10h30m"]}
URL: Described = {
    "type": "string",
    "format": "public-url",
    "description": "An absolute http(s) URL.",
}
OR_NULL: Described = {"type": ["string", "null"], "format": "printable"}
# What values_of refuses: the empty, between commas too, and the NUL that no database holds.
_PART = r"[^\x00,]*[^\x00-\x20\x7f-\xa0\s,][^\x00,]*"
SOME_TEXT: Described = {"type": "string", "pattern": rf"^{_PART}(,{_PART})*$"}
WITH_COMMAS: Described = {"type": "string", "pattern": r"^[^\x00]+$"}

REFUSALS = {
    400: "Something that was sent cannot be used. The text names it.",
    401: "No token, or none that is known here.",
    403: "The token is read-only.",
    404: "There is nothing by that name.",
    411: "A body came in chunks where its length has to be told first.",
    412: "More than this server's limits allow.",
    413: "The body is too large.",
    503: "The database does not answer. Nothing was kept: try again.",
}
_OF_EVERY_CALL = {401, 503}
_OF_A_BODY = {400, 411, 413}


def description(server_url: str) -> Described:
    """``server_url`` is where this server is mounted."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "QStash-compatible server",
            "version": __version__,
            "summary": "Takes messages over HTTP and delivers them: retried, in order, in measure.",
            "license": {"name": "BSD-3-Clause", "identifier": "BSD-3-Clause"},
        },
        "servers": [{"url": server_url or "/"}],
        "security": [{"token": []}, {"tokenInQuery": []}],
        "paths": {**_calls(), "/openapi.json": {"get": _of_itself()}},
        "components": {
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer"},
                "tokenInQuery": {"type": "apiKey", "in": "query", "name": "qstash_token"},
            },
            "responses": {str(status): _refusal(status, text) for status, text in REFUSALS.items()},
            "schemas": _schemas(),
        },
    }


def _refusal(status: int, text: str) -> Described:
    told = {401: "WWW-Authenticate", 503: "Retry-After"}.get(status)
    headers = {told: {"required": True, "schema": TEXT}} if told else {}
    return {"description": text, "content": _json(_ref("Error")), "headers": headers}


# --- the words of a description ------------------------------------------------------------------


def _ref(schema: str) -> Described:
    return {"$ref": f"#/components/schemas/{schema}"}


def _json(schema: Described) -> Described:
    return {JSON: {"schema": schema}}


def _object(required: str, **properties: Described) -> Described:
    """``required``: names with spaces between."""
    return {"type": "object", "properties": properties, "required": required.split()}


def _list_of(items: Described, **more: Any) -> Described:
    return {"type": "array", "items": items, **more}


def _call(
    summary: str,
    *,
    name: str,
    tag: str,
    answers: Mapping[int, Described],
    parameters: Iterable[Described] = (),
    body: Described | None = None,
    refusals: Iterable[int] = (),
    reads_body: bool = False,
    links: Mapping[str, Described] | None = None,
) -> Described:
    """``answers``: status to schema. ``reads_body``: there may be one that is not described."""
    statuses = {*refusals} | (_OF_A_BODY if body or reads_body else set())
    responses: Described = {
        str(status): {"description": "Done.", "content": _json(schema), "links": dict(links or {})}
        for status, schema in answers.items()
    }
    return {
        "summary": summary,
        "operationId": name,
        "tags": [tag],
        "parameters": list(parameters),
        **({"requestBody": body} if body else {}),
        "responses": responses | _refused(statuses),
    }


def _refused(statuses: Iterable[int]) -> Described:
    return {
        str(status): {"$ref": f"#/components/responses/{status}"} for status in sorted(statuses)
    }


def _body(schema: Described) -> Described:
    return {"required": True, "content": _json(schema)}


def _in_path(name: str, schema: Described = NAME, **more: Any) -> Described:
    return {"name": name, "in": "path", "required": True, "schema": schema, **more}


def _in_query(name: str, schema: Described, text: str = "") -> Described:
    return {"name": name, "in": "query", "schema": schema, "description": text}


def _in_header(name: str, schema: Described, text: str = "") -> Described:
    return {"name": name, "in": "header", "schema": schema, "description": text}


def _link(call: str, **parameters: str) -> Described:
    return {"operationId": call, "parameters": parameters}


# --- what publishes take -------------------------------------------------------------------------

_DELIVERY: dict[str, tuple[Described, str]] = {
    "Method": ({"type": "string", "enum": list(METHODS)}, "How the destination is called."),
    "Retries": (COUNT | {"maximum": 2**31 - 1}, "Attempts after the first. 3 unless told."),
    "Retry-Delay": (
        {"type": "string", "format": "retry-delay"},
        "Milliseconds before a retry, as an expression of ``retried``: ``1000 * (1 + retried)``.",
    ),
    "Timeout": (DURATION, "For one attempt."),
    "Delay": (DURATION, "From now until the first attempt."),
    "Not-Before": (
        {"type": "integer", "minimum": 0, "maximum": 253_402_300_799},
        "Unix time in seconds. Wins over the delay.",
    ),
}
_WHEN = {"Delay", "Not-Before"}
_PUBLISH: dict[str, tuple[Described, str]] = {
    "Callback": (URL, "Told of every attempt."),
    "Failure-Callback": (URL, "Told, once, that no attempt will follow."),
    "Deduplication-Id": (NAME, "A second message of this id is not taken for ten minutes."),
    "Content-Based-Deduplication": (
        TRUTH,
        "Makes that id of the destination, the body and what is forwarded.",
    ),
    "Flow-Control-Key": (NAME, "Messages of one key share its limits. Goes with the value."),
    "Flow-Control-Value": (
        {"type": "string", "format": "flow-control-value"},
        "``parallelism=2, rate=10, period=60s``, in any order; one of the first two has to be there.",
    ),
    "Label": (
        {"type": "string", "pattern": r"^[!-+\--~]+(,[!-+\--~]+)*$"},
        "To find the message by. Several have commas between.",
    ),
    "Redact-Fields": (
        {"type": "string", "pattern": r"^(body|headers?(\[[A-Za-z-]+\])?)(,(body|headers?))*$"},
        "``body``, ``header`` or ``header[Name]``: not shown by the calls that read.",
    ),
    "Header-Forward": (TRUTH, "Hands on all headers of this call."),
}
_CRON = "Five fields, after `CRON_TZ=Europe/Berlin ` where it is not to be UTC."
_ANY_BODY: Described = {
    "description": "Delivered byte for byte, under its own Content-Type.",
    "content": {"*/*": {}},
}
_IN_WORDS = (
    "`Upstash-Forward-X` is delivered as the header `X`. What can be said of a delivery can be "
    "said of its callbacks: `Upstash-Callback-Retries`, `Upstash-Failure-Callback-Forward-X`. "
    "Every `Upstash-*` header may be a query parameter instead, in lower case; what is left of the "
    "query belongs to the destination."
)


def _publish_headers(*, without: Iterable[str] = ()) -> list[Described]:
    told = {**_DELIVERY, **_PUBLISH}
    described = [
        _in_header(f"Upstash-{name}", schema, text)
        for name, (schema, text) in told.items()
        if name not in without
    ]
    for callback in ("Callback", "Failure-Callback"):
        described += [
            _in_header(f"Upstash-{callback}-{name}", schema)
            for name, (schema, _) in _DELIVERY.items()
        ]
    return described


def _destination() -> Described:
    text = (
        "An http(s) URL, or the name of a URL group. It stands in the path as it is, slashes, "
        "colons and query and all: percent-encoded it is refused."
    )
    return _in_path("destination", {"type": "string", "format": "destination"}, description=text)


def _taken() -> Described:
    """What publish and enqueue have in common."""
    return {
        "tag": "publish",
        "answers": dict.fromkeys((200, 202), _ref("Answer")),
        "body": _ANY_BODY,
        "refusals": {404, 412},
        "links": _to_a_message("$response.body#/messageId"),
    }


def _to_a_message(message_id: str) -> Described:
    return {
        "read": _link("getMessage", messageId=message_id),
        "cancel": _link("cancelMessage", messageId=message_id),
    }


# --- what listings take --------------------------------------------------------------------------


def _values(schema: Described) -> Described:
    """Any of them: repeated, or, but for URLs and paths, with commas between."""
    return _list_of(schema, minItems=1, maxItems=filters.MOST_VALUES)


_MOMENT = MILLISECONDS | {"maximum": 32_503_680_000_000}
_STATES = [
    *("CREATED", "ACTIVE", "RETRY", "ERROR", "IN_PROGRESS", "DELIVERED", "FAILED"),
    *("CANCEL_REQUESTED", "CANCELED", "CANCELLED"),
]
_FILTERED_BY: dict[str, Described] = {
    "url": _values(WITH_COMMAS),
    "path": _values(WITH_COMMAS),
    "fromDate": _MOMENT,
    "toDate": _MOMENT,
    "state": _values({"type": "string", "enum": _STATES}),
    "responseStatus": _values({"type": "integer", "minimum": -1, "maximum": 999}),
}


def _filtered(table: Mapping[str, Any], *more: str) -> list[Described]:
    """The parameters of a call that ``filters.narrowed`` narrows."""
    of_text = _values(SOME_TEXT)
    return [_in_query(name, _FILTERED_BY.get(name, of_text)) for name in (*table, *more)]


def _counted(most: int, meaning: str = "At most so many.") -> Described:
    return _in_query("count", {"type": "integer", "minimum": 1, "maximum": most}, meaning)


def _paged(most: int) -> list[Described]:
    order = {"type": "string", "enum": ["earliestFirst", "latestFirst"]}
    cursor = {"type": "string", "pattern": "^([0-9]{1,14}(-[0-9]{1,18})?)?$"}
    return [
        _counted(most),
        _in_query("order", order),
        _in_query(
            "cursor",
            cursor,
            "Where the page before ended, or a unix time in milliseconds to begin at.",
        ),
    ]


# --- the calls -----------------------------------------------------------------------------------


def _calls() -> Described:
    paths = {
        **_publishing(),
        **_messages(),
        **_logs(),
        **_dead_letters(),
        **_queues(),
        **_flow_control(),
        **_gates(),
        **_url_groups(),
        **_schedules(),
        **_keys(),
    }
    for operations in paths.values():
        for method, operation in operations.items():
            statuses = _OF_EVERY_CALL if method == "get" else {*_OF_EVERY_CALL, 403}
            operation["responses"] |= _refused(statuses)
    return paths


def _publishing() -> Described:
    publish = _call(
        "Publish a message.",
        name="publish",
        parameters=[_destination(), *_publish_headers()],
        **_taken(),
    )
    enqueue = _call(
        "Put a message into a queue, which is made if it is not there.",
        name="enqueue",
        # Its turn decides when it is delivered.
        parameters=[_in_path("queueName"), _destination(), *_publish_headers(without=_WHEN)],
        **_taken(),
    )
    most = conf.current().max_batch_messages
    batch = _call(
        "Publish many. Each is answered by itself, in the same order.",
        name="batch",
        tag="publish",
        body=_body(_list_of(_ref("BatchItem"), minItems=1, maxItems=most)),
        answers={200: _list_of({"oneOf": [_ref("Answer"), _ref("Error")]}, minItems=1)},
        links=_to_a_message("$response.body#/0/messageId"),
    )
    for call in (publish, enqueue):
        call["description"] = _IN_WORDS
    return {
        "/v2/publish/{destination}": {"post": publish},
        "/v2/enqueue/{queueName}/{destination}": {"post": enqueue},
        "/v2/batch": {"post": batch},
    }


def _messages() -> Described:
    shared: Described = {
        "tag": "messages",
        "parameters": [_in_path("messageId")],
        "refusals": {404},
    }
    cancelled = _object("cancelled", cancelled=COUNT)
    return {
        "/v2/messages/{messageId}": {
            "get": _call(
                "Read a message: one that is pending, or ended not long ago.",
                name="getMessage",
                answers={200: _ref("Message")},
                **shared,
            ),
            "delete": _call(
                "Cancel a message.", name="cancelMessage", answers={202: cancelled}, **shared
            ),
        },
        "/v2/messages": {
            "delete": _call(
                "Cancel these messages, those that filters select, or, with neither, all.",
                name="cancelMessages",
                tag="messages",
                parameters=[
                    *_filtered(filters.MESSAGES, "messageIds"),
                    _counted(
                        500, "Read and not heeded: all that the filters select are cancelled."
                    ),
                ],
                reads_body=True,
                answers={200: cancelled},
            )
        },
    }


def _logs() -> Described:
    entries = _list_of(_ref("LogEntry"))

    def listing(name: str, *keys: str) -> Described:
        return _call(
            "List what became of messages, the newest first.",
            name=name,
            tag="logs",
            parameters=[*_filtered(filters.LOGS), *_paged(logs.MOST_PER_PAGE)],
            answers={200: _object(" ".join(keys), **dict.fromkeys(keys, entries), cursor=TEXT)},
            refusals={400},
        )

    return {
        "/v2/events": {"get": listing("listEvents", "events")},
        "/v2/logs": {"get": listing("listLogs", "logs", "events")},
    }


def _dead_letters() -> Described:
    one: Described = {"tag": "dlq", "parameters": [_in_path("dlqId")], "refusals": {404}}
    many: Described = {
        "tag": "dlq",
        "parameters": [
            *_filtered(filters.DEAD_LETTERS, "dlqIds"),
            *_paged(dead_letters.MOST_PER_PAGE),
        ],
        "reads_body": True,
    }
    again = _list_of({"oneOf": [_ref("Accepted"), _ref("Error")]})
    return {
        "/v2/dlq": {
            "get": _call(
                "List messages whose delivery was given up.",
                name="listDeadLetters",
                answers={
                    200: _object("messages", messages=_list_of(_ref("DeadLetter")), cursor=TEXT)
                },
                **many,
            ),
            "delete": _call(
                "Delete these dead letters, or those that filters select, a page of them at a time.",
                name="deleteDeadLetters",
                answers={200: _object("deleted", deleted=COUNT, cursor=TEXT)},
                **many,
            ),
        },
        "/v2/dlq/{dlqId}": {
            "get": _call(
                "Read a dead letter.",
                name="getDeadLetter",
                answers={200: _ref("DeadLetter")},
                **one,
            ),
            "delete": _call(
                "Delete a dead letter.",
                name="deleteDeadLetter",
                answers={200: _object("deleted", deleted=COUNT)},
                **one,
            ),
        },
        "/v2/dlq/retry": {
            "post": _call(
                "Publish these dead letters again, or those that filters select. Upstash-* headers "
                "override what each was published with, and query parameters of those names.",
                name="retryDeadLetters",
                answers={201: _object("responses cursor", responses=again, cursor=TEXT)},
                **many,
            )
        },
        "/v2/dlq/retry/{dlqId}": {
            "post": _call(
                "Publish a dead letter again. Upstash-* headers override what it was published with.",
                name="retryDeadLetter",
                answers={201: _ref("Accepted"), 202: _ref("Accepted")},
                links=_to_a_message("$response.body#/messageId"),
                **one | {"refusals": {400, 404, 412}},
            )
        },
    }


def _queues() -> Described:
    one: Described = {
        "tag": "queues",
        "parameters": [_in_path("queueName")],
        "answers": {200: _ref("Empty")},
    }
    asked = _object("queueName", queueName=NAME, parallelism=POSITIVE, paused=TRUTH)
    calls = ("getQueue", "deleteQueue", "pauseQueue", "resumeQueue")

    def change(verb: str) -> Described:
        name = f"{verb.lower()}Queue"
        return {"post": _call(f"{verb} a queue.", name=name, refusals={404}, **one)}

    return {
        "/v2/queues": {
            "get": _call(
                "List queues.",
                name="listQueues",
                tag="queues",
                answers={200: _list_of(_ref("Queue"))},
            ),
            "post": _call(
                "Create or change a queue. One that is paused goes on unless this says paused; "
                "its parallelism stays unless this gives one.",
                name="upsertQueue",
                tag="queues",
                body=_body(asked),
                answers={200: _ref("Empty")},
                links={call: _link(call, queueName="$request.body#/queueName") for call in calls},
            ),
        },
        "/v2/queues/{queueName}": {
            "get": _call(
                "Read a queue.",
                name="getQueue",
                refusals={404},
                **one | {"answers": {200: _ref("Queue")}},
            ),
            "delete": _call(
                "Delete a queue. One that is not there is fine.",
                name="deleteQueue",
                refusals={404},
                **one,
            ),
        },
        "/v2/queues/{queueName}/pause": change("Pause"),
        "/v2/queues/{queueName}/resume": change("Resume"),
    }


def _flow_control() -> Described:
    key, tag = _in_path("flowControlKey"), "flow control"
    state = _ref("FlowControlKey")

    def change(summary: str, name: str, *parameters: Described) -> Described:
        return {
            "post": _call(
                summary,
                name=name,
                tag=tag,
                parameters=[key, *parameters],
                answers={200: _ref("Empty")},
                refusals={400},
            )
        }

    return {
        "/v2/flowControl": {
            "get": _call(
                "List flow-control keys.",
                name="listFlowControlKeys",
                tag=tag,
                parameters=[_in_query("search", TEXT, "Those whose names hold it.")],
                answers={200: _list_of(state)},
            )
        },
        "/v2/flowControl/{flowControlKey}": {
            "get": _call(
                "Read a flow-control key.",
                name="getFlowControlKey",
                tag=tag,
                parameters=[key],
                answers={200: state},
                refusals={404},
            )
        },
        "/v2/flowControl/{flowControlKey}/pause": change("Pause a key.", "pauseFlowControlKey"),
        "/v2/flowControl/{flowControlKey}/resume": change("Resume a key.", "resumeFlowControlKey"),
        "/v2/flowControl/{flowControlKey}/pin": change(
            "Pin limits: messages no longer change them. Give parallelism, rate or both.",
            "pinFlowControlKey",
            _in_query("parallelism", POSITIVE),
            _in_query("rate", POSITIVE),
            _in_query("period", POSITIVE | {"maximum": LONGEST_PERIOD}, "Seconds."),
        ),
        "/v2/flowControl/{flowControlKey}/unpin": change(
            "Unpin limits: the next message that brings some sets them.",
            "unpinFlowControlKey",
            _in_query("parallelism", TRUTH),
            _in_query("rate", TRUTH),
        ),
        "/v2/flowControl/{flowControlKey}/resetRate": change(
            "Begin the period now, with nothing counted.", "resetFlowControlRate"
        ),
        "/v2/globalParallelism": {
            "get": _call(
                "Count deliveries in flight.",
                name="getGlobalParallelism",
                tag=tag,
                answers={
                    200: _object(
                        "parallelismMax parallelismCount",
                        parallelismMax=COUNT,
                        parallelismCount=COUNT,
                    )
                },
            )
        },
    }


def _gates() -> Described:
    counts = "waitListSize parallelismCount letIn refused"
    gate: Described = {
        "host": TEXT,
        "group": TEXT,
        "isPaused": TRUTH,
        "trouble": TEXT
        | {"description": "Why it is paused or was last refused; empty for neither."},
        "words": TEXT | {"description": "The provider's own."},
        "opensAt": COUNT | {"description": "Unix time in milliseconds of the next call, or look."},
        **dict.fromkeys(counts.split(), COUNT),
    }
    return {
        "/v2/gates": {
            "get": _call(
                "List what is known of providers' limits. QStash has no such call.",
                name="listGates",
                tag="gates",
                answers={200: _list_of(_object(" ".join(gate), **gate))},
            )
        },
        "/v2/gates/resume": {
            "post": _call(
                "Resume what a host refused for want of money. QStash has no such call.",
                name="resumeGates",
                tag="gates",
                parameters=[
                    _in_query("host", TEXT | {"minLength": 1}, "As it stands in the URLs.")
                    | {"required": True}
                ],
                answers={200: _object("resumed", resumed=COUNT)},
                refusals={400},
            )
        },
    }


def _url_groups() -> Described:
    tag, one = "url groups", _in_path("urlGroupName")
    empty, group = {200: _ref("Empty")}, _ref("UrlGroup")
    # One that is there may have a URL that is not taken any more.
    gone = {**_endpoint(OR_NULL), "anyOf": [{"required": ["url"]}, {"required": ["name"]}]}
    calls = ("getUrlGroup", "setUrlGroupHeaders", "removeEndpoints", "deleteUrlGroup")
    of_headers = {"type": "object", "additionalProperties": {"oneOf": [TEXT, _list_of(TEXT)]}}
    shared: Described = {"tag": tag, "parameters": [one]}
    return {
        "/v2/topics": {
            "get": _call(
                "List URL groups.", name="listUrlGroups", tag=tag, answers={200: _list_of(group)}
            )
        },
        "/v2/topics/{urlGroupName}": {
            "get": _call(
                "Read a URL group.",
                name="getUrlGroup",
                answers={200: group},
                refusals={404},
                **shared,
            ),
            "patch": _call(
                "Set the headers that a message to the group has unless it says otherwise.",
                name="setUrlGroupHeaders",
                body=_body(_object("headers", headers=of_headers)),
                answers=empty,
                refusals={404},
                **shared,
            ),
            "delete": _call(
                "Delete a URL group. One that is not there is fine.",
                name="deleteUrlGroup",
                answers=empty,
                refusals={404},
                **shared,
            ),
        },
        "/v2/topics/{urlGroupName}/endpoints": {
            "post": _call(
                "Add endpoints to a URL group, or change them. The first one makes the group.",
                name="putEndpoints",
                body=_body(_object("endpoints", endpoints=_list_of(_ref("Endpoint"), minItems=1))),
                answers=empty,
                refusals={412},
                links={
                    call: _link(call, urlGroupName="$request.path.urlGroupName") for call in calls
                },
                **shared,
            ),
            "delete": _call(
                "Remove endpoints, named by URL, by name or by both. The group goes with its last.",
                name="removeEndpoints",
                body=_body(_object("endpoints", endpoints=_list_of(gone, minItems=1))),
                answers=empty,
                refusals={404, 412},
                **shared,
            ),
        },
    }


def _schedules() -> Described:
    tag, calls = "schedules", ("getSchedule", "pauseSchedule", "resumeSchedule", "deleteSchedule")
    own = [
        _in_header("Upstash-Cron", {"type": "string", "format": "cron"}, _CRON)
        | {"required": True},
        _in_header("Upstash-Schedule-Id", NAME, "Overwrites the schedule by this id."),
        _in_header("Upstash-Queue-Name", NAME, "The messages are enqueued there."),
    ]
    # One template: what stands in the path is a destination where one is made, and else an id.
    destination = _destination() | {"name": "schedule"}
    create = _call(
        "Create a schedule, or overwrite the one by the same id. The path holds the destination.",
        name="createSchedule",
        tag=tag,
        parameters=[destination, *own, *_publish_headers(without={"Not-Before"})],
        body=_ANY_BODY,
        answers={200: _object("scheduleId", scheduleId=NAME)},
        refusals={404, 412},
        links={call: _link(call, schedule="$response.body#/scheduleId") for call in calls},
    )
    one: Described = {"tag": tag, "parameters": [_in_path("schedule")], "refusals": {404}}
    empty = {200: _ref("Empty")}

    def change(verb: str) -> Described:
        # The specification says POST, and the SDKs PATCH.
        return {
            method: _call(
                f"{verb} a schedule.", name=f"{verb.lower()}Schedule{suffix}", answers=empty, **one
            )
            for method, suffix in (("post", ""), ("patch", "ByPatch"), ("put", "ByPut"))
        }

    return {
        "/v2/schedules": {
            "get": _call(
                "List schedules.",
                name="listSchedules",
                tag=tag,
                answers={200: _list_of(_ref("Schedule"))},
            )
        },
        "/v2/schedules/{schedule}": {
            "post": create | {"description": _IN_WORDS},
            "get": _call(
                "Read a schedule.", name="getSchedule", answers={200: _ref("Schedule")}, **one
            ),
            "delete": _call("Delete a schedule.", name="deleteSchedule", answers=empty, **one),
        },
        "/v2/schedules/{schedule}/pause": change("Pause"),
        "/v2/schedules/{schedule}/resume": change("Resume"),
    }


def _keys() -> Described:
    keys = _object("current next", current=TEXT, next=TEXT)
    shared: Described = {"tag": "keys", "answers": {200: keys}}
    return {
        "/v2/keys": {"get": _call("Read the signing keys.", name="getKeys", **shared)},
        "/v2/keys/rotate": {
            "post": _call(
                "Retire the current signing key for the next, and make a new next one.",
                name="rotateKeys",
                **shared,
            )
        },
    }


def _of_itself() -> Described:
    return {
        "summary": "This description.",
        "operationId": "describe",
        "tags": ["description"],
        "security": [],
        "responses": {"200": {"description": "OpenAPI 3.1.", "content": _json({"type": "object"})}},
    }


# --- the shapes ----------------------------------------------------------------------------------


def _schemas() -> Described:
    message = _message()
    return {
        "Error": _object("error", error=TEXT),
        "Empty": {"type": "object"},
        "Accepted": _object("messageId", messageId=NAME, url=TEXT, deduplicated={"const": True}),
        "Answer": {
            "oneOf": [_ref("Accepted"), _list_of(_ref("Accepted"), minItems=1)],
            "description": "An array, with one for each endpoint, for a URL group.",
        },
        "BatchItem": _batch_item(),
        "Endpoint": {**_endpoint(URL), "required": ["url"]},
        "Message": message,
        "DeadLetter": _dead_letter(message),
        "LogEntry": _log_entry(),
        "Queue": _object(
            "name parallelism createdAt updatedAt lag paused",
            name=NAME,
            parallelism=POSITIVE,
            createdAt=MILLISECONDS,
            updatedAt=MILLISECONDS,
            lag=COUNT | {"description": "Messages that are not finished."},
            paused=TRUTH,
        ),
        "FlowControlKey": _flow_control_key(),
        "UrlGroup": _object(
            "name createdAt updatedAt endpoints",
            name=NAME,
            createdAt=MILLISECONDS,
            updatedAt=MILLISECONDS,
            endpoints=_list_of(_ref("Endpoint"), minItems=1),
        ),
        "Schedule": _schedule(),
    }


def _endpoint(url: Described) -> Described:
    return _object("", url=url, name=OR_NULL | {"maxLength": 256})


def _batch_item() -> Described:
    header = {"oneOf": [TEXT, _list_of(TEXT)]}
    return _object(
        "destination",
        destination={"type": "string", "format": "destination"},
        queue={
            "type": ["string", "null"],
            "pattern": r"^(?!\.{1,2}$)[A-Za-z0-9_.-]{0,256}$",
            "description": "Enqueues the message there.",
        },
        headers={
            "type": ["object", "null"],
            "additionalProperties": header,
            "description": "What publish takes as headers.",
        },
        body={"description": "Text is delivered as it is, other JSON as JSON."},
    )


def _flow_control_of_a_message() -> Described:
    return {"flowControlKey": NAME, "rate": POSITIVE, "period": POSITIVE, "parallelism": POSITIVE}


def _message() -> Described:
    return _object(
        "messageId url method maxRetries notBefore createdAt",
        messageId=NAME,
        url=TEXT,
        method={"type": "string", "enum": list(METHODS)},
        maxRetries=COUNT,
        notBefore=MILLISECONDS,
        createdAt=MILLISECONDS,
        header=HEADER,
        body=TEXT,
        bodyBase64=BASE64 | {"description": "In place of the body when it is not text."},
        topicName=NAME,
        endpointName=TEXT,
        queueName=NAME,
        scheduleId=NAME,
        callback=TEXT,
        failureCallback=TEXT,
        callbackHeader=HEADER,
        failureCallbackHeader=HEADER,
        callerIP=TEXT,
        label=TEXT | {"description": "The first label."},
        labels=_list_of(TEXT),
        **_flow_control_of_a_message(),
        retryDelayExpression=TEXT,
        timeout={"type": "number", "description": "Seconds."},
    )


def _dead_letter(message: Described) -> Described:
    own: Described = {
        "dlqId": NAME,
        "responseStatus": WHOLE | {"description": "-1 when nothing was answered."},
        "responseHeader": HEADER,
        "responseBody": TEXT,
        "responseBodyBase64": BASE64,
    }
    return {
        **message,
        "properties": message["properties"] | own,
        "required": [*message["required"], "dlqId", "responseStatus"],
    }


def _log_entry() -> Described:
    given = [state for state in _STATES if state not in {"IN_PROGRESS", "CANCELLED"}]
    return _object(
        "time messageId state url",
        time=MILLISECONDS,
        messageId=NAME,
        state={"type": "string", "enum": given},
        url=TEXT,
        error=TEXT,
        nextDeliveryTime=MILLISECONDS,
        responseStatus=WHOLE,
        responseHeader=HEADER,
        responseHeaders=HEADER,
        responseBody=BASE64,
        header=HEADER,
        body=BASE64,
        topicName=NAME,
        endpointName=TEXT,
        queueName=NAME,
        scheduleId=NAME,
        method={"type": "string", "enum": list(METHODS)},
        callback=TEXT,
        callbackHeaders=HEADER,
        failureCallback=TEXT,
        failureCallbackHeaders=HEADER,
        maxRetries=COUNT,
        retryDelayExpr=TEXT,
        retryDelayExpression=TEXT,
        timeout=COUNT | {"description": "Milliseconds."},
        label=TEXT,
        labels=_list_of(TEXT),
        **_flow_control_of_a_message(),
    )


def _flow_control_key() -> Described:
    numbers = "waitListSize parallelismMax parallelismCount rateMax rateCount ratePeriod"
    truths = "isPaused isPinnedParallelism isPinnedRate"
    properties: Described = {
        "flowControlKey": NAME,
        **dict.fromkeys(numbers.split(), COUNT),
        "ratePeriodStart": COUNT | {"description": "Unix time in seconds."},
        **dict.fromkeys(truths.split(), TRUTH),
    }
    return _object(" ".join(properties), **properties)


def _schedule() -> Described:
    states = {"type": "string", "enum": ["IN_PROGRESS", "SUCCESS", "FAIL"]}
    return _object(
        "scheduleId cron destination createdAt method retries isPaused",
        scheduleId=NAME,
        cron=TEXT,
        destination=TEXT,
        createdAt=MILLISECONDS,
        method={"type": "string", "enum": list(METHODS)},
        retries=COUNT,
        isPaused=TRUTH,
        header=HEADER,
        body=TEXT,
        bodyBase64=BASE64,
        retryDelayExpression=TEXT,
        delay=COUNT | {"description": "Seconds."},
        timeout={"type": "number", "description": "Seconds."},
        callback=TEXT,
        failureCallback=TEXT,
        callbackHeader=HEADER,
        failureCallbackHeader=HEADER,
        queueName=NAME,
        callerIP=TEXT,
        label=TEXT,
        labels=_list_of(TEXT),
        **_flow_control_of_a_message(),
        lastScheduleTime=MILLISECONDS,
        nextScheduleTime=MILLISECONDS,
        lastScheduleStates={"type": "object", "additionalProperties": states},
        error=TEXT | {"description": "Why nothing was published the last time."},
    )
