"""(b3) The least that does it: a WSGI function that verifies by hand and inserts one row."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.callback_site import CALLBACK_URL, POSTGRES, SCHEMA, SIGNING_KEYS

TABLE = "bare_callback"
CREATE = (
    f"CREATE TABLE {TABLE} (uuid char(36) NOT NULL, source_message_id varchar(255) NOT NULL,"
    " retried integer NOT NULL, status integer NOT NULL, body {bytes} NOT NULL,"
    " received_at double precision NOT NULL, UNIQUE (source_message_id, retried))"
)
INSERT = (
    f"INSERT INTO {TABLE} (uuid, source_message_id, retried, status, body, received_at)"
    " VALUES ({}, {}, {}, {}, {}, {}) ON CONFLICT DO NOTHING"
)
kept = threading.local()


def connect_postgres() -> Callable[..., object]:
    import psycopg

    options = f"-c search_path={SCHEMA}"
    connection = psycopg.connect(
        POSTGRES.replace("postgres://", "postgresql://"), options=options, autocommit=True
    )
    statement = INSERT.format(*["%s"] * 6)
    return lambda row: connection.execute(statement, row)


def connect_sqlite() -> Callable[..., object]:
    import sqlite3

    path = f"{os.environ['BENCHMARK_DIRECTORY']}/callback.sqlite3"
    connection = sqlite3.connect(path, timeout=20, isolation_level=None)
    connection.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;")
    statement = INSERT.format(*["?"] * 6)
    return lambda row: connection.execute(statement, row)


connect = connect_postgres if os.environ["BENCHMARK_ON_POSTGRES"] == "True" else connect_sqlite


def is_signed(token: str, body: bytes, url: str) -> bool:
    signed, _, signature = token.rpartition(".")
    for key in SIGNING_KEYS:
        if hmac.compare_digest(
            _unpadded(hmac.digest(key.encode(), signed.encode(), "sha256")), signature
        ):
            break
    else:
        return False
    header, _, payload = signed.partition(".")
    if json.loads(_decoded(header))["alg"] != "HS256":
        return False
    claims: dict[str, Any] = json.loads(_decoded(payload))
    now = time.time()
    return (
        claims["iss"] == "Upstash"
        and claims["sub"] == url
        and claims["nbf"] <= now + 30
        and claims["exp"] > now - 30
        and hmac.compare_digest(
            claims["body"].rstrip("="), _unpadded(hashlib.sha256(body).digest())
        )
    )


def _unpadded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def application(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    uuid = environ["PATH_INFO"].split("/")[-2]
    body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
    if not is_signed(
        environ.get("HTTP_UPSTASH_SIGNATURE", ""), body, f"{CALLBACK_URL}/callback/{uuid}/"
    ):
        start_response("401 Unauthorized", [("Content-Length", "0")])
        return [b""]
    told = json.loads(body)
    if not hasattr(kept, "insert"):
        kept.insert = connect()
    answer = base64.b64decode(told["body"])
    kept.insert(
        (uuid, told["sourceMessageId"], told["retried"], told["status"], answer, time.time())
    )
    content = b'{"stored":true}'
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(content)))]
    start_response("200 OK", headers)
    return [content]
