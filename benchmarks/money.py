"""What it costs to know what was spent, and to hold budgets.

    python benchmarks/money.py [--quick] [--json]

(a) A year's spend by month and model, from the roll-ups, against adding up the rows of 1,000,000
    requests (100,000 with ``--quick``), which has to come to the same.
(b) Reserving what a request may cost and settling what it did, against submitting it: from the pending
    row to QStash's answer, a stub in another process.
(c) Eight processes that submit at once and share one budget, against the same without a budget.

On SQLite and PostgreSQL (TEST_POSTGRES_URL), all in one run. (c) on PostgreSQL only: SQLite has one writer.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.figures import Figure, arguments, at_least, at_most, no_more_than, show
from benchmarks.submit import MESSAGES, NAMES, configure, drop_schema, start_stub

PROCESSES = 8
MODELS = ("gpt-5.4-mini", "gpt-5.4", "claude-opus-4-6", "gemini-3-pro", "mistral-large")
YEAR = datetime(2025, 1, 1, tzinfo=UTC)
PRICES = {"openai/gpt-5.4-mini": {"input": "1", "output": "10"}}
PARAMETERS = {"max_completion_tokens": 200}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds, and what it answers."""
    started = time.perf_counter()
    answer = work()
    return (time.perf_counter() - started) * 1000, answer


# --- (a) a year ------------------------------------------------------------------------------


def cost_of(number: int) -> int:
    """In 1e-12 USD: some hundred thousandths of a dollar, never the same for long."""
    return 10_000_000 + number % 9973 * 1_000


def fill(alias: str, count: int) -> None:
    """A year of completed requests and the ledger's entries of them, spread evenly."""
    from django.db import connections

    connection = connections[alias]
    for table in ("llmrequest", "ledgerentry", "spend"):
        with connection.cursor() as cursor:
            cursor.execute(f"DELETE FROM django_qstash_llm_{table}")
    step = timedelta(days=365) / count
    row_sql, row_values = statement(alias, "LLMRequest")
    entry_sql, entry_values = statement(alias, "LedgerEntry")
    to_time = connection.ops.adapt_datetimefield_value
    to_date = connection.ops.adapt_datefield_value
    for first in range(0, count, 10_000):
        rows, entries = [], []
        for number in range(first, min(first + 10_000, count)):
            at, model, key = YEAR + number * step, MODELS[number % 5], uuid.uuid4()
            key_value = key if connection.vendor == "postgresql" else key.hex
            cost = Decimal(cost_of(number)).scaleb(-12)
            rows.append(
                row_values
                | {
                    "uuid": key_value,
                    "state": "completed",
                    "provider": "openai",
                    "model": model,
                    "cost": connection.ops.adapt_decimalfield_value(cost, 20, 12),
                    "input_tokens": 900,
                    "output_tokens": 100,
                    "created_at": to_time(at),
                    "finished_at": to_time(at),
                }
            )
            entries.append(
                entry_values
                | {
                    "uuid": key_value,
                    "answer": "chat",
                    "at": to_time(at),
                    "entered_at": to_time(at),
                    "day": to_date(at.date()),
                    "provider": "openai",
                    "model": model,
                    "spent": cost_of(number),
                    "useful": cost_of(number),
                    "input_tokens": 900,
                    "output_tokens": 100,
                    "is_folded": True,
                }
            )
        with connection.cursor() as cursor:
            cursor.executemany(row_sql, [tuple(row.values()) for row in rows])
            cursor.executemany(entry_sql, [tuple(entry.values()) for entry in entries])
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("ANALYZE")


def statement(alias: str, name: str) -> tuple[str, dict[str, Any]]:
    """An INSERT of a row of this model, and the values of its defaults by column."""
    from django.apps import apps
    from django.db import connections

    model, connection = apps.get_model("django_qstash_llm", name), connections[alias]
    fields = [field for field in model._meta.concrete_fields if not field.primary_key]
    empty = model()
    values = {
        field.column: field.get_db_prep_save(getattr(empty, field.attname), connection)
        for field in fields
    }
    columns, marks = ", ".join(f'"{column}"' for column in values), ", ".join(["%s"] * len(values))
    return f'INSERT INTO "{model._meta.db_table}" ({columns}) VALUES ({marks})', values


