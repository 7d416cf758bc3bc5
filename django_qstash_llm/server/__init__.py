"""The other side of the wire: a QStash that lives in a Django site, its database and its Celery.

Its own app, opt-in: ``"django_qstash_llm.server"`` in ``INSTALLED_APPS`` and
``path("qstash/", include("django_qstash_llm.server.urls"))``. It knows nothing of the rows of
``django_qstash_llm``, and nobody imports it.
"""

from __future__ import annotations
