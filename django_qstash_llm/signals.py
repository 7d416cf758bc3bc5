"""What our app tells. Sent after commit, from Celery; ``sender`` is ``LLMRequest``."""

from __future__ import annotations

from django.dispatch import Signal

# QStash took it. Arguments: llm_request. Sent once its id is written, and not again after a crash.
request_submitted = Signal()

# One attempt at the provider is known, whatever it came to. Arguments: llm_request, attempt (its
# CallbackResponse). In one transaction with the mark that it was sent. Connect it in every process,
# as in AppConfig.ready(): attempts that succeed are announced where the callback's process knows of
# somebody who listens.
request_attempted = Signal()

# The answer is there. Arguments: llm_request. In one transaction with the mark that it was sent.
request_completed = Signal()

# No answer will come. Arguments: llm_request. In one transaction with the mark that it was sent.
request_failed = Signal()

# A threshold of a budget is reached. ``sender`` is ``Budget``. Arguments: budget, alert (threshold in
# percent, spent and amount in USD). Sent once for each period, from Celery.
budget_threshold_reached = Signal()