def naive(alias: str) -> dict[tuple[date, str], Decimal]:
    from django.db.models import Sum
    from django.db.models.functions import TruncMonth

    from django_qstash_llm.models import LLMRequest

    year = LLMRequest.objects.using(alias).filter(
        finished_at__gte=YEAR, finished_at__lt=YEAR.replace(year=2026)
    )
    rows = year.order_by().annotate(month=TruncMonth("finished_at")).values_list("month", "model")
    return {(month.date(), model): total for month, model, total in rows.annotate(Sum("cost"))}


def rolled_up(alias: str) -> dict[tuple[date, str], Decimal]:
    from django_qstash_llm.models import Spend

    rows = Spend.objects.using(alias).report(
        "month", "model", since=date(2025, 1, 1), until=date(2025, 12, 31)
    )
    return {(row["month"], row["model"]): total.spent for row, total in rows}


def measure_year(alias: str, count: int) -> list[Figure]:
    from django_qstash_llm.models import Spend

    fill(alias, count)
    took, _ = timed(Spend.objects.using(alias).rebuild)
    print(
        f"{NAMES[alias]}: {count:,} entries added up anew in {took / 1000:.1f} s", file=sys.stderr
    )
    slow, by_rows = timed(lambda: naive(alias))
    rolled_up(alias)  # the first one opens what the others use
    times = []
    for _ in range(15):
        fast, by_days = timed(lambda: rolled_up(alias))
        times.append(fast)
    # SQLite's sums of decimals are floating-point sums.
    if by_rows.keys() != by_days.keys() or any(
        abs(by_rows[key] - by_days[key]) > Decimal("1e-6") for key in by_rows
    ):
        sys.exit("the two ways come to different sums: no figure can be trusted")
    exact = sum(cost_of(number) for number in range(count))
    if sum(by_days.values()) != Decimal(exact).scaleb(-12):
        sys.exit("the roll-ups are not exact: no figure can be trusted")
    fast, name = statistics.median(times), NAMES[alias]
    # Of a million rows; adding up takes as long as there are rows, and the roll-ups do not.
    goal = (100 if alias == "postgres" else 1000) * count / 1_000_000
    return [
        at_most(f"(a) a year by month and model on {name}", fast, 10, "ms"),
        at_least(
            f"(a) the same, how often in the time that adding up {count:,} rows takes, {name}",
            1000 / fast,
            1000 / slow,
            goal,
            "1/s",
        ),
    ]


# --- (b) one more budget ---------------------------------------------------------------------


def write_pending(alias: str, count: int) -> None:
    """Each says something of its own after the same instructions."""
    from django_qstash_llm.models import LLMRequest

    told, asked = MESSAGES
    rows = [
        LLMRequest(
            messages=[told, asked | {"content": f"{number} {asked['content']}"}],
            parameters=PARAMETERS,
        )
        for number in range(count)
    ]
    for row in rows:
        row.prepare()
    LLMRequest.objects.using(alias).bulk_create(rows, batch_size=500)


def empty(alias: str) -> None:
    from django.db import connections

    from django_qstash_llm.models import Budget, LedgerEntry, LLMRequest, Spend

    Budget.objects.using(alias).all().delete()
    for model in (LedgerEntry, LLMRequest, Spend):
        # A million at once: the ORM would first look each up, and name each to SQLite.
        rows: Any = model.objects.using(alias).all()
        rows._raw_delete(alias)
    if alias == "postgres":
        with connections[alias].cursor() as cursor:
            cursor.execute("VACUUM ANALYZE")  # what was deleted would be read over and over


def make_budget(alias: str) -> None:
    """One that is in use: when it was first looked at, it has counted what was spent before."""
    from django.utils import timezone

    from django_qstash_llm.models import Budget

    Budget.objects.using(alias).create(name="all", amount=1_000_000).spent(timezone.now())


def submit_all(alias: str) -> None:
    from django_qstash_llm.models.outbox import Outbox

    while Outbox(alias).submit():
        pass


def answer_all(alias: str) -> None:
    """What the callbacks do, without them: each row ends, and its cost is entered."""
    from django.utils import timezone

    from django_qstash_llm.completions import Usage
    from django_qstash_llm.models import LedgerEntry, LLMRequest
    from django_qstash_llm.pricing import Cost

    now = timezone.now()
    rows = LLMRequest.objects.using(alias).submitted()
    entries = [
        LedgerEntry.of_answer(
            row,
            answer="msg.0",
            usage=Usage(input_tokens=90, output_tokens=50),
            cost=Cost(Decimal("0.00059"), "own"),
            at=now,
            is_useful=True,
        )
        for row in rows
    ]
    LedgerEntry.objects.using(alias).bulk_create(entries, batch_size=500)
    rows.update(state="completed", finished_at=now)


