"""The Celery application of ``benchmarks/server.py``: deliveries, and a task to compare with."""

from __future__ import annotations

import os
import uuid

from celery import Celery

BELL, ROWS = (f"qstash-benchmark-{name}" for name in ("bell", "rows"))

app = Celery("benchmark", broker=os.environ.get("TEST_REDIS_URL", "redis://127.0.0.1:6379/9"))
app.config_from_object("django.conf:settings", namespace="CELERY")
app.conf.update(
    task_default_queue=BELL,
    task_routes={"benchmark.write_one_row": {"queue": ROWS}},
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
)
app.autodiscover_tasks(["django_qstash_llm.server"])
app.set_default()


@app.task(name="benchmark.write_one_row", ignore_result=True)
def write_one_row() -> None:
    """Empty, but for one row."""
    from django.utils import timezone

    from django_qstash_llm.server.models import Deduplication

    Deduplication.objects.create(
        key=uuid.uuid4().hex, message_id="written", expires_at=timezone.now()
    )
