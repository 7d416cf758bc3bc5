"""What every benchmark prints: ratios against a baseline of the same run."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass


@dataclass
class Figure:
    name: str
    value: float
    unit: str
    baseline: float
    ratio: float
    goal: str
    holds: bool


def at_least(
    name: str, value: float, baseline: float, goal: float, unit: str = "requests/s"
) -> Figure:
    """A rate that should be ``goal`` times the baseline's, or more."""
    ratio = value / baseline
    return Figure(name, value, unit, baseline, ratio, f">= {goal:g}x", ratio >= goal)


def no_more_than(name: str, value: float, baseline: float, goal: float, unit: str = "ms") -> Figure:
    """A time that should be ``goal`` times the baseline's, or less."""
    ratio = value / baseline
    return Figure(name, value, unit, baseline, ratio, f"<= {goal:g}x", ratio <= goal)


def at_most(name: str, value: float, goal: float, unit: str) -> Figure:
    """A count that should not exceed ``goal``, which is its own baseline."""
    return Figure(name, value, unit, goal, value / goal, f"<= {goal:g}", value <= goal)


def median(measure: Callable[[], float], rounds: int) -> float:
    return statistics.median(measure() for _ in range(rounds))


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="One object instead of the table.")
    parser.add_argument("--quick", action="store_true", help="Under a minute, with more noise.")
    return parser.parse_args()


def show(figures: list[Figure], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"figures": [asdict(figure) for figure in figures]}))
        return
    print(f"{'':<62} {'ratio':>9} {'goal':>9} {'holds':>6}   absolute, baseline")
    for f in figures:
        print(
            f"{f.name:<62} {f.ratio:>8.2f}x {f.goal:>9} {'yes' if f.holds else 'NO':>6}"
            f"   {_absolute(f.value)} {f.unit}, {_absolute(f.baseline)}"
        )


def _absolute(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.3g}"
