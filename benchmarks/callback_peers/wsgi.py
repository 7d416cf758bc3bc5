"""What gunicorn serves: the contender's site, or the bare function."""

from __future__ import annotations

from benchmarks.callback_site import BELLS, BROKER, CONTENDER

if CONTENDER == "bare":
    from .bare import application
else:
    from celery import Celery
    from django.core.wsgi import get_wsgi_application

    # Where the doorbell of our callbacks rings. Nobody hears it.
    celery = Celery("benchmark", broker=BROKER)
    celery.conf.update(task_default_queue=BELLS)
    celery.set_default()
    application = get_wsgi_application()

if CONTENDER == "telling":
    from django_qstash_llm.signals import request_completed

    def listen(**_: object) -> None:
        """Never called here: a worker would."""

    request_completed.connect(listen)

__all__ = ["application"]
