"""A chart drawn by the server: bars by day or month, stacked. The same figures stand in a table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _

from ..models.ledger import Total
from . import figures

MOST_SERIES = 6
"""Told apart by colour; the others are one."""
MOST_BARS = 92
HEIGHT, WIDTH, GAP = 60, 8, 2
DECIMALS = 2
OTHERS = "\0"
"""No model's name."""


@dataclass(frozen=True)
class Chart:
    """``totals``: of each bar, by the name of what is stacked in it."""

    bars: Sequence[str]
    series: Sequence[str]
    """The dearest first."""
    totals: dict[tuple[str, str], Total]

    @classmethod
    def of(cls, lines: Sequence[tuple[str, str, Total]]) -> Chart:
        """``lines``: bar, series and what that came to, in the order of the bars."""
        spent: dict[str, Decimal] = defaultdict(Decimal)
        for _bar, name, total in lines:
            spent[name] += total.spent
        ranked = sorted(spent, key=lambda name: (-spent[name], name))
        shown = ranked if len(ranked) <= MOST_SERIES + 1 else [*ranked[:MOST_SERIES], OTHERS]
        totals: dict[tuple[str, str], Total] = defaultdict(Total)
        bars = list(dict.fromkeys(bar for bar, *_ in lines))[-MOST_BARS:]
        for bar, name, total in lines:
            if bar in bars:
                totals[bar, name if name in shown else OTHERS] += total
        return cls(bars, shown, dict(totals))

    @property
    def names(self) -> list[tuple[SafeString, str]]:
        """Each series' colour and name."""
        return [
            (_swatch(index), _("others") if name == OTHERS else name)
            for index, name in enumerate(self.series)
        ]

    @property
    def rows(self) -> list[tuple[str, list[SafeString | str], SafeString | str]]:
        """The table: bar, each of its series, and all of it."""
        return [
            (
                bar,
                [figures.total(total, decimals=DECIMALS) for total in self._parts(bar)],
                figures.total(sum(self._parts(bar), Total()), decimals=DECIMALS),
            )
            for bar in self.bars
        ]

    @property
    def highest(self) -> Decimal:
        return max((self._height(bar) for bar in self.bars), default=Decimal(0))

    def _height(self, bar: str) -> Decimal:
        # What is less than nothing, a difference that became known later, has no height.
        return sum((max(t.spent, Decimal(0)) for t in self._parts(bar)), Decimal(0))

    def _parts(self, bar: str) -> list[Total]:
        return [self.totals.get((bar, name), Total()) for name in self.series]

    @property
    def svg(self) -> SafeString:
        highest = self.highest
        width = max(len(self.bars) * (WIDTH + GAP), 1)
        pieces = []
        for place, bar in enumerate(self.bars):
            top = Decimal(HEIGHT)
            for index, total in enumerate(self._parts(bar)):
                height = HEIGHT * max(total.spent, Decimal(0)) / highest if highest else Decimal(0)
                if not height:
                    continue
                top -= height
                name = self.names[index][1]
                title = f"{bar} · {name}: {figures.money(total.spent)}"
                x = place * (WIDTH + GAP) + GAP // 2
                pieces.append((index, x, f"{top:.3f}", WIDTH, f"{height:.3f}", title))
        described = _("What was spent, %(first)s to %(last)s; the highest bar is %(highest)s.") % {
            "first": self.bars[0] if self.bars else figures.UNKNOWN,
            "last": self.bars[-1] if self.bars else figures.UNKNOWN,
            "highest": figures.money(highest),
        }
        return format_html(
            '<svg class="llm-chart" role="img" viewBox="0 0 {} {}" preserveAspectRatio="none">'
            "<title>{}</title>{}</svg>",
            width,
            HEIGHT,
            described,
            format_html_join(
                "",
                '<rect class="llm-series-{}" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>',
                pieces,
            ),
        )


def _swatch(index: int) -> SafeString:
    return format_html(
        '<svg class="llm-swatch" width="10" height="10" aria-hidden="true">'
        '<rect class="llm-series-{}" width="10" height="10"></rect></svg>',
        index,
    )
