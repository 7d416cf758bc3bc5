"""Who may import whom: the walls of the house, read off the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import django_qstash_llm

PACKAGE = "django_qstash_llm"
HOUSE = Path(django_qstash_llm.__file__).parent
ROOMS = sorted(file.relative_to(HOUSE).as_posix() for file in HOUSE.rglob("*.py"))
DOORS = ("admin", "apps", "browser", "checks", "management", "openai", "testing", "urls", "views")
FRAMEWORKS = ("celery", "django", "environ", "kombu", "rest_framework")
HTTPX_ROOMS = {"chat.py", "qstash/client.py", "server/delivery/http.py"}


def imports(room: str) -> set[str]:
    """The full names of all that a room imports, wherever in it: ``a.b`` and, from it, ``a.b.c``."""
    names: set[str] = set()
    folder = [PACKAGE, *Path(room).parent.parts]
    for node in ast.walk(ast.parse((HOUSE / room).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = folder[: len(folder) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def under(names: set[str], *roots: str) -> set[str]:
    return {name for name in names if any(f"{name}.".startswith(f"{root}.") for root in roots)}


def ours(*rooms: str) -> list[str]:
    return [f"{PACKAGE}.{room}" for room in rooms]


@pytest.mark.parametrize("room", [room for room in ROOMS if room.startswith("qstash/")])
def test_the_protocol_knows_no_framework_and_nothing_of_the_app(room: str) -> None:
    assert under(imports(room), *FRAMEWORKS) == set()
    assert under(imports(room), PACKAGE) == under(imports(room), *ours("qstash"))


@pytest.mark.parametrize("room", [room for room in ROOMS if not room.startswith("server/")])
def test_nobody_imports_the_server(room: str) -> None:
    assert under(imports(room), *ours("server")) == set()


@pytest.mark.parametrize("room", [room for room in ROOMS if room.startswith("server/")])
def test_the_server_knows_none_of_our_rows(room: str) -> None:
    rooms = ours("chat", "completions", "models", "pricing", "signals", "tasks", "triggers")
    assert under(imports(room), *rooms) == set()


@pytest.mark.parametrize("room", ROOMS)
def test_doors_are_imported_by_nobody(room: str) -> None:
    """A door may use its own rooms: urls its views, apps its checks, the admin its pages."""
    own = {
        "apps.py": ours("checks"),
        "urls.py": ours("views"),
        "templatetags/llm_conversation.py": ours("browser"),
    }.get(room, ours(*[door for door in DOORS if room.startswith(f"{door}/")]))
    assert under(imports(room), *ours(*DOORS)) - under(imports(room), *own) == set()


@pytest.mark.parametrize("room", [room for room in ROOMS if room not in HTTPX_ROOMS])
def test_httpx_is_named_in_few_rooms(room: str) -> None:
    assert under(imports(room), "httpx") == set()


@pytest.mark.parametrize("room", ["conf.py", "exceptions.py", "cleaning.py", "limits.py"])
def test_the_ground_floor_rests_on_the_protocol_only(room: str) -> None:
    allowed = ours("qstash", "exceptions", "cleaning")
    assert under(imports(room), PACKAGE) - under(imports(room), *allowed) <= {PACKAGE}


@pytest.mark.parametrize("room", ["cleaning.py", "limits.py"])
def test_what_both_sides_of_the_wire_read_with_knows_no_framework(room: str) -> None:
    assert under(imports(room), *FRAMEWORKS) == set()


@pytest.mark.parametrize("room", [room for room in ROOMS if room.startswith("models/")])
def test_rows_look_up_in_few_places_only(room: str) -> None:
    above = under(imports(room), *ours("tasks", "triggers", "chat"))
    stairs = {
        "models/doorbell.py": "tasks",
        "models/request.py": "chat",
        "models/conversation.py": "chat",
    }
    assert above == under(above, *ours(stairs[room])) if room in stairs else above == set()


def test_importing_the_package_reads_no_settings() -> None:
    """The walls would be of little use if the door were nailed shut without a configured Django."""
    import subprocess
    import sys

    code = f"import {PACKAGE}.qstash, {PACKAGE}.exceptions, {PACKAGE}.cleaning, {PACKAGE}.conf"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"")


def test_protocol_imports_without_django_installed() -> None:
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['django'] = sys.modules['rest_framework'] = None; "
        f"sys.path.insert(0, {str(HOUSE)!r}); import qstash"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"")
