from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import qstash

from django_qstash_llm.qstash import AsyncClient, Client

from .loopback import Behaviour, Request, answering, serving

TOKEN = "a-token-of-the-tests"


class Caller:
    """One of the two clients, so that what both must do is said once.

    ``caller.using(transport=...).publish(message)`` is a client's whole life.
    """

    def __init__(self, kind: type[Client] | type[AsyncClient]) -> None:
        self.kind = kind
        self.pauses: list[float] = []

    def using(self, **settings: Any) -> _Calls:
        return _Calls(self, settings)


class _Calls:
    def __init__(self, caller: Caller, settings: dict[str, Any]) -> None:
        self.caller = caller
        self.settings = settings

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if self.caller.kind is Client:
            return lambda *args, **kwargs: self.blocking(name, args, kwargs)
        return lambda *args, **kwargs: asyncio.run(self.awaited(name, args, kwargs))

    def blocking(self, name: str, args: Any, kwargs: Any) -> Any:
        with Client(TOKEN, sleep=self.caller.pauses.append, **self.settings) as client:
            return getattr(client, name)(*args, **kwargs)

    async def awaited(self, name: str, args: Any, kwargs: Any) -> Any:
        async def pause(seconds: float) -> None:
            self.caller.pauses.append(seconds)

        async with AsyncClient(TOKEN, sleep=pause, **self.settings) as client:
            return await getattr(client, name)(*args, **kwargs)


@pytest.fixture(params=[Client, AsyncClient])
def caller(request: pytest.FixtureRequest) -> Caller:
    return Caller(request.param)


class Referee:
    """The official SDK and our client, before a server that answers as it is told."""

    def __init__(self, server: Any, sdk: qstash.QStash, client: Client) -> None:
        self.server = server
        self.sdk = sdk
        self.client = client

    def ask_sdk(self, use: Callable[[Any], Any], behaviour: Behaviour) -> tuple[Any, Request]:
        """What the SDK made of the answer, and the request it had sent for it."""
        return self.ask(self.sdk, use, behaviour)

    def ask_us(self, use: Callable[[Any], Any], behaviour: Behaviour) -> tuple[Any, Request]:
        return self.ask(self.client, use, behaviour)

    def ask(self, who: Any, use: Callable[[Any], Any], behaviour: Behaviour) -> tuple[Any, Request]:
        self.server.requests.clear()
        self.server.behaviour = behaviour
        read = use(who)
        (request,) = self.server.requests
        return read, request


@pytest.fixture(scope="session")
def referee() -> Iterator[Referee]:
    with serving(answering()) as server, Client(TOKEN, base_url=server.url) as client:
        with pytest.MonkeyPatch.context() as patch:
            # It reads the environment's proxies, and they are not for 127.0.0.1.
            patch.setenv("NO_PROXY", "*")
            sdk = qstash.QStash(TOKEN, base_url=server.url, retry=False)
        yield Referee(server, sdk, client)
        sdk.http._client.close()
