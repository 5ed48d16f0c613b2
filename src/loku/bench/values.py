"""Values of a recipe's YAML, read or refused with two halves: mappings, lists, seeds, numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from loku.errors import InputError, suggestion
from loku.options import LARGEST_SEED

EXPONENT = re.compile(r"^[+-]?\d+(\.\d*)?e[+-]?\d+$", re.IGNORECASE)


def read_numbers(value: Any) -> Any:
    """Turn what YAML 1.1 reads as text, such as 5e-4, into the number it is, everywhere."""
    if isinstance(value, Mapping):
        return {name: read_numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [read_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and EXPONENT.match(value) else value


def read_mapping(value: Any, where: str, known: Sequence[str] = ()) -> dict[str, Any]:
    """Return a mapping. Raises InputError for anything else, and for entries that are not `known`, if any are."""
    if not isinstance(value, Mapping):
        raise InputError(f"{where} is no mapping.", "Write `name: value` lines there.")
    for name in value if known else ():
        if name not in known:
            raise InputError(f"{where} has the unknown entry '{name}'.", suggestion(str(name), known))
    return {str(name): item for name, item in value.items()}


def read_seeds(value: Any, where: str) -> tuple[int, ...]:
    """Return a list of different seeds as a tuple."""
    usable = isinstance(value, list) and value and all(type(s) is int and 0 <= s <= LARGEST_SEED for s in value)
    if not usable or len(set(value)) != len(value):
        raise InputError(f"{where} is {value!r}.", "Give a list of different whole numbers, such as [0, 1, 2, 3, 4].")
    return tuple(value)


def read_count(value: Any, where: str) -> int:
    """Return a whole number, 0 or more."""
    if type(value) is not int or value < 0:
        raise InputError(f"{where} is {value!r}.", "Give a whole number, 0 or more.")
    return value


def read_number(value: Any, where: str, most: float = math.inf) -> float:
    """Return a number above 0 and below `most`."""
    try:  # YAML reads 5e-4 as text
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < most:
        raise InputError(
            f"{where} is {value!r}.", f"Give a number above 0{'' if most == math.inf else ' and below 1'}."
        )
    return number


def read_list(value: Any, where: str) -> list[Any]:
    """Return a list that is not empty."""
    if not isinstance(value, list) or not value:
        raise InputError(f"{where} is {value!r}.", "Give a list of values.")
    return value
