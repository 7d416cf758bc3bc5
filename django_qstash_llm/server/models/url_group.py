from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from django.db import models, transaction

from ...qstash import InvalidOption
from ...qstash import Message as WireMessage
from ...qstash.options import NAME, canonical, check_header
from ...qstash.records import Endpoint as EndpointRecord
from ...qstash.records import UrlGroup as UrlGroupRecord
from .. import admission, redaction
from ..exceptions import Refusal
from .message import Admitted
from .queue import milliseconds

MOST_ENDPOINTS = 100
"""Of one URL group: each is a message whenever something is published to it."""


class UrlGroupQuerySet(models.QuerySet["UrlGroup"]):
    def owned_by(self, account: str) -> UrlGroupQuerySet:
        return self.filter(account=account)

    def with_endpoints(self) -> UrlGroupQuerySet:
        return self.prefetch_related("endpoints")

    def called(self, names: Iterable[str]) -> dict[str, UrlGroup]:
        """Those by these names, as far as there are any. A URL is nobody's name."""
        wanted = {name for name in names if NAME.fullmatch(name)}
        if not wanted:
            return {}
        rows = self.filter(name__in=wanted).with_endpoints()
        # One without endpoints is being deleted at this moment.
        return {group.name: group for group in rows if group.endpoints.all()}

    def put(
        self, name: str, endpoints: Sequence[EndpointRecord], *, account: str, now: datetime
    ) -> None:
        """Add these endpoints or change them, and make the group if there is none."""
        fresh = UrlGroup(account=account, name=name, created_at=now, updated_at=now)
        rows = self.filter(account=account, name=name)
        with transaction.atomic():
            # Changed, so held; until then somebody else may make it or delete it.
            while not rows.update(updated_at=now):
                self.bulk_create([fresh], ignore_conflicts=True)
            group = rows.get()
            for endpoint in endpoints:
                group.put(endpoint)
            if group.endpoints.count() > MOST_ENDPOINTS:
                raise Refusal(412, "quota maxEndpointsPerUrlGroup exceeded")


class UrlGroup(models.Model):
    """A name for several destinations: what is published to it goes to each. Never empty."""

    account = models.CharField(max_length=64, blank=True, default="", editable=False)
    name = models.CharField(max_length=256)
    headers = models.JSONField(default=dict, blank=True)
    """What a publish that does not say otherwise says, with ``REDACTED`` for values that hold
    keys."""
    secrets = models.JSONField(default=dict, blank=True, editable=False)
    """Those values."""
    created_at = models.DateTimeField()
    updated_at = models.DateTimeField()

    objects = UrlGroupQuerySet.as_manager()

    class Meta:
        ordering = ["name"]
        verbose_name = "URL group"
        constraints = [
            models.UniqueConstraint(fields=["account", "name"], name="qstash_server_url_group")
        ]

    def __str__(self) -> str:
        return self.name

    # --- publishing --------------------------------------------------------------------------

    @property
    def default_headers(self) -> dict[str, str]:
        """Under lower-case names."""
        return {name.lower(): value for name, value in {**self.headers, **self.secrets}.items()}

    def addressed(self, message: WireMessage) -> list[Admitted]:
        return [
            Admitted(replace(message, destination=endpoint.url), self.name, endpoint.name)
            for endpoint in self.endpoints.all()
        ]

    # --- what it is set to -------------------------------------------------------------------

    def hold(self, *, now: datetime) -> bool:
        """Let nobody else change it until the transaction ends. False when it is no more."""
        return UrlGroup.objects.filter(pk=self.pk).update(updated_at=now) > 0

    def put(self, endpoint: EndpointRecord) -> None:
        """Its name says which one it is, or else its URL. With the group held."""
        url, name = endpoint
        named = self.endpoints.filter(name=name).first() if name else None
        if named is not None:
            self.endpoints.filter(url=url).exclude(pk=named.pk).delete()
            self.endpoints.filter(pk=named.pk).update(url=url)
        elif not self.endpoints.filter(url=url).exists():
            self.endpoints.create(url=url, name=name)
        elif name:
            self.endpoints.filter(url=url).update(name=name)

    def discard(self, *, now: datetime) -> None:
        """Delete it with its endpoints. What was published to it goes on."""
        with transaction.atomic():
            # An endpoint that is added meanwhile would be left behind.
            if self.hold(now=now):
                self.delete()

    def discard_endpoints(self, endpoints: Sequence[EndpointRecord], *, now: datetime) -> None:
        """Without its last endpoint the group is gone as well."""
        with transaction.atomic():
            if not self.hold(now=now):
                return
            for url, name in endpoints:
                found = self.endpoints.filter(name=name) if name else self.endpoints.filter(url=url)
                found.delete()
            if not self.endpoints.exists():
                self.delete()

    def set_headers(self, headers: Mapping[str, str | list[str]], *, now: datetime) -> None:
        """In place of those it had. Refused is what could not be read when it is needed."""
        item = {"destination": "https://endpoint.invalid/", "headers": headers}
        admission.check(WireMessage.from_batch_item(item), now=now)
        flat = {
            canonical(name): value if isinstance(value, str) else ", ".join(value)
            for name, value in headers.items()
        }
        for name, value in flat.items():
            check_header(name, value)
            if not name.startswith("Upstash-") and name != "Content-Type":
                raise InvalidOption(name, f"forwarded as it is? Write Upstash-Forward-{name}")
        self.headers, self.secrets = redaction.parted(flat)
        UrlGroup.objects.filter(pk=self.pk).update(
            headers=self.headers, secrets=self.secrets, updated_at=now
        )

    def to_record(self) -> UrlGroupRecord:
        return UrlGroupRecord(
            name=self.name,
            created_at=milliseconds(self.created_at),
            updated_at=milliseconds(self.updated_at),
            endpoints=tuple(EndpointRecord(each.url, each.name) for each in self.endpoints.all()),
        )


class Endpoint(models.Model):
    """One of a URL group's destinations. Both its URL and its name are there once in the group,
    which is held while they change: a URL is too long for an index."""

    group = models.ForeignKey(UrlGroup, models.CASCADE, related_name="endpoints")
    url = models.TextField()
    name = models.CharField(max_length=256, blank=True)

    class Meta:
        ordering = ["pk"]

    def __str__(self) -> str:
        return self.name or self.url


def admit(message: WireMessage, group: UrlGroup | None, *, now: datetime) -> list[Admitted]:
    """The message, or one for each of the group's endpoints. Raises ``InvalidOption`` or
    ``Refusal`` when one of them is not taken."""
    admitted = group.addressed(message) if group else [Admitted(message)]
    for each in admitted:
        admission.check(each.message, now=now)
    return admitted
