"""What providers say of their limits, in the headers and bodies that they send."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from django_qstash_llm.limits import (
    LARGEST_ERROR,
    LONGEST_WAIT,
    SHORTEST_WAIT,
    Limit,
    Reading,
    Trouble,
    parse_wait,
    read,
)

NOW = datetime(2026, 11, 23, tzinfo=UTC).timestamp()
MINUTE, HOUR, DAY = 60.0, 3600.0, 86_400.0

RATE, OVERLOAD, DAILY, MONEY = Trouble.RATE, Trouble.OVERLOAD, Trouble.DAILY, Trouble.MONEY
TOO_LARGE, CONTENT, AUTH, GONE = Trouble.TOO_LARGE, Trouble.CONTENT, Trouble.AUTH, Trouble.GONE
INVALID, FAULT = Trouble.INVALID, Trouble.FAULT

fuzz = settings(max_examples=200, deadline=None, database=None)


def bucket(
    dimension: str,
    limit: float | None = None,
    remaining: float | None = None,
    reset: float | None = None,
    period: float | None = None,
) -> Limit:
    """A limit; the seconds of dates and sums are good to a microsecond, as floats are."""
    about: Any = None if reset is None else pytest.approx(reset, abs=1e-6)
    return Limit(dimension=dimension, limit=limit, remaining=remaining, reset=about, period=period)


def trouble(
    trouble: Trouble, code: str = "", wait: float | None = None, source: str = "", *limits: Limit
) -> Reading:
    about: Any = None if wait is None else pytest.approx(wait, abs=1e-6)
    return Reading(trouble=trouble, code=code, wait=about, wait_source=source, limits=limits)


def read_json(status: int, headers: Mapping[str, str], body: Any) -> Reading:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read(status, headers, raw, now=NOW)


def error(message: str, **more: Any) -> dict[str, Any]:
    """OpenAI's envelope, which most have copied."""
    return {"error": {"message": message, "param": None} | more}


def google(message: str, *violations: str, retry: str = "", code: int = 429) -> dict[str, Any]:
    status = {400: "INVALID_ARGUMENT", 429: "RESOURCE_EXHAUSTED", 503: "UNAVAILABLE"}[code]
    details: list[Any] = [
        {
            "@type": "type.googleapis.com/google.rpc.QuotaFailure",
            "violations": [
                {"quotaMetric": "generate_content_free_tier_requests", "quotaId": each}
                for each in violations
            ],
        },
        {"@type": "type.googleapis.com/google.rpc.Help", "links": [{"description": "Learn more"}]},
    ]
    if retry:
        details.append({"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": retry})
    return {"error": {"code": code, "message": message, "status": status, "details": details}}


def mistral(message: str, **more: Any) -> dict[str, Any]:
    return {"object": "error", "message": message, "param": None} | more


def anthropic(type: str, message: str, **more: Any) -> dict[str, Any]:
    return {
        "type": "error",
        "error": {"type": type, "message": message} | more,
        "request_id": "req_1",
    }


def openrouter(message: str, code: int = 429, **metadata: Any) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "metadata": metadata}, "user_id": "u"}


# --- answers that failed ---

QUOTA = "You exceeded your current quota, please check your plan and billing details. "
GEMINI_QUOTA = QUOTA + (
    "For more information on this error, head to: https://ai.google.dev/gemini-api/docs/rate-limits.\n"
    "* Quota exceeded for metric: generativelanguage.googleapis.com/generate_content_free_tier_requests, "
)
PER_MINUTE = "GenerateRequestsPerMinutePerProjectPerModel-FreeTier"
PER_DAY = "GenerateRequestsPerDayPerProjectPerModel-FreeTier"
RPM = (
    "Rate limit reached for gpt-5.4-mini in organization org-1 on requests per min (RPM): "
    "Limit 3, Used 3, Requested 1. Please try again in 20s."
)
GROQ_TPM = (
    "Rate limit reached for model `llama-4` in organization `org_1` service tier `on_demand` on "
    "tokens per minute (TPM): Limit 6000, Used 5900, Requested 866. Please try again in 7.66s."
)
GROQ_TPD = (
    "Rate limit reached for model `llama-4` on tokens per day (TPD): Limit 100000, Used 99336, "
    "Requested 1333. Please try again in 9m38.016s. Need more tokens? Upgrade to Dev Tier."
)
AZURE_TPM = (
    "Requests to the ChatCompletions_Create Operation under Azure OpenAI API version 2024-10-21 have "
    "exceeded token rate limit of your current OpenAI S0 pricing tier. Please retry after 37 seconds. "
    "Please go here: https://aka.ms/oai/quotaincrease if you would like to increase the rate limit."
)
ANTHROPIC_ITPM = (
    "This request would exceed your organization's rate limit of 50,000 input tokens per minute. "
    "Please reduce the prompt length or the maximum tokens requested, or try again later."
)
OPENAI_SPENT = {
    "x-ratelimit-limit-requests": "60",
    "x-ratelimit-limit-tokens": "150000",
    "x-ratelimit-remaining-requests": "0",
    "x-ratelimit-remaining-tokens": "0",
    "x-ratelimit-reset-requests": "1s",
    "x-ratelimit-reset-tokens": "6m0s",
}
SPENT = (bucket("requests", 60, 0, 1), bucket("tokens", 150_000, 0, 360))

