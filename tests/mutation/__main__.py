"""The mutation score: how many small faults, put into the code one at a time, the tests notice.

``python -m tests.mutation [signing|verbs|cleaning …] [--keep FOLDER]`` works on a copy of the
tree, so that nothing here is changed, with mutmut 3 (``pip install "mutmut>=3.8,<4"``), one mutant at
a time. Prints for each module what was killed and what survived, and ends with 1 below 90 %.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEAST = 90.0
VERBS = (
    *("after_attempt", "after_trouble", "after_completion", "after_failure", "after_spending"),
    *("write", "fail", "cancel", "resubmit", "_finished"),
)


@dataclass(frozen=True)
class Target:
    """A module, the functions of it that are mutated, and the tests that have to notice."""

    name: str
    module: str
    functions: tuple[str, ...]
    tests: tuple[str, ...]

    @property
    def path(self) -> str:
        return f"{self.module.replace('.', '/')}.py"

    @property
    def patterns(self) -> list[str]:
        """As mutmut names its mutants: functions with x_, methods with their class."""
        return [f"{self.module}.{function}__mutmut_*" for function in self.functions]

    def has(self, mutant: str) -> bool:
        return any(fnmatch(mutant, pattern) for pattern in self.patterns)


def method(cls: str, name: str) -> str:
    return f"xǁ{cls}ǁ{name}"


TARGETS = (
    Target(
        "signing",
        "django_qstash_llm.qstash.signing",
        ("*",),
        ("tests/qstash/test_signing.py", "tests/qstash/test_signing_edges.py"),
    ),
    Target(
        "verbs",
        "django_qstash_llm.models.request",
        (
            *(method("LLMRequest", name) for name in VERBS),
            method("LLMRequestQuerySet", "lock"),
            method("OverTheWire", "next_deadline"),
            *("x__is_at_first", "x__spending"),
        ),
        ("tests/models/test_verbs.py",),
    ),
    Target("cleaning", "django_qstash_llm.cleaning", ("*",), ("tests/test_cleaning.py",)),
)

_LOCKED = "SQLite locks no rows; on PostgreSQL test_verbs sees it"
# Why a mutant may survive: (name of the target, the line as it was changed) -> reason. It counts as
# survived all the same.
EXPLAINED = {
    (
        "signing",
        """return f"{_HS256}.{payload}.{_base64url(hmac.digest(key.encode(), signed, 'SHA256'))}\"""",
    ): "the same algorithm: its name is read in any case",
    (
        "signing",
        'return base64.urlsafe_b64encode(data).rstrip(b"XX=XX").decode()',
    ): "equivalent: neither a JSON object nor a SHA-256 ends in X in base64",
    (
        "signing",
        "likeness = SequenceMatcher(None, signed_for[:1001], url).ratio()",
    ): "a bound on time, of which one character more or less is no other",
    (
        "verbs",
        'changes = {"submitted_at": receipt.received_at, "submit_after": None}',
    ): "equivalent: nothing is in it before",
    **{
        (
            "cleaning",
            f'text = text.encode("{one}", "surrogatepass").decode("{other}", "replace")',
        ): ("the same encoding: its name is read in any case")
        for one, other in (("UTF-16", "utf-16"), ("utf-16", "UTF-16"))
    },
    (
        "cleaning",
        "return text if (limit is None) and False else text[:limit]",
    ): "equivalent: text[:None] is the text",
    **{
        ("verbs", f"original = rows.select_for_update(of={of}).get(pk=self.pk)"): _LOCKED
        for of in ("None", '("XXselfXX",)', '("SELF",)')
    },
}


def configuration(targets: Sequence[Target]) -> str:
    def listed(texts: Sequence[str]) -> str:
        return "[" + ", ".join(f'"{text}"' for text in texts) + "]"

    options = ["-p", "tests.mutation.plugin", "-p", "no:randomly", "-p", "no:cacheprovider"]
    # The tables are made once; each mutant meets them as the one before left them, empty.
    options += ["--nomigrations", "--reuse-db", "-o", "timeout=60"]
    tests = [test for target in targets for test in target.tests]
    return f"""
[tool.mutmut]
source_paths = ["django_qstash_llm"]
only_mutate = {listed([target.path for target in targets])}
also_copy = ["testproject", "README.md"]
pytest_add_cli_args = {listed(options)}
pytest_add_cli_args_test_selection = {listed(tests)}
"""


