"""What an option is: a dataclass field with help, bounds and source, and checks of the values given. Needs no torch."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Self

from loku.errors import InputError, suggestion

LARGEST_SEED = 2**32 - 1  # numpy takes no larger one


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    source: str | None = None,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    special: float | None = None,
) -> Any:
    """Define an option: default, help text, valid names or bounds, and where the default is from.

    `least` and `most` are themselves valid, `above` and `below` are not; `special` is one more value, outside the
    bounds, that has a meaning of its own.
    """
    bounds = {"least": least, "most": most, "above": above, "below": below, "special": special}
    return field(default=default, metadata={"help": help, "choices": choices, "source": source} | bounds)


def seed_option(default: int, help: str, **more: Any) -> Any:
    """Define an option that holds a seed."""
    return option(default, help, least=0, most=LARGEST_SEED, **more)


def pairs(help: str) -> Any:
    """Define an option that holds name=value pairs: a mapping in YAML, comma-separated on the command line."""
    return field(default_factory=dict, metadata={"help": help, "choices": None, "source": None, "least": None})


def several(help: str, count: int | None = None) -> Any:
    """Define an option that takes several values: a list in YAML, separated by blanks on the command line."""
    return field(default_factory=list, metadata={"help": help, "choices": None, "source": None, "count": count})


class Options:
    """What all option sets share: building from mappings with checks, and listing."""

    @classmethod
    def fields(cls) -> dict[str, dataclasses.Field[Any]]:
        """Return the options by name."""
        return {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]

    resolved = False  # whether `config.resolve` put the method's settings in; without annotation it is no option itself

    @classmethod
    def from_mapping(cls, values: dict[str, Any], *, where: str) -> Self:
        """Build the options from a mapping, refusing unknown names and values of the wrong type.

        `where` says where the mapping came from ("recipe.yaml"), for the error.
        """
        hints = typing.get_type_hints(cls)
        for name, value in values.items():
            if name not in hints:
                raise InputError(f"{where} has the unknown option '{name}'.", suggestion(name, hints))
            values[name] = _checked(name, value, hints[name], where)
        options = cls(**values)
        options.check()
        return options

    def check(self) -> None:
        """Raise InputError for values that no run can use."""
        for name, f in self.fields().items():
            value = getattr(self, name)
            choices = f.metadata.get("choices")
            if choices and value is not None and value not in choices:
                raise InputError(f"{flag(name)} '{value}' is not known.", suggestion(str(value), choices))
            count = f.metadata.get("count")
            if count is not None and value and len(value) != count:
                raise InputError(f"{flag(name)} got {len(value)} values.", f"Give {count}.")
            if isinstance(value, int | float) and not isinstance(value, bool):
                _check_number(name, value, f.metadata)

    def as_dict(self) -> dict[str, Any]:
        """Return all options with their values, in the order of their definition."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]


def flag(name: str) -> str:
    """Return an option's name on the command line."""
    return "--" + name.replace("_", "-")


def _parse_pairs(name: str, text: str) -> dict[str, Any]:
    """Read `beta=0.2,skip_first=false`."""
    import yaml

    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"{flag(name)} has '{part}', which is no pair.", "Write name=value, separated by commas.")
        found[key.strip()] = _number(yaml.safe_load(value))
    return found


def _plain(value: Any) -> Any:
    """Return a number of numpy's as Python's own: YAML, where settings are kept, knows no other."""
    is_number = type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0
    return value.item() if is_number else value


def _number(value: Any) -> Any:
    """Return what YAML 1.1 reads as text, such as 1e-4, as the number that it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _check_number(name: str, value: float, bounds: Mapping[str, Any]) -> None:
    """Raise InputError for a number that is not finite or out of an option's bounds."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{flag(name)} {value} is not a finite number.", "Give a finite number.")
    least, most, above, below, special = (bounds.get(key) for key in ("least", "most", "above", "below", "special"))
    if special is not None and value == special:
        return
    other = "" if special is None else f", or {special}"
    if least is not None and value < least:
        raise InputError(f"{flag(name)} {value} is too small.", f"Give at least {least}{other}.")
    if above is not None and value <= above:
        raise InputError(f"{flag(name)} {value} is too small.", f"Give more than {above}{other}.")
    if most is not None and value > most:
        raise InputError(f"{flag(name)} {value} is too large.", f"Give at most {most}{other}.")
    if below is not None and value >= below:
        raise InputError(f"{flag(name)} {value} is too large.", f"Give less than {below}{other}.")


def _checked(name: str, value: Any, hint: Any, where: str) -> Any:
    if typing.get_origin(hint) is dict and isinstance(value, str):
        return _parse_pairs(name, value)
    if typing.get_origin(hint) is dict and isinstance(value, Mapping):
        return {key: _number(_plain(item)) for key, item in value.items()}
    value = _plain(value)
    accepted = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in accepted and isinstance(value, int | str) and not isinstance(value, bool):
        try:  # YAML reads 1e-4 as a string
            return float(value)
        except (ValueError, OverflowError):
            pass
    if (int in accepted and isinstance(value, bool)) or not isinstance(
        value, tuple(typing.get_origin(a) or a for a in accepted)
    ):
        names = " or ".join("nothing" if a is type(None) else getattr(a, "__name__", str(a)) for a in accepted)
        raise InputError(f"{where} gives {value!r} for '{name}'.", f"'{name}' takes {names}.")
    return value
