"""The invariants, read from the ledgers and from the database, and from nothing of the product's.

``python -m tests.faults.checker FOLDER DATABASE_URL`` lists every violation and ends with 1 where
there is one. Plain SQL, so that no bug of the product's can hide itself.

I1   what was committed is finished, with its answer where there was one
I2   each finished request had its handler run, once as far as the database goes
I3   the provider is called once an attempt, and once more for each fault that hit the call
I4   a request costs what the call that answered it cost, once; nothing is invented
I5   no row goes backwards
I6   a callback is answered 2xx exactly if it is ours, and is stored then, once
I7   no secret is anywhere but where it belongs
I8   nobody writes under a claim that is another's
I9   no transaction stands open while somebody waits, and connections are few
I10  at the end nothing is due
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import zip_longest
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from . import ledgers, provider

UNCOMMITTED = 3.0
"""Seconds after an answer in which a busy worker may not have written it down yet."""
LONGEST_TRANSACTION = 1.0
"""Seconds that one may stand idle, beside those its process stood in line for a processor."""
FORWARD = {
    ("pending", "submitted"),
    ("pending", "completed"),
    ("pending", "failed"),
    ("pending", "cancelled"),
    ("submitted", "completed"),
    ("submitted", "failed"),
    ("submitted", "cancelled"),
    # An answer wins over a failure that was told before it.
    ("failed", "completed"),
}
# Kept by whoever watches, in the database itself: every change of a request, and whose it was.
WATCH = """
CREATE TABLE faults_history (
    id bigserial PRIMARY KEY, at timestamptz DEFAULT clock_timestamp(), who text, uuid uuid,
    was jsonb, is_now jsonb
);
CREATE FUNCTION faults_watch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO faults_history (who, uuid, was, is_now) VALUES (
        current_setting('application_name'), NEW.uuid,
        jsonb_build_object('state', OLD.state, 'attempts', OLD.attempts, 'cost', OLD.cost,
            'announced_at', OLD.announced_at, 'claim', OLD.claim_token,
            'until', extract(epoch from OLD.claimed_until), 'message', OLD.qstash_message_id),
        jsonb_build_object('state', NEW.state, 'attempts', NEW.attempts, 'cost', NEW.cost,
            'announced_at', NEW.announced_at, 'claim', NEW.claim_token,
            'until', extract(epoch from NEW.claimed_until), 'message', NEW.qstash_message_id));
    RETURN NULL;
END $$;
CREATE TRIGGER faults_watch AFTER UPDATE ON django_qstash_llm_llmrequest
    FOR EACH ROW WHEN (OLD.* IS DISTINCT FROM NEW.*) EXECUTE FUNCTION faults_watch();