FAILURES = [
    # OpenAI
    pytest.param(
        429,
        OPENAI_SPENT | {"retry-after": "20", "retry-after-ms": "19764"},
        error(RPM, type="requests", code="rate_limit_exceeded"),
        trouble(RATE, "rate_limit_exceeded", 19.764, "retry-after-ms", *SPENT),
        id="openai-says-it-four-times",
    ),
    pytest.param(
        429,
        {},
        error(RPM, type="requests", code="rate_limit_exceeded"),
        trouble(RATE, "rate_limit_exceeded", 20, "try again in 20s"),
        id="openai-in-words-only",
    ),
    pytest.param(
        429,
        OPENAI_SPENT | {"x-ratelimit-remaining-tokens": "149000"},
        error("Rate limit reached", type="requests", code="rate_limit_exceeded"),
        trouble(
            *(RATE, "rate_limit_exceeded", 1, "x-ratelimit-reset-requests"),
            *(SPENT[0], bucket("tokens", 150_000, 149_000, 360)),
        ),
        id="openai-waits-for-the-exhausted-dimension-only",
    ),
    pytest.param(
        429,
        OPENAI_SPENT,
        b"",
        trouble(RATE, "", 360, "x-ratelimit-reset-tokens", *SPENT),
        id="openai-waits-for-the-last-of-two-exhausted",
    ),
    pytest.param(
        429,
        {"Retry-After": "0.584", "X-Should-Retry": "true"},
        error("Slow down", type="rate_limit_error", code="slow_down"),
        replace(
            trouble(OVERLOAD, "slow_down", 0.584, "retry-after"),
            should_retry=True,
            is_slow_down=True,
        ),
        id="openai-slow-down",
    ),
    pytest.param(
        503,
        {"retry-after": "30"},
        error("The server is overloaded", type="server_error", code="server_is_overloaded"),
        trouble(OVERLOAD, "server_is_overloaded", 30, "retry-after"),
        id="openai-overloaded",
    ),
    *(
        pytest.param(
            429,
            {"retry-after": "20", "x-should-retry": "false"},
            error("No.", type="insufficient_quota", code=code),
            replace(trouble(MONEY, code), should_retry=False),
            id=f"openai-{code}",
        )
        for code in (
            "insufficient_quota",
            "credit_balance_exhausted",
            "organization_spend_limit_exceeded",
            "project_spend_limit_exceeded",
            "organization_usage_limit_exceeded",
            "billing_hard_limit_reached",
        )
    ),
    pytest.param(
        429,
        {"retry-after": "1"},
        error(
            "Request too large for gpt-5.4-mini on tokens per min (TPM): Limit 30000, Requested 342389.",
            type="tokens",
            code="rate_limit_exceeded",
        ),
        trouble(TOO_LARGE, "rate_limit_exceeded"),
        id="openai-larger-than-a-minute",
    ),
    pytest.param(
        429,
        {},
        error("On tokens per min. Limit: 30,000, Requested: 31,000.", code="rate_limit_exceeded"),
        trouble(TOO_LARGE, "rate_limit_exceeded"),
        id="openai-larger-than-a-minute-with-commas",
    ),
    pytest.param(
        400,
        {},
        error(
            "This model's maximum context length is 128000 tokens. However, you requested 140000.",
            type="invalid_request_error",
            code="context_length_exceeded",
        ),
        trouble(TOO_LARGE, "context_length_exceeded"),
        id="openai-context",
    ),
    pytest.param(
        400,
        {},
        error(
            "Unsupported parameter: 'max_tokens' is not supported with this model.",
            type="invalid_request_error",
            code="unsupported_parameter",
        ),
        trouble(INVALID, "unsupported_parameter"),
        id="openai-unsupported-parameter",
    ),
    pytest.param(
        400,
        {},
        error("Your request was rejected.", code="content_policy_violation"),
        trouble(CONTENT, "content_policy_violation"),
        id="openai-content",
    ),
    pytest.param(
        400,
        {},
        error(
            "Invalid prompt: your prompt was flagged as potentially violating our usage policy.",
            code="invalid_prompt",
        ),
        trouble(CONTENT, "invalid_prompt"),
        id="openai-flagged",
    ),
    pytest.param(
        401,
        {},
        error("Incorrect API key provided: sk-…", code="invalid_api_key"),
        trouble(AUTH, "invalid_api_key"),
        id="openai-key",
    ),
    pytest.param(
        404,
        {},
        error("The model `gpt-4o` does not exist.", code="model_not_found"),
        trouble(GONE, "model_not_found"),
        id="openai-model",
    ),
    pytest.param(
        403,
        {},
        error("Project `p` does not have access to model `m`", code="model_not_found"),
        trouble(GONE, "model_not_found"),
        id="openai-model-not-for-this-project",
    ),
    pytest.param(
        500,
        {k: v for k, v in OPENAI_SPENT.items() if "requests" in k},
        error("The server had an error while processing your request.", type="server_error"),
        trouble(FAULT, "server_error", None, "", SPENT[0]),
        id="openai-reset-on-a-500-is-no-hint",
    ),
    pytest.param(
        500,
        {"retry-after": "3"},
        error("The server had an error", type="server_error"),
        trouble(FAULT, "server_error", 3, "retry-after"),
        id="openai-retry-after-on-a-500-is-one",
    ),
    # Azure OpenAI
    pytest.param(
        429,
        {},
        error(AZURE_TPM, code="429"),
        trouble(RATE, "429", 37, "retry after 37 seconds"),
        id="azure-in-words-only",
    ),
    pytest.param(
        429,
        {
            "x-ratelimit-limit-requests": "60",
            "x-ratelimit-remaining-requests": "0",
            "x-ratelimit-reset-requests": "10",
            "x-ratelimit-remaining-tokens": "900",
            "x-ratelimit-reset-tokens": "0",
        },
        b"",
        trouble(
            *(RATE, "", 10, "x-ratelimit-reset-requests"),
            *(bucket("requests", 60, 0, 10), bucket("tokens", None, 900, 0)),
        ),
        id="azure-whole-seconds",
    ),
    pytest.param(
        429,
        {
            "x-ratelimit-limit-tokens": "-1",
            "x-ratelimit-remaining-tokens": "-1",
            "x-ratelimit-reset-tokens": "0",
        },
        error("Too Many Requests", code="too_many_requests"),
        trouble(RATE, "too_many_requests"),
        id="azure-minus-one",
    ),
    pytest.param(
        400,
        {},
        error(
            "The response was filtered due to the prompt triggering Azure's content management policy.",
            code="content_filter",
            innererror={
                "code": "ResponsibleAIPolicyViolation",
                "content_filter_result": {"hate": {"filtered": True, "severity": "high"}},
            },
        ),
        trouble(CONTENT, "content_filter"),
        id="azure-content",
    ),
    pytest.param(
        403,
        {},
        {
            "statusCode": 403,
            "message": "Out of call volume quota. Quota will be replenished in 01:23:45.",
        },
        trouble(DAILY, "", 5025, "replenished in 01:23:45"),
        id="azure-api-management-quota",
    ),
    pytest.param(
        404,
        {},
        error("The API deployment for this resource does not exist.", code="DeploymentNotFound"),
        trouble(GONE, "DeploymentNotFound"),
        id="azure-deployment",
    ),
    # Anthropic
    pytest.param(
        429,
        {
            "anthropic-ratelimit-input-tokens-limit": "50000",
            "anthropic-ratelimit-input-tokens-remaining": "0",
            "anthropic-ratelimit-input-tokens-reset": "2026-11-23T00:00:42Z",
            "anthropic-ratelimit-requests-limit": "50",
            "anthropic-ratelimit-requests-remaining": "49",
            "anthropic-ratelimit-requests-reset": "2026-11-23T00:00:01Z",
            "retry-after": "9",
        },
        anthropic("rate_limit_error", ANTHROPIC_ITPM),
        trouble(
            *(RATE, "rate_limit_error", 9, "retry-after"),
            *(bucket("input_tokens", 50_000, 0, 42), bucket("requests", 50, 49, 1)),
        ),
        id="anthropic-rate",
    ),
    pytest.param(
        429,
        {
            "anthropic-ratelimit-tokens-limit": "80000",
            "anthropic-ratelimit-tokens-remaining": "0",
            "anthropic-ratelimit-tokens-reset": "2026-11-23T00:00:15Z",
            "anthropic-ratelimit-requests-remaining": "3",
            "anthropic-ratelimit-requests-reset": "2026-11-23T00:01:00Z",
        },
        anthropic("rate_limit_error", ANTHROPIC_ITPM),
        trouble(
            *(RATE, "rate_limit_error", 15, "anthropic-ratelimit-tokens-reset"),
            *(bucket("tokens", 80_000, 0, 15), bucket("requests", None, 3, 60)),
        ),
        id="anthropic-without-retry-after",
    ),
    pytest.param(
        429,
        {},
        anthropic(
            "rate_limit_error",
            "Your workspace has reached its limit.",
            details={"error_code": "enforced_spend_limit_reached"},
        ),
        trouble(MONEY, "enforced_spend_limit_reached"),
        id="anthropic-spend-limit",
    ),
    pytest.param(
        400,
        {},
        anthropic(
            "invalid_request_error",
            "You have reached your specified API usage limits. You will regain access on 2026-12-01.",
        ),
        trouble(MONEY, "invalid_request_error"),
        id="anthropic-own-spend-limit",
    ),
    pytest.param(
        400,
        {},
        anthropic("invalid_request_error", "Your credit balance is too low to access the API."),
        trouble(MONEY, "invalid_request_error"),
        id="anthropic-credit",
    ),
    pytest.param(
        402,
        {"retry-after": "5"},
        anthropic("billing_error", "Payment failed."),
        trouble(MONEY, "billing_error"),
        id="anthropic-billing",
    ),
    pytest.param(
        529,
        {"x-should-retry": "true"},
        anthropic("overloaded_error", "Overloaded"),
        replace(trouble(OVERLOAD, "overloaded_error"), should_retry=True),
        id="anthropic-overloaded",
    ),
    pytest.param(
        429,
        {},
        anthropic(
            "rate_limit_error", "Number of request tokens has exceeded your daily rate limit"
        ),
        trouble(DAILY, "rate_limit_error"),
        id="anthropic-day",
    ),
    pytest.param(
        413,
        {},
        anthropic("request_too_large", "Request exceeds the maximum size"),
        trouble(TOO_LARGE, "request_too_large"),
        id="anthropic-bytes",
    ),
    pytest.param(
        400,
        {},
        anthropic("invalid_request_error", "prompt is too long: 208310 tokens > 200000 maximum"),
        trouble(TOO_LARGE, "invalid_request_error"),
        id="anthropic-context",
    ),
    pytest.param(
        400,
        {},
        anthropic("invalid_request_error", "Output blocked by content filtering policy"),
        trouble(CONTENT, "invalid_request_error"),
        id="anthropic-content",
    ),
    pytest.param(
        429,
        {
            "anthropic-ratelimit-unified-5h-status": "rejected",
            "anthropic-ratelimit-unified-5h-reset": f"{NOW + 900:.0f}",
            "anthropic-ratelimit-unified-7d-status": "allowed",
            "anthropic-ratelimit-unified-7d-reset": f"{NOW + 90_000:.0f}",
            "anthropic-ratelimit-unified-7d-utilization": "0.2",
        },
        anthropic("rate_limit_error", "Error"),
        trouble(
            *(RATE, "rate_limit_error", 900, "anthropic-ratelimit-unified-5h-reset"),
            bucket("unified", None, 0, 900, 5 * HOUR),
            bucket("unified", None, None, 90_000, 7 * DAY),
        ),
        id="anthropic-subscription-epoch",
    ),
    # Gemini
    pytest.param(
        429,
        {},
        google(GEMINI_QUOTA + "limit: 15", PER_MINUTE, retry="45.837906927s"),
        trouble(RATE, "RESOURCE_EXHAUSTED", 45.837906927, "RetryInfo"),
        id="gemini-minute-is-not-money",
    ),
    pytest.param(
        429,
        {},
        google(GEMINI_QUOTA + "limit: 20\nPlease retry in 38.2s.", PER_DAY, retry="38s"),
        trouble(DAILY, "RESOURCE_EXHAUSTED"),
        id="gemini-day-with-a-misleading-delay",
    ),
    pytest.param(
        429,
        {},
        google(GEMINI_QUOTA + "limit: 250\nPlease retry in 10h17m5.7s.", PER_DAY),
        trouble(DAILY, "RESOURCE_EXHAUSTED", 37_025.7, "retry in 10h17m5.7s"),
        id="gemini-day-in-words",
    ),
    pytest.param(
        429,
        {},
        google(GEMINI_QUOTA + "limit: 20", PER_MINUTE, PER_DAY, retry="65205s"),
        trouble(DAILY, "RESOURCE_EXHAUSTED", 65_205, "RetryInfo"),
        id="gemini-minute-and-day",
    ),
    pytest.param(
        429,
        {},
        google(GEMINI_QUOTA + "limit: 0, model: gemini-3-pro", PER_MINUTE, retry="5s"),
        trouble(DAILY, "RESOURCE_EXHAUSTED"),
        id="gemini-no-quota-at-all",
    ),
    pytest.param(
        429,
        {},
        [google("Resource exhausted.", PER_MINUTE, retry="12s")],
        trouble(RATE, "RESOURCE_EXHAUSTED", 12, "RetryInfo"),
        id="gemini-in-a-list",
    ),
    pytest.param(
        429,
        {},
        error(json.dumps([google("Resource exhausted.", PER_DAY, retry="90s")]), code="429"),
        trouble(DAILY, "RESOURCE_EXHAUSTED", 90, "RetryInfo"),
        id="gemini-json-in-a-string",
    ),
    pytest.param(
        503,
        {},
        google("The model is overloaded. Please try again later.", code=503),
        trouble(OVERLOAD, "UNAVAILABLE"),
        id="gemini-overloaded",
    ),
    pytest.param(
        400,
        {},
        google(
            "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).",
            code=400,
        ),
        trouble(TOO_LARGE, "INVALID_ARGUMENT"),
        id="gemini-context",
    ),
    pytest.param(
        400,
        {},
        google("API key not valid. Please pass a valid API key.", code=400),
        trouble(AUTH, "INVALID_ARGUMENT"),
        id="gemini-key",
    ),
    # Groq
    pytest.param(
        429,
        {
            "x-ratelimit-limit-requests": "14400",
            "x-ratelimit-remaining-requests": "14370",
            "x-ratelimit-reset-requests": "2m59.56s",
            "x-ratelimit-limit-tokens": "6000",
            "x-ratelimit-remaining-tokens": "0",
            "x-ratelimit-reset-tokens": "7.66s",
        },
        error("Rate limit reached", type="tokens", code="rate_limit_exceeded"),
        trouble(
            *(RATE, "rate_limit_exceeded", 7.66, "x-ratelimit-reset-tokens"),
            *(bucket("requests", 14_400, 14_370, 179.56), bucket("tokens", 6000, 0, 7.66)),
        ),
        id="groq-day-and-minute",
    ),
    pytest.param(
        429,
        {"retry-after": "8"},
        error(GROQ_TPM, type="tokens", code="rate_limit_exceeded"),
        trouble(RATE, "rate_limit_exceeded", 8, "retry-after"),
        id="groq-header-before-words",
    ),
    pytest.param(
        429,
        {},
        error(GROQ_TPM, type="tokens", code="rate_limit_exceeded"),
        trouble(RATE, "rate_limit_exceeded", 7.66, "try again in 7.66s"),
        id="groq-minute-in-words",
    ),
    pytest.param(
        429,
        {},
        error(GROQ_TPD, type="tokens", code="rate_limit_exceeded"),
        trouble(DAILY, "rate_limit_exceeded", 578.016, "try again in 9m38.016s"),
        id="groq-day-in-words",
    ),
    pytest.param(
        413,
        {"retry-after": "8"},
        error("Request too large for model `llama-4`", type="tokens", code="rate_limit_exceeded"),
        trouble(TOO_LARGE, "rate_limit_exceeded"),
        id="groq-413",
    ),
    pytest.param(
        498,
        {},
        error("Flex tier capacity exceeded", code="capacity_exceeded"),
        trouble(OVERLOAD, "capacity_exceeded"),
        id="groq-flex",
    ),
    pytest.param(
        400,
        {},
        error("The model `x` has been decommissioned.", code="model_decommissioned"),
        trouble(GONE, "model_decommissioned"),
        id="groq-decommissioned",
    ),
    # Cerebras
    pytest.param(
        429,
        {
            "x-ratelimit-limit-requests-day": "14400",
            "x-ratelimit-remaining-requests-day": "14000",
            "x-ratelimit-reset-requests-day": "33011.382867",
            "x-ratelimit-limit-tokens-minute": "60000",
            "x-ratelimit-remaining-tokens-minute": "0",
            "x-ratelimit-reset-tokens-minute": "11.382867",
        },
        {
            "message": "Tokens per minute limit exceeded - too many tokens processed.",
            "type": "too_many_tokens_error",
            "param": "quota",
            "code": "token_quota_exceeded",
        },
        trouble(
            *(RATE, "token_quota_exceeded", 11.382867, "x-ratelimit-reset-tokens-minute"),
            bucket("requests", 14_400, 14_000, 33_011.382867, DAY),
            bucket("tokens", 60_000, 0, 11.382867, MINUTE),
        ),
        id="cerebras-minute",
    ),
    pytest.param(
        429,
        {
            "x-ratelimit-limit-requests-day": "14400",
            "x-ratelimit-remaining-requests-day": "0",
            "x-ratelimit-reset-requests-day": "33011.382867",
        },
        {
            "message": "Request quota exceeded",
            "type": "too_many_requests_error",
            "param": "quota",
            "code": "request_quota_exceeded",
        },
        trouble(
            *(DAILY, "request_quota_exceeded", 33_011.382867, "x-ratelimit-reset-requests-day"),
            bucket("requests", 14_400, 0, 33_011.382867, DAY),
        ),
        id="cerebras-day-by-its-header",
    ),
    pytest.param(
        402,
        {},
        {"message": "Payment required", "type": "payment_required_error", "code": "x"},
        trouble(MONEY, "x"),
        id="cerebras-money",
    ),
    # Together
    pytest.param(
        429,
        {
            "x-ratelimit-limit": "10",
            "x-ratelimit-remaining": "0",
            "x-ratelimit-reset": "1",
            "x-tokenlimit-limit": "3000",
            "x-tokenlimit-remaining": "2000",
        },
        error("You are over your dynamic rate.", error_type="dynamic_request_limited"),
        trouble(
            *(RATE, "dynamic_request_limited", 1, "x-ratelimit-reset"),
            *(bucket("requests", 10, 0, 1, 1.0), bucket("tokens", 3000, 2000, None, 1.0)),
        ),
        id="together-per-second",
    ),
    pytest.param(
        429,
        {"x-ratelimit-remaining": "0", "x-ratelimit-reset": "0.0001"},
        error("Over your dynamic rate.", error_type="dynamic_token_limited"),
        trouble(
            *(RATE, "dynamic_token_limited", SHORTEST_WAIT, "x-ratelimit-reset"),
            bucket("requests", None, 0, 0.0001),
        ),
        id="together-never-in-a-hot-loop",
    ),
    pytest.param(
        503,
        {"x-ratelimit-remaining": "0", "x-ratelimit-reset": "4"},
        error("Service unavailable", type="service_unavailable"),
        trouble(OVERLOAD, "service_unavailable", None, "", bucket("requests", None, 0, 4)),
        id="together-is-full",
    ),
    # Mistral
    pytest.param(
        429,
        {
            "ratelimitbysize-limit": "500000",
            "ratelimitbysize-remaining": "0",
            "ratelimitbysize-reset": "17",
            "ratelimitbysize-query-cost": "3240",
        },
        mistral("Requests rate limit exceeded", type="rate_limited", code="1300"),
        trouble(
            *(RATE, "rate_limited", 17, "ratelimitbysize-reset"),
            bucket("tokens", 500_000, 0, 17),
        ),
        id="mistral-by-size",
    ),
    pytest.param(
        429,
        {},
        mistral(
            "Service tier capacity exceeded.", type="service_tier_capacity_exceeded", code="3505"
        ),
        trouble(OVERLOAD, "service_tier_capacity_exceeded"),
        id="mistral-capacity",
    ),
    pytest.param(
        422,
        {},
        {
            "detail": [
                {
                    "type": "extra_forbidden",
                    "loc": ["body", "top_k"],
                    "msg": "Extra inputs are not permitted",
                    "input": "insufficient_quota",
                }
            ]
        },
        trouble(INVALID, "extra_forbidden"),
        id="mistral-validation-echoes-what-was-asked",
    ),
    pytest.param(
        400,
        {},
        mistral(
            "Prompt contains 40000 tokens, too large for model with 32768 maximum context length"
        ),
        trouble(TOO_LARGE),
        id="mistral-context",
    ),
    pytest.param(
        400,
        {},
        mistral("Invalid model: mistral-tiny", type="invalid_model", code="1500"),
        trouble(GONE, "invalid_model"),
        id="mistral-model",
    ),
    pytest.param(
        401,
        {},
        {"detail": "Unauthorized"},
        trouble(AUTH),
        id="mistral-key",
    ),
    # DeepSeek
    pytest.param(
        402,
        {},
        error("Insufficient Balance", type="unknown_error", code="invalid_request_error"),
        trouble(MONEY, "invalid_request_error"),
        id="deepseek-money",
    ),
    pytest.param(
        503,
        {},
        error("Service is too busy.", type="service_unavailable_error"),
        trouble(OVERLOAD, "service_unavailable_error"),
        id="deepseek-busy",
    ),
    pytest.param(
        400,
        {},
        error("Model Not Exist", type="invalid_request_error", code="invalid_request_error"),
        trouble(GONE, "invalid_request_error"),
        id="deepseek-model",
    ),
    pytest.param(
        400,
        {},
        error("Content Exists Risk", code="invalid_request_error"),
        trouble(CONTENT, "invalid_request_error"),
        id="deepseek-content",
    ),
    # OpenRouter
    pytest.param(
        429,
        {},
        openrouter(
            "Rate limit exceeded: free-models-per-min. ",
            headers={
                "X-RateLimit-Limit": "20",
                "X-RateLimit-Remaining": "0",
                "X-RateLimit-Reset": f"{(NOW + 41.5) * 1000:.0f}",
            },
            provider_name=None,
        ),
        trouble(RATE, "429", 41.5, "x-ratelimit-reset", bucket("requests", 20, 0, 41.5)),
        id="openrouter-headers-in-the-body",
    ),
    pytest.param(
        429,
        {},
        openrouter(
            "Rate limit exceeded: free-models-per-day. Add 10 credits to unlock 1000 free model requests",
            headers={
                "X-RateLimit-Limit": "50",
                "X-RateLimit-Remaining": "0",
                "X-RateLimit-Reset": f"{(NOW + DAY) * 1000:.0f}",
            },
        ),
        trouble(DAILY, "429", DAY, "x-ratelimit-reset", bucket("requests", 50, 0, DAY)),
        id="openrouter-free-models-per-day",
    ),
    pytest.param(
        429,
        {},
        openrouter("Provider returned error", limit_source="openrouter_free_tier_daily"),
        trouble(DAILY, "openrouter_free_tier_daily"),
        id="openrouter-daily-by-its-source",
    ),
    pytest.param(
        429,
        {"Retry-After": "7", "X-RateLimit-Reset": f"{(NOW + 60) * 1000:.0f}"},
        openrouter("Slow", headers={"Retry-After": "99"}),
        trouble(RATE, "429", 7, "retry-after", bucket("requests", None, None, 60)),
        id="openrouter-own-headers-count-before-those-behind-it",
    ),
    pytest.param(
        429,
        {"X-RateLimit-Reset": f"{(NOW + 60) * 1000:.0f}"},
        openrouter("Slow"),
        trouble(RATE, "429", 60, "x-ratelimit-reset", bucket("requests", None, None, 60)),
        id="openrouter-a-lone-reset-is-a-hint",
    ),
    pytest.param(
        200,
        {},
        openrouter("Provider returned error", 502, provider_name="X", raw="upstream died"),
        trouble(FAULT, "502"),
        id="openrouter-status-200-fault",
    ),
    pytest.param(
        200,
        {"x-ratelimit-remaining": "0", "x-ratelimit-reset": "9"},
        openrouter("Rate limited"),
        trouble(RATE, "429", 9, "x-ratelimit-reset", bucket("requests", None, 0, 9)),
        id="openrouter-status-200-rate",
    ),
    pytest.param(
        200,
        {},
        {
            "error": {"code": "server_error", "message": "Provider disconnected"},
            "choices": [{"delta": {"content": ""}, "finish_reason": "error"}],
        },
        trouble(FAULT, "server_error"),
        id="openrouter-error-after-the-start",
    ),
    pytest.param(
        200,
        {},
        [anthropic("overloaded_error", "Overloaded")],
        trouble(OVERLOAD, "overloaded_error"),
        id="an-error-in-a-list-with-status-200",
    ),
    pytest.param(
        402,
        {"retry-after": "60"},
        openrouter("This request requires more credits, or fewer max_tokens.", 402),
        trouble(MONEY, "402"),
        id="openrouter-money",
    ),
    pytest.param(
        403,
        {},
        openrouter("Key limit exceeded (daily limit).", 403),
        trouble(MONEY, "403"),
        id="openrouter-key-limit",
    ),
    pytest.param(
        403,
        {},
        openrouter("Your input was flagged", 403, reasons=["violence"], flagged_input="…"),
        trouble(CONTENT, "403"),
        id="openrouter-moderation",
    ),
    pytest.param(
        429,
        {},
        openrouter(
            "Provider returned error",
            raw=json.dumps(error("Please try again in 3s.", code="insufficient_quota")),
        ),
        trouble(MONEY, "insufficient_quota"),
        id="openrouter-the-error-behind-it",
    ),
    # xAI
    pytest.param(
        429,
        {},
        {
            "code": "Some resource has been exhausted",
            "error": "Too many tokens for team t. Tokens per Minute (actual/limit): 65605/16000",
        },
        trouble(RATE, "Some resource has been exhausted"),
        id="xai-text",
    ),
    *(
        pytest.param(
            status,
            {"retry-after": "1"},
            {
                "code": "The caller does not have permission",
                "error": "Your team has used all available credits or reached its monthly spending limit.",
            },
            trouble(MONEY, "The caller does not have permission"),
            id=f"xai-money-{status}",
        )
        for status in (403, 429)
    ),
    pytest.param(
        400,
        {},
        {
            "code": "Client specified an invalid argument",
            "error": "This model's maximum prompt length is 131072 but the request contains 200000.",
        },
        trouble(TOO_LARGE, "Client specified an invalid argument"),
        id="xai-context",
    ),
    # DigitalOcean, SambaNova
    pytest.param(
        429,
        {
            "x-ratelimit-limit-requests": "120",
            "x-ratelimit-remaining-requests": "0",
            "x-ratelimit-reset-requests": f"{NOW + 33:.0f}",
        },
        error("Too many requests"),
        trouble(
            *(RATE, "", 33, "x-ratelimit-reset-requests"),
            bucket("requests", 120, 0, 33),
        ),
        id="digitalocean-epoch-seconds",
    ),
    pytest.param(
        429,
        {
            "x-ratelimit-limit-requests-per-minute": "10",
            "x-ratelimit-remaining-requests-per-minute": "4",
            "x-ratelimit-remaining-requests-day": "0",
            "x-ratelimit-reset-requests-day": "4h17m",
        },
        error("Rate limit exceeded"),
        trouble(
            *(DAILY, "", 15_420, "x-ratelimit-reset-requests-day"),
            *(
                bucket("requests", 10, 4, None, MINUTE),
                bucket("requests", None, 0, 15_420, DAY),
            ),
        ),
        id="sambanova-day",
    ),
    # Proxies and test servers
    pytest.param(
        429,
        {},
        error("litellm.RateLimitError: slow", type="throttling_error", code="429"),
        trouble(RATE, "throttling_error"),
        id="litellm-status-as-text",
    ),
    pytest.param(
        429,
        {},
        error(
            "litellm.RateLimitError: OpenAIException - "
            + QUOTA
            + "For more information on this error, "
            "read the docs: https://platform.openai.com/docs/guides/error-codes.",
            type="throttling_error",
            code="429",
        ),
        trouble(MONEY, "throttling_error"),
        id="litellm-openai-money",
    ),
    pytest.param(
        400,
        {},
        error("litellm.BadRequestError: ContextWindowExceededError: too long", code="400"),
        trouble(TOO_LARGE, "400"),
        id="litellm-context",
    ),
    pytest.param(
        429,
        OPENAI_SPENT | {"Retry-After": "1"},
        error("Rate limited", type="rate_limit_error", code="rate_limit_exceeded"),
        trouble(RATE, "rate_limit_exceeded", 1, "retry-after", *SPENT),
        id="aimock-one-second-and-not-six-minutes",
    ),
    pytest.param(
        429,
        {
            "retry-after": "1",
            "retry-after-ms": "584",
            "x-ratelimit-limit-requests": "60",
            "x-ratelimit-remaining-requests": "0",
            "x-ratelimit-reset-requests": "59.6s",
        },
        error("Rate limit reached", type="requests", code="rate_limit_exceeded"),
        trouble(
            *(RATE, "rate_limit_exceeded", 0.584, "retry-after-ms"),
            bucket("requests", 60, 0, 59.6),
        ),
        id="llmock-one-fits-long-before-it-is-full",
    ),
    pytest.param(
        429,
        {"Retry-After": "Mon, 23 Nov 2026 00:02:05 GMT"},
        b"",
        trouble(RATE, "", 125, "retry-after"),
        id="retry-after-as-a-date",
    ),
    pytest.param(
        429,
        {"Retry-After": "0"},
        b"",
        trouble(RATE, "", SHORTEST_WAIT, "retry-after"),
        id="retry-after-zero",
    ),
    *(
        pytest.param(
            429,
            {"retry-after-ms": nonsense, "retry-after": nonsense},
            error("Please try again in 2 minutes."),
            trouble(RATE, "", 120, "try again in 2 minutes"),
            id=f"nonsense-is-passed-over-{nonsense}",
        )
        for nonsense in ("-1", "nan", "inf", "soon", "", "99999999999999999999")
    ),
    pytest.param(
        502,
        {},
        b"<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>",
        trouble(FAULT),
        id="html",
    ),
    pytest.param(524, {}, b"error code: 524", trouble(FAULT), id="cloudflare-timeout"),
    pytest.param(413, {}, b"<html>Request Entity Too Large", trouble(TOO_LARGE), id="nginx-413"),
    pytest.param(307, {"location": "/v2"}, b"", trouble(GONE), id="redirect"),
    pytest.param(-1, {}, b"", trouble(FAULT), id="no-answer"),
    pytest.param(408, {}, b"", trouble(FAULT), id="timeout"),
    pytest.param(409, {"x-should-retry": "maybe"}, b"", trouble(FAULT), id="conflict"),
    pytest.param(400, {}, b"null", trouble(INVALID), id="null"),
    pytest.param(400, {}, b'"no"', trouble(INVALID), id="a-string"),
    pytest.param(401, {}, b"\xff\xfe\x00", trouble(AUTH), id="not-even-text"),
]


