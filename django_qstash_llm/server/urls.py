"""Mount it anywhere: ``path("qstash/", include("django_qstash_llm.server.urls"))``.

No trailing slashes: the SDKs send none. A destination may hold anything, so its routes only look
at how the path begins.
"""

from __future__ import annotations

from django.urls import path, re_path

from .views import (
    base,
    dead_letters,
    flow_control,
    gates,
    keys,
    logs,
    messages,
    openapi,
    publishing,
    queues,
    schedules,
    url_groups,
)

app_name = "qstash_server"

urlpatterns = [
    re_path(r"^v2/publish/", publishing.PublishView.as_view(), name="publish"),
    re_path(r"^v2/enqueue/", publishing.EnqueueView.as_view(), name="enqueue"),
    path("v2/batch", publishing.BatchView.as_view(), name="batch"),
    path("v2/messages", messages.MessagesView.as_view(), name="messages"),
    path("v2/messages/<str:message_id>", messages.MessageView.as_view(), name="message"),
    path("v2/events", logs.EventsView.as_view(), name="events"),
    path("v2/logs", logs.LogsView.as_view(), name="logs"),
    path("v2/dlq", dead_letters.DeadLettersView.as_view(), name="dlq"),
    path("v2/dlq/retry", dead_letters.RetryDeadLettersView.as_view(), name="dlq-retry-many"),
    path("v2/dlq/retry/<str:dlq_id>", dead_letters.RetryDeadLetterView.as_view(), name="dlq-retry"),
    path("v2/dlq/<str:dlq_id>", dead_letters.DeadLetterView.as_view(), name="dead-letter"),
    path("v2/queues", queues.QueuesView.as_view(), name="queues"),
    path("v2/queues/<str:name>", queues.QueueView.as_view(), name="queue"),
    path("v2/queues/<str:name>/pause", queues.PauseQueueView.as_view(), name="queue-pause"),
    path("v2/queues/<str:name>/resume", queues.ResumeQueueView.as_view(), name="queue-resume"),
    path("v2/flowControl", flow_control.FlowControlKeysView.as_view(), name="flow-control-keys"),
    path(
        "v2/flowControl/<str:key>", flow_control.FlowControlKeyView.as_view(), name="flow-control"
    ),
    path("v2/flowControl/<str:key>/pause", flow_control.PauseView.as_view()),
    path("v2/flowControl/<str:key>/resume", flow_control.ResumeView.as_view()),
    path("v2/flowControl/<str:key>/pin", flow_control.PinView.as_view()),
    path("v2/flowControl/<str:key>/unpin", flow_control.UnpinView.as_view()),
    path("v2/flowControl/<str:key>/resetRate", flow_control.ResetRateView.as_view()),
    path("v2/topics", url_groups.UrlGroupsView.as_view(), name="url-groups"),
    path("v2/topics/<str:name>", url_groups.UrlGroupView.as_view(), name="url-group"),
    path("v2/topics/<str:name>/endpoints", url_groups.EndpointsView.as_view(), name="endpoints"),
    path("v2/schedules", schedules.SchedulesView.as_view(), name="schedules"),
    # Before what takes anything; no destination looks like these.
    re_path(
        r"^v2/schedules/(?P<schedule_id>(?!https?:)[^/]+)/pause$",
        schedules.PauseScheduleView.as_view(),
        name="schedule-pause",
    ),
    re_path(
        r"^v2/schedules/(?P<schedule_id>(?!https?:)[^/]+)/resume$",
        schedules.ResumeScheduleView.as_view(),
        name="schedule-resume",
    ),
    re_path(r"^v2/schedules/", schedules.ScheduleView.as_view(), name="schedule"),
    path("v2/gates", gates.GatesView.as_view()),
    path("v2/gates/resume", gates.ResumeGatesView.as_view()),
    path("v2/globalParallelism", flow_control.GlobalParallelismView.as_view()),
    path("v2/keys", keys.KeysView.as_view(), name="keys"),
    path("v2/keys/rotate", keys.RotateKeysView.as_view(), name="keys-rotate"),
    path("openapi.json", openapi.OpenAPIView.as_view(), name="openapi"),
    re_path(r"^v2(?:/|$)", base.UnknownView.as_view()),
]
