"""`ConfigError`, which names a field, its value and what to do, and the conversion of plain JSON to dataclasses."""

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any, Literal


class ConfigError(ValueError):
    """An invalid value, in one line: `ConfigError("top_k", 9, "use at most 8 …")` is "top_k = 9: use at most 8 …"."""

    def __init__(self, field: str, value: Any, message: str):
        super().__init__(f"{field} = {value!r}: {message}")
        self.field, self.value, self.message = field, value, message


def require(ok: bool, field: str, value: Any, message: str) -> None:
    """Raise `ConfigError` unless `ok`."""
    if not ok:
        raise ConfigError(field, value, message)


def require_each(config: Any, section: str, names: str, ok: Callable[[Any], bool], message: str) -> None:
    """Raise `ConfigError` for the first of the fields `names` (separated by spaces) of a section whose value is not
    `ok`. None passes."""
    for name in names.split():
        value = getattr(config, name)
        require(value is None or ok(value), f"{section}.{name}", value, message)


def structure(cls: Any, value: Any, field: str) -> Any:
    """Convert plain JSON `value` to `cls`: a (nested) dataclass, tuple, Literal, union or scalar.

    Raises `ConfigError` with the dotted name of the field, which starts with `field`, if `value` does not fit.
    """
    origin, arguments = typing.get_origin(cls), typing.get_args(cls)
    if dataclasses.is_dataclass(cls):
        require(isinstance(value, dict), field, value, f"an object with the fields of {cls.__name__}")
        hints = typing.get_type_hints(cls)
        known = {f.name: f for f in dataclasses.fields(cls)}
        for name in value:
            require(name in known, f"{field}.{name}", value[name], f"no such field; there are {', '.join(known)}")
        for name, f in known.items():
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            require(name in value or not required, f"{field}.{name}", None, "is required")
        return cls(**{name: structure(hints[name], v, f"{field}.{name}") for name, v in value.items()})
    if origin is tuple:
        require(isinstance(value, list | tuple), field, value, "a list")
        return tuple(structure(arguments[0], v, f"{field}[{i}]") for i, v in enumerate(value))
    if origin is Literal:
        require(value in arguments, field, value, f"one of {', '.join(map(repr, arguments))}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return structure(next(a for a in arguments if a is not type(None)), value, field)
    if cls is float and type(value) is int and abs(value) < 1 << 63:
        return float(value)
    require(type(value) is cls and value == value, field, value, f"must be of type {cls.__name__}")  # no NaN
    return value