@pytest.mark.parametrize(("status", "headers", "body", "expected"), FAILURES)
def test_failure_is_read(
    status: int, headers: dict[str, str], body: Any, expected: Reading
) -> None:
    assert replace(read_json(status, headers, body), words="") == expected


@pytest.mark.parametrize(("status", "headers", "body", "expected"), FAILURES)
def test_what_never_passes_has_no_wait(
    status: int, headers: dict[str, str], body: Any, expected: Reading
) -> None:
    reading = read_json(status, headers | {"retry-after": "5"}, body)
    assert reading.trouble is not None
    assert (reading.wait is not None) is reading.trouble.is_passing


# --- answers that succeeded ---

ANSWER = {"choices": [{"message": {"content": "Hi"}, "finish_reason": "stop"}], "error": None}


def both(limit: str, remaining: str, reset: str, of: str = "-requests") -> dict[str, str]:
    values = {"limit": limit, "remaining": remaining, "reset": reset}
    return {f"X-RateLimit-{what}{of}": value for what, value in values.items()}


@pytest.mark.parametrize(
    ("headers", "limits"),
    [
        pytest.param({}, (), id="says-nothing"),
        pytest.param(
            both("60", "59", "1s"),
            (bucket("requests", 60, 59, 1, MINUTE),),
            id="openai-minute",
        ),
        pytest.param(
            both("600", "599", "100ms") | both("30000", "29999", "2ms", "-tokens"),
            (
                bucket("requests", 600, 599, 0.1, MINUTE),
                bucket("tokens", 30_000, 29_999, 0.002, MINUTE),
            ),
            id="openai-refills-in-a-blink",
        ),
        pytest.param(
            both("14400", "14370", "2m59.56s") | both("6000", "5900", "1s", "-tokens"),
            (
                bucket("requests", 14_400, 14_370, 179.56, DAY),
                bucket("tokens", 6000, 5900, 1, MINUTE),
            ),
            id="groq-day-and-minute",
        ),
        pytest.param(
            both("100", "0", "58.9s"),
            (bucket("requests", 100, 0, 58.9, MINUTE),),
            id="all-used",
        ),
        pytest.param(both("10", "9", "0.1"), (bucket("requests", 10, 9, 0.1, 1.0),), id="a-second"),
        pytest.param(
            both("60", "60", "0s"), (bucket("requests", 60, 60, 0),), id="full-tells-no-period"
        ),
        pytest.param(
            both("60", "59", "60"),
            (bucket("requests", 60, 59, 60),),
            id="a-window-that-just-opened-is-not-an-hour",
        ),
        pytest.param(
            both("100", "80", "44"), (bucket("requests", 100, 80, 44),), id="a-window-drifts"
        ),
        pytest.param(
            both("60", "-1", "-1"), (bucket("requests", 60),), id="the-limit-alone-is-something"
        ),
        pytest.param(both("0", "0", "0"), (), id="zero-is-no-limit"),
        pytest.param(both("-1", "-1", "0"), (), id="azure-minus-one"),
        pytest.param(both("many", "few", "soon"), (), id="no-numbers"),
        pytest.param(
            {
                "RateLimit-Limit": "100, 100;w=60",
                "RateLimit-Remaining": "1",
                "RateLimit-Reset": "5",
            },
            (bucket("requests", 100, 1, 5),),
            id="the-ietf-draft",
        ),
        pytest.param(
            {
                "anthropic-ratelimit-output-tokens-limit": "8000",
                "anthropic-ratelimit-output-tokens-remaining": "7000",
                "anthropic-ratelimit-output-tokens-reset": "2026-11-23T01:00:07.5+01:00",
                "anthropic-priority-input-tokens-limit": "10000",
                "anthropic-priority-input-tokens-remaining": "9618",
            },
            (
                bucket("output_tokens", 8000, 7000, 7.5, MINUTE),
                bucket("input_tokens", 10_000, 9618),
            ),
            id="anthropic",
        ),
        pytest.param(
            both("14400", "14399", "33011.382867", "-requests-day")
            | both("900", "899", "611.4", "-requests-hour"),
            (
                bucket("requests", 14_400, 14_399, 33_011.382867, DAY),
                bucket("requests", 900, 899, 611.4, HOUR),
            ),
            id="cerebras-names-the-window",
        ),
        pytest.param(
            {
                "x-ratelimit-limit-req-minute": "300",
                "x-ratelimit-remaining-req-minute": "299",
                "x-ratelimitbysize-limit-month": "1000000000",
                "x-ratelimitbysize-remaining-month": "999990000",
            },
            (
                bucket("requests", 300, 299, None, MINUTE),
                bucket("tokens", 1e9, 999_990_000, None, 30 * DAY),
            ),
            id="mistral",
        ),
        pytest.param(
            {
                "x-ratelimit-limit": "100",
                "x-ratelimit-remaining": "99.5",
                "x-ratelimit-reset": "0",
                "x-tokenlimit-limit": "3000",
                "x-tokenlimit-remaining": "2500",
                "x-tokenlimit-limit-dynamic": "4000",
                "x-ratelimit-limit-dynamic": "120",
            },
            (
                bucket("requests", 100, 99.5, 0, 1.0),
                bucket("tokens", 3000, 2500, None, 1.0),
                bucket("tokens_dynamic", 4000, None, None, 1.0),
                bucket("requests_dynamic", 120, None, None, 1.0),
            ),
            id="together",
        ),
        pytest.param(
            {
                "x-ratelimit-limit-tokens-prompt": "60000",
                "x-ratelimit-remaining-tokens-prompt": "1",
                "x-ratelimit-limit-tokens-generated": "6000",
                "x-ratelimit-limit-tokens-cache-adjusted-prompt": "30000",
            },
            (
                bucket("input_tokens", 60_000, 1),
                bucket("output_tokens", 6000),
                bucket("tokens_cache_adjusted_prompt", 30_000),
            ),
            id="fireworks",
        ),
        pytest.param(
            both("5", "4", "12s", "-project-tokens"),
            (bucket("project_tokens", 5, 4, 12, MINUTE),),
            id="openai-project",
        ),
    ],
)
def test_success_tells_its_limits(headers: dict[str, str], limits: tuple[Limit, ...]) -> None:
    assert read_json(200, headers, ANSWER) == Reading(limits=limits)