"""


@dataclass(frozen=True, order=True)
class Violation:
    invariant: str
    what: str
    uuid: str = ""

    def __str__(self) -> str:
        return f"{self.invariant:4} {self.uuid or '-':36}  {self.what}"


@dataclass
class Evidence:
    """What the ledgers and the database say, read once."""

    folder: Path
    requests: dict[str, dict[str, Any]]
    receipts: list[dict[str, Any]]
    effects: list[dict[str, Any]]
    history: list[dict[str, Any]]
    secrets: list[str]
    uuids: dict[int, str] = field(default_factory=dict)
    """Note -> request."""
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    answered: list[dict[str, Any]] = field(default_factory=list)
    """Callbacks that were answered before the database was read: one may come at any time."""

    @classmethod
    def gather(cls, folder: Path, database_url: str, secrets: Iterable[str]) -> Evidence:
        answered = ledgers.read(folder, "K")
        # Or the checker's own long look would be a transaction that stands open.
        with psycopg.connect(database_url, row_factory=dict_row, autocommit=True) as connection:
            evidence = cls(
                folder,
                {str(row["uuid"]): row for row in connection.execute(_REQUESTS)},
                connection.execute(_RECEIPTS).fetchall(),
                connection.execute(_EFFECTS).fetchall(),
                connection.execute("SELECT * FROM faults_history ORDER BY id").fetchall(),
                list(_leaks(connection, secrets)),
                answered=answered,
            )
        for row in evidence.requests.values():
            evidence.uuids[row["note"]] = str(row["uuid"])
        for line in ledgers.read(folder, "P"):
            evidence.calls.setdefault(line["call"], {"ended": None, "result": None})
            if "note" in line:
                evidence.calls[line["call"]] |= line | {"began": line["at"]}
            else:
                evidence.calls[line["call"]] |= {"ended": line["at"], "result": line["status"]}
        evidence.secrets += _leaks_in_files(folder, secrets)
        return evidence

    def committed(self) -> list[str]:
        return [line["uuid"] for line in ledgers.read(self.folder, "C") if "uuid" in line]

    def attempts(self) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
        """(request, QStash's message, attempt) -> the calls made for it."""
        attempts = defaultdict(list)
        for call in self.calls.values():
            uuid = self.uuids.get(call["note"], f"note {call['note']}")
            attempts[uuid, call["message"], call["attempt"]].append(call)
        return attempts

    def disturbances(self) -> list[tuple[float, float]]:
        """From when to when something was done that may cost a second call."""
        deaths = [
            (line["at"], line.get("until", line["at"] + 0.2))
            for line in ledgers.read(self.folder, "D")
            if line["what"] in {"crash", "kill", "exit"}
        ]
        return deaths + self.outages() + self.asleep()

    def outages(self) -> list[tuple[float, float]]:
        return self._spans("database down", "database up")

    def asleep(self) -> list[tuple[float, float]]:
        return self._spans("stop", "continue")

    def _spans(self, begin: str, end: str) -> list[tuple[float, float]]:
        lines = ledgers.read(self.folder, "D")
        begun = [line["at"] for line in lines if line["what"] == begin]
        ended = [line["at"] for line in lines if line["what"] == end]
        return list(zip_longest(begun, ended, fillvalue=float("inf")))


_REQUESTS = """
    SELECT uuid, state, retries, cost, completion, completion_id, announced_at, announce_tries,
        announce_error, submission_number, claimed_until, object_id, notes_note.number AS note
    FROM django_qstash_llm_llmrequest
    JOIN notes_note ON notes_note.id = object_id::bigint
"""
_RECEIPTS = """
    SELECT uuid, source_message_id, retried, kind, status, applied_at, apply_tries, seen_count,
        is_recovered, llm_request_id, problem
    FROM django_qstash_llm_callbackresponse
"""
_EFFECTS = "SELECT uuid, kind, count(*) AS times FROM notes_effect GROUP BY uuid, kind"


def check(
    folder: Path,
    database_url: str,
    *,
    secrets: Iterable[str] = (),
    most_connections: int | None = None,
) -> list[Violation]:
    """Every violation of every invariant, in their order."""
    evidence = Evidence.gather(folder, database_url, secrets)
    violations = [
        violation
        for invariant in (
            finished,
            handled_once,
            called_once,
            paid_once,
            only_forwards,
            believed_and_stored,
            kept_secret,
            claimed_by_one,
            drained,
        )
        for violation in invariant(evidence)
    ]
    return sorted(violations + list(few_connections(evidence, most_connections)))


def finished(evidence: Evidence) -> Iterator[Violation]:
    for uuid in evidence.committed():
        row = evidence.requests.get(uuid)
        if row is None:
            yield Violation("I1", "was committed and is not there", uuid)
    for uuid, row in evidence.requests.items():
        if row["state"] in {"pending", "submitted"}:
            yield Violation("I1", f"is {row['state']}", uuid)
    unreadable = {str(row["uuid"]) for row in evidence.receipts if row["problem"]}
    for call in evidence.calls.values():
        uuid = evidence.uuids.get(call["note"], "")
        state = evidence.requests.get(uuid, {}).get("state")
        if call["result"] == 200 and state == "failed" and uuid not in unreadable:
            yield Violation("I1", f"is failed, and call {call['call']} was answered", uuid)


def handled_once(evidence: Evidence) -> Iterator[Violation]:
    times = {(str(row["uuid"]), row["kind"]): row["times"] for row in evidence.effects}
    told = Counter((line["uuid"], line["kind"]) for line in ledgers.read(evidence.folder, "H"))
    for uuid, row in evidence.requests.items():
        expected = row["state"] if row["state"] in {"completed", "failed"} else None
        if expected and (uuid, expected) not in times:
            yield Violation("I2", f"is {expected} and its handler left no effect", uuid)
    for (uuid, kind), count in times.items():
        if count != 1:
            yield Violation("I2", f"its handler took effect {count} times ({kind})", uuid)
        if not told[uuid, kind]:
            yield Violation("I2", f"has an effect ({kind}) that no handler made", uuid)


def called_once(evidence: Evidence) -> Iterator[Violation]:
    disturbances = evidence.disturbances()
    messages = defaultdict(set)
    for (uuid, message, attempt), calls in evidence.attempts().items():
        messages[uuid].add(message)
        hits = sum(any(_is_hit(call, span) for call in calls) for span in disturbances)
        if len(calls) - 1 > hits:
            what = f"attempt {attempt} was called {len(calls)} times, {hits} of them hit"
            yield Violation("I3", what, uuid)
        retries = evidence.requests.get(uuid, {}).get("retries")
        if retries is not None and attempt > retries:
            yield Violation("I3", f"attempt {attempt} with {retries} retries", uuid)
    for uuid, ids in messages.items():
        if len(ids) > evidence.requests.get(uuid, {}).get("submission_number", 0):
            yield Violation("I3", f"is {len(ids)} messages to QStash: {sorted(ids)}", uuid)


def _is_hit(call: dict[str, Any], span: tuple[float, float]) -> bool:
    ended = call["ended"] if call["ended"] is not None else float("inf")
    return call["began"] <= span[1] + 0.2 and ended + UNCOMMITTED >= span[0]


def paid_once(evidence: Evidence) -> Iterator[Violation]:
    for uuid, row in evidence.requests.items():
        if row["state"] != "completed":
            if row["cost"]:
                yield Violation("I4", f"is {row['state']} and costs {row['cost']}", uuid)
            continue
        number = int(row["completion_id"].rpartition("-")[2] or 0)
        call = evidence.calls.get(number)
        if call is None or call["result"] != 200 or call["note"] != row["note"]:
            yield Violation("I4", f"completed by {row['completion_id']!r}, no call of its", uuid)
            continue
        cost = Decimal(provider.micro_dollars(number)) / 1_000_000
        if row["cost"] != cost:
            yield Violation("I4", f"costs {row['cost']}, and call {number} cost {cost}", uuid)
        if row["completion"] != provider.text(number, row["note"]):
            yield Violation("I4", f"call {number} did not say {row['completion']!r}", uuid)
    for change in evidence.history:
        was, is_now = change["was"], change["is_now"]
        if was["state"] == "completed" and was["cost"] != is_now["cost"]:
            what = f"its cost went from {was['cost']} to {is_now['cost']}"
            yield Violation("I4", what, str(change["uuid"]))


def only_forwards(evidence: Evidence) -> Iterator[Violation]:
    for change in evidence.history:
        was, is_now, uuid = change["was"], change["is_now"], str(change["uuid"])
        step = (was["state"], is_now["state"])
        if step[0] != step[1] and step not in FORWARD:
            yield Violation("I5", f"went from {step[0]} to {step[1]}", uuid)
        if step == ("pending", "submitted") and not is_now["message"]:
            yield Violation("I5", "was submitted before QStash had taken it", uuid)
        if was["attempts"] > is_now["attempts"]:
            yield Violation("I5", f"{was['attempts']} attempts, then {is_now['attempts']}", uuid)
        if was["announced_at"] and not is_now["announced_at"] and step != ("failed", "completed"):
            yield Violation("I5", "was announced, and then was not", uuid)
        if was["message"] and was["message"] != is_now["message"]:
            what = f"was QStash's {was['message']}, and then {is_now['message']}"
            yield Violation("I5", what, uuid)


def believed_and_stored(evidence: Evidence) -> Iterator[Violation]:
    stored: Counter[tuple[str, str, int, str]] = Counter()
    for row in evidence.receipts:
        stored[str(row["uuid"]), row["source_message_id"], row["retried"], row["kind"]] += 1
        if row["llm_request_id"] and not row["applied_at"] and row["kind"] != "quarantined":
            yield Violation("I6", "has a receipt that never took effect", str(row["uuid"]))
    for (uuid, _, retried, kind), count in stored.items():
        if count > 1:
            yield Violation("I6", f"{kind} {retried} is stored {count} times", uuid)
    for told in evidence.answered:
        is_taken, uuid = 200 <= told["status"] < 300, told["uuid"]
        if is_taken and not told["is_genuine"]:
            yield Violation("I6", f"a callback that is not QStash's: {told['what']}", uuid)
        elif is_taken and not stored[uuid, told["source"], told["retried"], told["kind"]]:
            what = f"{told['kind']} {told['retried']} was answered {told['status']}, not stored"
            yield Violation("I6", what, uuid)
        elif told["is_genuine"] and 400 <= told["status"] < 500:
            yield Violation("I6", f"{told['kind']} was refused with {told['status']}", uuid)


def kept_secret(evidence: Evidence) -> Iterator[Violation]:
    for place in evidence.secrets:
        yield Violation("I7", place)


def _leaks(connection: psycopg.Connection[Any], secrets: Iterable[str]) -> Iterator[str]:
    """Our tables. QStash's own have to hold the key that they forward."""
    tables = connection.execute(
        "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"
        " AND (table_name LIKE 'django\\_qstash\\_llm%' OR table_name LIKE 'notes%')"
    ).fetchall()
    for row in tables:
        for secret in secrets:
            # bytea is written as hexadecimal digits.
            found = connection.execute(
                f'SELECT count(*) AS times FROM "{row["table_name"]}" AS it'
                " WHERE it::text LIKE %s OR it::text LIKE %s",
                [f"%{secret}%", f"%{secret.encode().hex()}%"],
            ).fetchone()
            if found["times"]:
                yield f"{secret[:9]}… is in {found['times']} rows of {row['table_name']}"


def _leaks_in_files(folder: Path, secrets: Iterable[str]) -> list[str]:
    """The processes' logs, and what Redis was made to write down."""
    files = [*folder.glob("*.log"), *folder.glob("*.rdb")]
    return [
        f"{secret[:9]}… is in {path.name}"
        for path in files
        for secret in secrets
        if secret.encode() in path.read_bytes()
    ]


def claimed_by_one(evidence: Evidence) -> Iterator[Violation]:
    owner: dict[str, str] = {}
    for change in evidence.history:
        was, is_now, who = change["was"], change["is_now"], change["who"]
        if was["claim"] == is_now["claim"]:
            continue
        uuid = str(change["uuid"])
        if was["claim"] and was["until"] and was["until"] > change["at"].timestamp() + 0.05:
            holder = owner.get(was["claim"], who)
            if holder != who:
                what = f"{who} wrote under a claim that was {holder}'s and had not ended"
                yield Violation("I8", what, uuid)
        if is_now["claim"] and owner.setdefault(is_now["claim"], who) != who:
            yield Violation("I8", f"{who} took the token of {owner[is_now['claim']]}", uuid)


def few_connections(evidence: Evidence, most: int | None) -> Iterator[Violation]:
    asleep = evidence.asleep()
    for line in ledgers.read(evidence.folder, "A"):
        if most is not None and line["connections"] > most:
            yield Violation("I9", f"{line['connections']} connections; {most} at most")
        if any(begin <= line["at"] <= end + 1 for begin, end in asleep):
            continue
        for who, seconds, queued, query in line["idle"]:
            if seconds - queued > LONGEST_TRANSACTION:
                what = f"{who} was idle in a transaction for {seconds:.1f} s after {query!r}"
                yield Violation("I9", what)


def drained(evidence: Evidence) -> Iterator[Violation]:
    for uuid, row in evidence.requests.items():
        if row["state"] in {"completed", "failed"} and not row["announced_at"]:
            what = f"not announced after {row['announce_tries']} tries {row['announce_error']}"
            yield Violation("I10", what, uuid)


def extra_calls(evidence: Evidence) -> int:
    """Calls beyond one for each attempt."""
    return sum(len(calls) - 1 for calls in evidence.attempts().values())


def in_flight_at_faults(evidence: Evidence) -> int:
    """Calls that a fault hit while they were open, or answered and not written down yet."""
    return sum(
        _is_hit(call, span) for span in evidence.disturbances() for call in evidence.calls.values()
    )


def main(folder: str, database_url: str) -> int:
    violations = check(Path(folder), database_url)
    print(*violations or ["no violation"], sep="\n")
    return bool(violations)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
