from __future__ import annotations

import argparse
from datetime import timedelta
from typing import Any

from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError
from django.db.models import Q
from django.utils import timezone

from ...models import ApiKey
from ...models.api_key import Scope, digest_of


class Command(BaseCommand):
    help = "Makes, lists and revokes the API keys of callers of the OpenAI-compatible endpoint."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        commands = parser.add_subparsers(dest="verb", required=True)
        create = commands.add_parser("create", help="Print a new key, this once.")
        create.add_argument("name", help="Who holds it, and what for.")
        create.add_argument("--user", default="", help="User name of whom it spends for.")
        create.add_argument("--tenant", default="")
        create.add_argument("--scope", action="append", choices=Scope.values, help="Default: all.")
        create.add_argument("--provider", default="", help="Who answers, unless a model says it.")
        create.add_argument(
            "--model",
            action="append",
            default=[],
            help="The only ones it may ask: model, provider/model or provider/*. May be repeated.",
        )
        create.add_argument("--per-minute", type=int, metavar="REQUESTS")
        create.add_argument("--expires", type=int, metavar="DAYS")
        commands.add_parser("list", help="List them.")
        revoke = commands.add_parser("revoke", help="Have a key believed no more.")
        revoke.add_argument("key", help="The key's beginning, as listed, or all of it.")

    def handle(self, *args: Any, verb: str, **options: Any) -> None:
        getattr(self, f"_{verb}")(options)

    def _create(self, options: dict[str, Any]) -> None:
        fields = {
            "user": _user(options["user"]),
            "tenant": options["tenant"],
            "provider": options["provider"],
            "allowed_models": options["model"],
            "requests_per_minute": options["per_minute"],
        }
        if options["scope"]:
            fields["scopes"] = options["scope"]
        if options["expires"] is not None:
            fields["expires_at"] = timezone.now() + timedelta(days=options["expires"])
        try:
            api_key, key = ApiKey.objects.issue(options["name"], **fields)
        except ValidationError as error:
            problems = [f"{name}: {' '.join(said)}" for name, said in error.message_dict.items()]
            raise CommandError("; ".join(problems)) from error
        # By itself, so that a script can take it.
        self.stdout.write(key)
        self.stderr.write(f"{api_key}: it is shown this once.")

    def _list(self, options: dict[str, Any]) -> None:
        now = timezone.now()
        for api_key in ApiKey.objects.select_related("user").order_by("pk"):
            state = "usable" if api_key.is_usable(now) else "unusable"
            if api_key.revoked_at:
                state = "revoked"
            used = api_key.last_used_at
            self.stdout.write(
                f"{api_key.prefix}  {state}  used {f'{used:%Y-%m-%d %H:%M}' if used else 'never'}  "
                f"{api_key.name}"
            )

    def _revoke(self, options: dict[str, Any]) -> None:
        beginning = options["key"].rstrip("…")
        is_it = Q(prefix__startswith=beginning) | Q(digest=digest_of(beginning))
        found = list(ApiKey.objects.filter(is_it)[:2]) if beginning else []
        if len(found) != 1:
            problem = "fits several keys" if found else "is the beginning of no key"
            # Not repeated: it may be a whole key.
            raise CommandError(f"What was given {problem}: see `llm_keys list`.")
        has_changed = found[0].revoke()
        self.stdout.write(f"{found[0]}: {'revoked' if has_changed else 'was revoked before'}.")


def _user(name: str) -> Any:
    if not name:
        return None
    model = get_user_model()
    try:
        return model._default_manager.get_by_natural_key(name)
    except model.DoesNotExist as error:
        raise CommandError(f"There is no user {name!r}.") from error