def test_success_never_asks_to_wait() -> None:
    headers = OPENAI_SPENT | {"retry-after": "9"}
    reading = read_json(200, headers, ANSWER)
    assert (reading.trouble, reading.wait, reading.wait_source) == (None, None, "")


def test_success_may_ask_to_slow_down() -> None:
    headers = {"X-RateLimit-Over-Limit": "yes"}
    assert read_json(200, headers, ANSWER) == Reading(is_slow_down=True)


def test_success_that_speaks_of_an_error_is_a_success() -> None:
    choices = [{"message": {"content": '{"error": "rate limit"}'}, "finish_reason": "stop"}]
    assert read_json(200, {}, {"choices": choices, "error": {"code": 429}}) == Reading()
    assert read_json(200, {}, {"choices": choices}) == Reading()


def test_large_answer_is_not_searched_for_an_error() -> None:
    body = json.dumps(error("x") | {"padding": "x" * LARGEST_ERROR}).encode()
    assert read(200, {}, body, now=NOW) == Reading()


# --- the provider's words ---


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (error("Slow\n down."), "Slow down."),
        (
            openrouter("Provider returned error", raw="try later"),
            "Provider returned error; try later",
        ),
        (error(json.dumps(error("Inside."))), "Inside."),
        ({"detail": [{"msg": "One"}, {"msg": "Two"}, {"msg": "One"}]}, "One; Two"),
        ({"detail": "Unauthorized"}, "Unauthorized"),
        ({"code": "c", "error": "Text."}, "Text."),
        (error("nul\x00 \ud800"), "nul �"),
        (error("long" * 1000), ("long" * 500)),
        ({"what": "else"}, '{"what": "else"}'),
        (b"<html><title>502 Bad\nGateway</title>", "502 Bad Gateway"),
        (b"upstream connect error", "upstream connect error"),
        (b"x" * 1000, "x" * 500),
        (b"\xef\xbb\xbfmarked", "marked"),
        (b"", ""),
    ],
)
def test_words_are_the_providers_own_and_bounded(body: Any, words: str) -> None:
    assert read_json(500, {}, body).words == words


