"""Types of Config's fields that carry the range of their values, so that a new field is one line: `momentum:
Fraction = 0.9`."""

import math
import typing
from collections.abc import Callable
from typing import Annotated, NamedTuple

from errors import UserError


class Range(NamedTuple):
    """What a value must be, in words and as a question."""

    text: str
    holds: Callable[[typing.Any], bool]


ABOVE_0 = Range("must be above 0", lambda value: value > 0)
NOT_NEGATIVE = Range("must not be negative", lambda value: value >= 0)

PositiveInt = Annotated[int, ABOVE_0]
PositiveFloat = Annotated[float, ABOVE_0]
NonNegativeInt = Annotated[int, NOT_NEGATIVE]
NonNegativeFloat = Annotated[float, NOT_NEGATIVE]
Fraction = Annotated[float, Range("must be in [0, 1)", lambda value: 0 <= value < 1)]
PowerOfTwo = Annotated[
    int, Range("must be a power of two", lambda value: value > 0 and value.bit_count() == 1)
]


def check_ranges(values: object) -> None:
    """Hold every field of a dataclass instance to the range in its type. Raises UserError for the first that
    is outside."""
    for name, hint in typing.get_type_hints(type(values), include_extras=True).items():
        value = getattr(values, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} must be a finite number, not {value}")
        optional = type(None) in typing.get_args(hint)
        if optional and value is None:
            continue
        for kind in (hint, *typing.get_args(hint)):  # PositiveInt, or the PositiveInt in PositiveInt | None
            for allowed in getattr(kind, "__metadata__", ()):
                if isinstance(allowed, Range) and not allowed.holds(value):
                    or_none = " or None" if optional else ""
                    raise UserError(f"{name} {allowed.text}{or_none}, not {value!r}")
