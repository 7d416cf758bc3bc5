"""``USDField``: money in a column, exact, and exact when it is summed."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from django import forms
from django.core.exceptions import ValidationError
from django.db import models
from django.utils import formats
from django.utils.translation import gettext_lazy as _

if TYPE_CHECKING:
    # To Python it is one; only its column is a whole number.
    Whole = models.DecimalField[Any, Decimal]
else:
    Whole = models.BigIntegerField

DIGITS = 12
"""Behind the point. A token of a cheap model costs some 1e-8 USD, cached a tenth of that."""
STEP = Decimal(1).scaleb(-DIGITS)
MOST = Decimal(9_000_000)
"""USD that a column holds: a whole number of 64 bits counts no further."""


class USDField(Whole):
    """USD as a whole number of 1e-12 USD; ``Decimal`` in Python.

    SQLite keeps decimals as floating-point numbers, and their sums differ from what was summed. Whole
    numbers are added exactly on every database. On SQLite a sum beyond nine million USD raises
    "integer overflow"; PostgreSQL's sums have no such end.
    """

    description = _("US dollars")

    def from_db_value(self, value: Any, expression: Any, connection: Any) -> Decimal | None:
        return None if value is None else Decimal(int(value)).scaleb(-DIGITS)

    def to_python(self, value: Any) -> Decimal | None:
        if value is None or isinstance(value, Decimal):
            return value
        try:
            return Decimal(str(value))
        except InvalidOperation as error:
            raise ValidationError(_("Give an amount in US dollars, as in 0.25.")) from error

    def get_prep_value(self, value: Any) -> Any:
        if value is None or hasattr(value, "resolve_expression"):
            return value
        return units(value if isinstance(value, Decimal) else Decimal(str(value)))

    def value_to_string(self, obj: models.Model) -> str:
        value = self.value_from_object(obj)
        return "" if value is None else str(value)

    # Those of a whole number would be in 1e-12 USD.
    validators: list[Any] = []

    def formfield(self, **kwargs: Any) -> Any:
        return models.Field.formfield(
            self, **{"form_class": forms.DecimalField, "max_value": MOST, **kwargs}
        )


def in_words(amount: Decimal, *, decimals: int = 6) -> str:
    """``$0.0123``, as the active language writes numbers."""
    smallest = Decimal(1).scaleb(-decimals)
    if 0 < amount < smallest:
        return f"< ${formats.number_format(smallest, decimal_pos=decimals)}"
    amount = amount.quantize(smallest)  # formatting cuts, and does not round
    # A whole cent is the least that money is written in, and the zeros after it say nothing.
    shown = max(2, -int(amount.normalize().as_tuple().exponent))
    number = formats.number_format(abs(amount), decimal_pos=shown, force_grouping=True)
    return f"−${number}" if amount < 0 else f"${number}"


def units(amount: Decimal) -> int:
    """``amount`` of USD in steps of the column."""
    return int(amount.scaleb(DIGITS).to_integral_value())


def usd(amount: Decimal) -> models.Value:
    """``amount`` as part of an expression over a ``USDField``."""
    return models.Value(amount, output_field=USDField())


def dollars(amount: Decimal) -> str:
    """``amount`` of USD in words: whole cents as such, and of less all there is."""
    cents = amount.quantize(Decimal("0.01"))
    return f"${cents if amount == cents else amount.normalize():,f}"