@pytest.mark.parametrize(
    ("words", "wait", "source"),
    [
        ("Please try again in 6m0s.", 360, "try again in 6m0s"),
        ("Please try again in 120ms.", 0.12, "try again in 120ms"),
        ("Retry after 1 second", 1, "Retry after 1 second"),
        ("retry in 500 milliseconds", 0.5, "retry in 500 milliseconds"),
        ("please wait 1 hour 5 mins and", 3900, "wait 1 hour 5 mins"),
        ("wait for 2 days", 172_800, "wait for 2 days"),
        ("try again in 90 days", None, ""),
        ("try again in 1 month", None, ""),
        ("retry 3 times", None, ""),
        ("try again later", None, ""),
    ],
)
def test_wait_is_found_in_words(words: str, wait: float | None, source: str) -> None:
    reading = read_json(429, {}, error(words))
    assert (reading.wait, reading.wait_source) == (wait, source)


# --- troubles ---


@pytest.mark.parametrize("trouble", list(Trouble))
def test_every_trouble_has_a_remedy(trouble: Trouble) -> None:
    assert trouble.remedy.endswith(".")


def test_time_cures_four_troubles() -> None:
    assert {each for each in Trouble if each.is_passing} == {RATE, OVERLOAD, DAILY, FAULT}


