"""What is installed is complete."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata, resources

import pytest
from django.core.management import call_command

PACKAGE = resources.files("django_qstash_llm")


@pytest.mark.parametrize(
    "path",
    [
        "py.typed",
        "migrations/0001_initial.py",
        "server/migrations/0001_initial.py",
        "management/commands/llm_sweep.py",
        "server/management/commands/qstash_server.py",
    ],
)
def test_the_package_has(path: str) -> None:
    assert PACKAGE.joinpath(path).is_file()


def test_every_template_and_static_file_is_installed() -> None:
    for folder, ending in [("templates", ".html"), ("static", ".css"), ("static", ".js")]:
        names = [str(path) for path in PACKAGE.joinpath(folder).rglob(f"*{ending}")]
        assert names, folder


@pytest.mark.django_db
def test_no_migration_is_missing() -> None:
    call_command("makemigrations", "--check", "--dry-run", verbosity=0)


def test_the_version_is_the_distribution_s() -> None:
    import django_qstash_llm

    try:
        assert django_qstash_llm.__version__ == metadata.version("django-qstash-llm")
    except metadata.PackageNotFoundError:
        assert django_qstash_llm.__version__ == "0+source"


def test_importing_the_package_reads_no_settings_and_opens_nothing() -> None:
    code = (
        "import django_qstash_llm, django_qstash_llm.qstash, sys;"
        "assert not [m for m in sys.modules if m.split('.')[0] in {'django', 'celery', 'openai'}]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
