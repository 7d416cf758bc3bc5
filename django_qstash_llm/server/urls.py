"""Mount it anywhere: ``path("qstash/", include("django_qstash_llm.server.urls"))``.

No trailing slashes: the SDKs send none. A destination may hold anything, so its routes only look
at how the path begins.
"""

from __future__ import annotations

from django.urls import path, re_path

from . import views

app_name = "qstash_server"

urlpatterns = [
    re_path(r"^v2/publish/", views.PublishView.as_view(), name="publish"),
    re_path(r"^v2/enqueue/", views.EnqueueView.as_view(), name="enqueue"),
    path("v2/batch", views.BatchView.as_view(), name="batch"),
    path("v2/messages", views.MessagesView.as_view(), name="messages"),
    path("v2/messages/<str:message_id>", views.MessageView.as_view(), name="message"),
    path("v2/events", views.EventsView.as_view(), name="events"),
    path("v2/logs", views.LogsView.as_view(), name="logs"),
    path("v2/dlq", views.DeadLettersView.as_view(), name="dlq"),
    path("v2/dlq/retry", views.RetryDeadLettersView.as_view(), name="dlq-retry-many"),
    path("v2/dlq/retry/<str:dlq_id>", views.RetryDeadLetterView.as_view(), name="dlq-retry"),
    path("v2/dlq/<str:dlq_id>", views.DeadLetterView.as_view(), name="dead-letter"),
    path("v2/queues", views.QueuesView.as_view(), name="queues"),
    path("v2/queues/<str:name>", views.QueueView.as_view(), name="queue"),
    path("v2/queues/<str:name>/pause", views.PauseQueueView.as_view(), name="queue-pause"),
    path("v2/queues/<str:name>/resume", views.ResumeQueueView.as_view(), name="queue-resume"),
    path("v2/keys", views.KeysView.as_view(), name="keys"),
    path("v2/keys/rotate", views.RotateKeysView.as_view(), name="keys-rotate"),
    re_path(r"^v2(?:/|$)", views.UnknownView.as_view()),
]