# --- one value ---


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0),
        ("0s", 0),
        ("20", 20),
        (" 20 ", 20),
        ("0.584", 0.584),
        ("5.1e-05", 0.000051),
        ("33011.382867", 33_011.382867),
        ("12ms", 0.012),
        ("6m0s", 360),
        ("2m59.56s", 179.56),
        ("10h17m5.7s", 37_025.7),
        ("4h17m", 15_420),
        ("250us", 0.00025),
        ("250µs", 0.00025),
        ("250μs", 0.00025),
        ("5ns", 5e-9),
        ("45.837906927s", 45.837906927),
        ("604800", 604_800),
        ("604801", None),
        ("169h", None),
        ("99999999", None),
        ("500000000", None),
        (f"{NOW + 7:.0f}", 7),
        (f"{NOW + 7.25}", 7.25),
        (f"{(NOW + 7) * 1000:.0f}", 7),
        (f"{NOW - 7:.0f}", 0),
        (f"{NOW - 30 * DAY:.0f}", None),
        (f"{NOW + 30 * DAY:.0f}", None),
        ("2026-11-23T00:04:22Z", 262),
        ("2026-11-23t00:04:22z", 262),
        ("2026-11-23T00:04:22.123456789Z", 262.123456),
        ("2026-11-23T02:04:22+02:00", 262),
        ("2026-11-22T23:59:59Z", 0),
        ("2026-11-23T00:04:22", None),
        ("2026-11-23", None),
        ("0001-01-01T00:00:00+23:59", None),
        ("Mon, 23 Nov 2026 00:04:22 GMT", 262),
        ("Monday, 23-Nov-26 00:04:22 GMT", 262),
        ("Sun, 22 Nov 2026 23:59:59 GMT", 0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", None),
        ("Mon, 23 Nov 2026 00:04:22", None),
        ("-1", None),
        ("-5s", None),
        ("-0", None),
        ("+5", None),
        ("nan", None),
        ("inf", None),
        ("Infinity", None),
        ("1e99", None),
        ("9" * 400, None),
        ("9" * 30 + "s", None),
        ("٣", None),
        ("1,000", None),
        ("5 s", None),
        ("soon", None),
        ("", None),
        ("\x00", None),
    ],
)
def test_value_is_seconds_from_now(value: str, seconds: float | None) -> None:
    found = parse_wait(value, now=NOW)
    assert found == (None if seconds is None else pytest.approx(seconds, abs=1e-6))


