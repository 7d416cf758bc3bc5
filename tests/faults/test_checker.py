"""The two invariants that no scenario breaks: the checker sees them broken all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import checker
from .checker import Evidence, Violation
from .ledgers import Ledger


def evidence(folder: Path, **request: Any) -> Evidence:
    return Evidence(folder, {"u": request} if request else {}, [], [], [], [])


def test_a_transaction_that_stays_open_and_a_crowd_of_connections_are_seen(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "A")
    ledger.write(connections=5, idle=[["web", 0.9, 0.0, "SELECT 1"], ["web", 3.0, 2.5, "SELECT 1"]])
    ledger.write(connections=6, idle=[["web", 1.1, 0.0, "SELECT 1"]])
    ledger.close()
    found = checker.few_connections(evidence(tmp_path), 5)
    assert list(found) == [
        Violation("I9", "6 connections; 5 at most"),
        Violation("I9", "web was idle in a transaction for 1.1 s after 'SELECT 1'"),
    ]


def test_the_transaction_of_a_process_that_was_stopped_is_its_own_business(tmp_path: Path) -> None:
    deaths, looks = Ledger(tmp_path, "D"), Ledger(tmp_path, "A")
    deaths.write(what="stop", who="celery0")
    looks.write(connections=1, idle=[["celery0", 5.0, 0.0, "SELECT 1"]])
    deaths.write(what="continue", who="celery0")
    deaths.close()
    looks.close()
    assert list(checker.few_connections(evidence(tmp_path), None)) == []


def test_a_finished_request_that_nobody_was_told_of_is_not_done_with(tmp_path: Path) -> None:
    told = {"announced_at": None, "announce_tries": 5, "announce_error": "Stumble"}
    found = list(checker.drained(evidence(tmp_path, state="completed", **told)))
    assert found == [Violation("I10", "not announced after 5 tries Stumble", "u")]
    assert list(checker.drained(evidence(tmp_path, state="pending", **told))) == []