def measure_budget(alias: str, count: int, rounds: int) -> Figure:
    """In turn with and without a budget. What both do, ending and entering, is not timed."""
    from django_qstash_llm.models import Budget
    from django_qstash_llm.models.settlement import settle

    with_one, without = [], []
    for number in range(2 * rounds):
        is_held = bool(number % 2)
        empty(alias)
        if is_held:
            make_budget(alias)
        write_pending(alias, count)
        took, _ = timed(lambda: submit_all(alias))
        answer_all(alias)
        # Without a budget entries are added up by day as well: that much is not the budget's.
        settling, _ = timed(lambda: settle(alias))
        (with_one if is_held else without).append((took, settling))
        if is_held and Budget.objects.using(alias).get().reserved != 0:
            sys.exit("something is still reserved: no figure can be trusted")
    submit = statistics.median(took for took, _ in without)
    reserve = statistics.median(took for took, _ in with_one) - submit
    fold = statistics.median(took for _, took in without)
    release = statistics.median(took for _, took in with_one) - fold
    print(
        f"{NAMES[alias]}, µs a request: submit {submit / count * 1000:.0f}, reserve "
        f"{reserve / count * 1000:.0f}, settle {release / count * 1000:.0f} and adding up by day "
        f"{fold / count * 1000:.0f}",
        file=sys.stderr,
    )
    return no_more_than(
        f"(b) submit, reserve and settle / submit alone, {NAMES[alias]}",
        (submit + reserve + release) / count,
        submit / count,
        1.15,
    )


# --- (c) eight at once -----------------------------------------------------------------------


def submit_together(stub: str, directory: str) -> float:
    """Requests per second of eight processes that have the same rows to submit."""
    from django_qstash_llm.models import LLMRequest

    count = LLMRequest.objects.using("postgres").pending().count()
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--submit", stub, directory],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(PROCESSES)
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()  # it is ready
    started = time.perf_counter()
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    for process in processes:
        process.wait(300)
    took = time.perf_counter() - started
    for process in processes:
        assert process.stdout is not None
        process.stdout.close()
    submitted = LLMRequest.objects.using("postgres").submitted().count()
    if submitted != count:
        sys.exit(f"{submitted} of {count} rows were submitted: no figure can be trusted")
    return count / took


def submit_with_others(stub: str, directory: str) -> None:
    use(stub, directory, migrates=False)
    from django.db import connections

    connections["postgres"].ensure_connection()
    print("ready", flush=True)
    sys.stdin.read()
    from django_qstash_llm.models.outbox import Outbox

    # A few at a time, so that all of them are at the budget again and again.
    while Outbox("postgres").submit(limit=50):
        pass


def measure_together(stub: str, directory: str, count: int, rounds: int) -> Figure:

    rates: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * rounds):
        is_held = bool(number % 2)
        empty("postgres")
        if is_held:
            make_budget("postgres")
        write_pending("postgres", count)
        rates[is_held].append(submit_together(stub, directory))
    return at_least(
        "(c) 8 processes submit and share a budget / without a budget, PostgreSQL",
        statistics.median(rates[True]),
        statistics.median(rates[False]),
        0.75,
    )


# --- all -------------------------------------------------------------------------------------


def use(stub: str, directory: str, *, migrates: bool = True) -> list[str]:
    from django.conf import settings

    aliases = configure(stub, directory, migrates=migrates)
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PRICES": PRICES}
    return aliases


def main() -> None:
    if sys.argv[1:2] == ["--submit"]:
        submit_with_others(*sys.argv[2:])
        return
    options = arguments(__doc__)
    count, submitted, together, rounds = (
        (100_000, 1_000, 1_600, 3) if options.quick else (1_000_000, 4_000, 6_000, 5)
    )
    stub = start_stub()
    with tempfile.TemporaryDirectory() as directory:
        aliases = use(stub, directory)
        figures: list[Figure] = []
        for alias in aliases:
            figures += measure_year(alias, count)
            figures.append(measure_budget(alias, submitted, rounds))
        if "postgres" in aliases:
            figures.append(measure_together(stub, directory, together, rounds))
            drop_schema()
    show(figures, as_json=options.json)
    sys.exit(not all(figure.holds for figure in figures))


if __name__ == "__main__":
    main()