# --- whatever they send ---

values = st.one_of(
    st.text(max_size=80),
    st.floats().map(str),
    st.integers().map(str),
    st.datetimes(timezones=st.just(UTC)).map(datetime.isoformat),
    st.from_regex(r"\A(\d{1,30}(\.\d{1,30})?(h|m|s|ms|us|ns))+\Z"),
    st.from_regex(
        r"\A[A-Z][a-z]{2}, \d{1,3} [A-Z][a-z]{2} \d{1,6} [\d:.]{1,9} ([A-Z]{3}|[-+]\d+)\Z"
    ),
)
names = st.one_of(
    st.sampled_from(["Retry-After", "retry-after-ms", "x-should-retry", "x-ratelimit-over-limit"]),
    st.from_regex(
        r"\A(x-)?(ratelimit|tokenlimit|ratelimitbysize)-(limit|remaining|reset)"
        r"(-(requests|tokens|day|minute|[a-z0-9]{1,5}))?\Z"
    ),
    st.from_regex(r"\Aanthropic-ratelimit-[a-z0-9-]{1,9}-(limit|remaining|reset|status)\Z"),
    st.text(max_size=20),
)
keys = st.sampled_from(
    [
        "error",
        "code",
        "message",
        "type",
        "detail",
        "details",
        "retryDelay",
        "choices",
        "raw",
        "input",
    ]
)
phrases = st.builds(
    "Please try again in {}{}. Limit {}, Requested {}".format, values, values, values, values
)
documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | phrases,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(keys | st.text(max_size=5), inner, max_size=4)
        | inner.map(json.dumps)
    ),
    max_leaves=20,
)
bodies = st.binary(max_size=200) | documents.map(lambda document: json.dumps(document).encode())
statuses = (
    st.sampled_from([-1, 0, 200, 204, 301, 400, 402, 403, 413, 429, 500, 503]) | st.integers()
)
nows = st.floats(0, 4e9)