def copy_tree(copy: Path, targets: Sequence[Target]) -> None:
    for name in ("django_qstash_llm", "testproject", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.sqlite3*", "locale")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    shutil.copy(ROOT / "README.md", copy / "README.md")
    settings = (ROOT / "pyproject.toml").read_text()
    (copy / "pyproject.toml").write_text(settings + configuration(targets))


class Mutmut:
    """mutmut, at work in a copy of the tree."""

    def __init__(self, copy: Path) -> None:
        self.copy = copy
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "DATABASE_URL"},
            "TEST_DIRECTORY": str(copy),
            "TEST_DATABASE_NAME": str(copy / "mutants.sqlite3"),
            "PYTHONPATH": ".",
        }

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "mutmut", *arguments],
            cwd=self.copy,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"mutmut {arguments[0]} failed:\n{done.stdout[-4000:]}")
        return done.stdout

    def run(self, targets: Sequence[Target]) -> None:
        patterns = [pattern for target in targets for pattern in target.patterns]
        self("run", "--max-children", "1", *patterns)

    def results(self) -> dict[str, str]:
        """Each mutant's name, and what became of it."""
        lines = self("results", "--all", "true").splitlines()
        pairs = (line.strip().rpartition(": ") for line in lines if "__mutmut_" in line)
        return {name: result for name, _, result in pairs}

    def changed_lines(self, mutant: str) -> Iterator[str]:
        for line in self("show", mutant).splitlines():
            if line[:1] in "+-" and line[:3] not in ("+++", "---"):
                yield line


KILLED = {"killed", "timeout", "segfault", "caught by type check"}


def report(mutmut: Mutmut, targets: Sequence[Target], *, with_list: bool) -> bool:
    """Print the score of each target. Whether each is high enough."""
    results = mutmut.results()
    is_enough = True
    for target in targets:
        own = {name: result for name, result in results.items() if target.has(name)}
        counts = Counter(own.values())
        killed = sum(counts[result] for result in KILLED)
        score = 100.0 * killed / len(own) if own else 0.0
        is_enough &= score >= LEAST
        print(f"{target.path}: {killed} of {len(own)} killed, {score:.1f} % {dict(counts)}")
        for name, result in own.items():
            if result not in KILLED and with_list:
                show(mutmut, target, name, result)
    return is_enough


def show(mutmut: Mutmut, target: Target, mutant: str, result: str) -> None:
    lines = list(mutmut.changed_lines(mutant))
    added = next((line[1:].strip() for line in lines if line.startswith("+")), "")
    reason = EXPLAINED.get((target.name, added), "")
    print(f"  {mutant.rpartition('.')[2]}: {result}{f' ({reason})' if reason else ''}")
    for line in lines:
        print(f"    {line}")


def main(arguments: Sequence[str]) -> int:
    names = [target.name for target in TARGETS]
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("targets", nargs="*", help=f"any of {', '.join(names)}; all without")
    parser.add_argument("--keep", metavar="FOLDER", help="work here, and leave it there")
    parser.add_argument("--no-list", action="store_true", help="do not list the survivors")
    options = parser.parse_args(arguments)
    if unknown := set(options.targets) - set(names):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(names)}")
    targets = [each for each in TARGETS if each.name in (options.targets or names)]
    with tempfile.TemporaryDirectory(dir=os.environ.get("TEST_DIRECTORY")) as temporary:
        copy = Path(options.keep or temporary)
        if not (copy / "pyproject.toml").exists():
            copy_tree(copy, targets)
        mutmut = Mutmut(copy)
        mutmut.run(targets)
        return 0 if report(mutmut, targets, with_list=not options.no_list) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
