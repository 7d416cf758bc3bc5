"""What our app tells. Sent after commit, from Celery; ``sender`` is ``LLMRequest``."""

from __future__ import annotations

from django.dispatch import Signal

# QStash took it. Arguments: llm_request. Sent once its id is written, and not again after a crash.
request_submitted = Signal()

# The answer is there. Arguments: llm_request. In one transaction with the mark that it was sent.
request_completed = Signal()

# No answer will come. Arguments: llm_request. In one transaction with the mark that it was sent.
request_failed = Signal()