@fuzz
@given(value=values, now=nows)
def test_any_value_is_a_sane_wait_or_none(value: str, now: float) -> None:
    seconds = parse_wait(value, now=now)
    assert seconds is None or 0 <= seconds <= LONGEST_WAIT


@fuzz
@given(seconds=st.floats(0, LONGEST_WAIT), unit=st.sampled_from(["", "s"]))
def test_any_wait_is_read_back(seconds: float, unit: str) -> None:
    written = f"{seconds:.9f}{unit}"
    assert parse_wait(written, now=NOW) == pytest.approx(seconds, abs=1e-8)


@fuzz
@given(status=statuses, headers=st.dictionaries(names, values, max_size=8), body=bodies, now=nows)
@example(status=429, headers={}, body=b"[" * 100_000, now=NOW)
@example(status=429, headers={}, body=b'{"error":' * 50_000 + b"1" + b"}" * 50_000, now=NOW)
@example(status=200, headers={}, body=b'{"error": ' + b"9" * 5000 + b"}", now=NOW)
@example(status=500, headers={}, body=b'{"error": {"message": 1e999, "code": NaN}}', now=NOW)
@example(status=429, headers={"retry-after": "9" * 100_000}, body=b"x" * 2_000_000, now=NOW)
@example(status=429, headers={}, body=b'"try again in ' + b"9" * 100_000 + b's"', now=NOW)
@example(status=429, headers={}, body=b'"' + b"limit 1 " * 30_000 + b'"', now=NOW)
@example(status=200, headers={}, body=b'[{"error": [1]}]', now=NOW)
@example(status=400, headers={}, body=json.dumps(["x"] * 5000).encode(), now=NOW)
def test_anything_is_read(status: int, headers: dict[str, str], body: bytes, now: float) -> None:
    reading = read(status, headers, body, now=now)
    assert reading.trouble is not None or 200 <= status < 300
    assert reading.wait is None or SHORTEST_WAIT <= reading.wait <= LONGEST_WAIT
    assert bool(reading.wait_source) is (reading.wait is not None)
    assert len(reading.words) <= 2000
    assert len(reading.code) <= 64
    reading.words.encode()
    for limit in reading.limits:
        numbers = (limit.limit, limit.remaining, limit.reset, limit.period)
        assert all(n is None or (n >= 0 and math.isfinite(n)) for n in numbers)
