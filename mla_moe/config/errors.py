"""`ConfigError`, which names a field, its value and what to do, and the conversion of plain JSON to dataclasses."""

import dataclasses
import functools
import os
import re
import types
import typing
from collections.abc import Callable
from typing import Any, Literal

MAX_SIZE = (1 << 31) - 1
"""Largest size, number of steps or of tokens: arrays count them in 32 bits."""
_SHOWN_VALUE, _SHOWN_MESSAGE = 300, 2000
"""Characters of a value and of a message that an error shows; a value may be a whole file."""
_NAME_BYTES, _PATH_BYTES = 255, 4095  # of Linux
_type_hints = functools.cache(typing.get_type_hints)  # evaluates the text of annotations: a third of reading a recipe


class ConfigError(ValueError):
    """An invalid value, in one line: `ConfigError("top_k", 9, "use at most 8 …")` is "top_k = 9: use at most 8 …"."""

    def __init__(self, field: str, value: Any, message: str):
        text = f"{field} = {_cut(repr(value), _SHOWN_VALUE)}: {_cut(message, _SHOWN_MESSAGE)}"
        super().__init__(visible(" ".join(text.splitlines())))
        self.field, self.value, self.message = field, value, message


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


def visible(text: str) -> str:
    """Foreign text for a terminal: control characters other than tabs and newlines as escapes, such as `\\x1b`. They
    could clear the screen, hide what stands there, or set the terminal's title and clipboard."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def without_secrets(text: str) -> str:
    """A client's message without what its URLs may hold of credentials: the user's name and password, and the query,
    which in the URL of an upload is its signature."""
    return re.sub(r"(\w://)[^\s/@]*@", r"\1", re.sub(r"(\w://[^\s?]*)\?[^\s'\"]*", r"\1", text))


def require(ok: bool, field: str, value: Any, message: str) -> None:
    """Raise `ConfigError` unless `ok`."""
    if not ok:
        raise ConfigError(field, value, message)


def require_field(config: Any, name: str, ok: bool, message: str) -> None:
    """Raise `ConfigError` with the value of a field, whose `name` includes the section, unless `ok`."""
    require(ok, name, getattr(config, name.rpartition(".")[2]), message)


def require_local(field: str, path: Any, allowed: str = "files of this host are read and written") -> None:
    """Raise `ConfigError` for what cannot name a file of this host: a URL such as `gs://bucket/x`, also as a `Path`,
    which drops one of the slashes, a name that is too long, and one with a null byte or that is not text."""
    text = "" if path is None else str(path)
    fix = f"is a URL; only {allowed}: name the path where it is mounted or downloaded"
    require(not re.match(r"\w[\w+.-]+:/", text), field, re.sub(":/(?!/)", "://", text, count=1), fix)
    require(not re.search("[\0\ud800-\udfff]", text), field, text, "has a null byte, or bytes that are not UTF-8")
    too_long = len(os.fsencode(text)) > _PATH_BYTES or any(len(os.fsencode(n)) > _NAME_BYTES for n in text.split("/"))
    fix = f"is too long for a file: at most {_NAME_BYTES} bytes for a name, {_PATH_BYTES} for a path"
    require(not too_long, field, text, fix)


def require_each(config: Any, section: str, names: str, ok: Callable[[Any], bool], message: str) -> None:
    """Raise `ConfigError` for the first of the fields `names`, separated by spaces, that is neither None nor `ok`."""
    for name in names.split():
        value = getattr(config, name)
        require(value is None or ok(value), f"{section}.{name}", value, message)


def require_between(config: Any, section: str, names: str, low: float, high: float) -> None:
    """Raise `ConfigError` for the first of the fields `names`, separated by spaces, that is neither None nor in
    [low, high]; NaN never is. Without a section the fields are the flags of a command."""
    for name in names.split():
        value = getattr(config, name)
        dotted = f"{section}.{name}" if section else name
        require(value is None or low <= value <= high, dotted, value, f"must be between {low:,} and {high:,}")


def require_number(field: str, value: Any) -> None:
    """Raise `ConfigError` for NaN and for an integer of more than 64 bits, also in a tuple. The range of each field
    says whether it may be infinite."""
    for item in value if isinstance(value, tuple) else (value,):
        require(item == item, field, value, "must be a number")
        require(not isinstance(item, int) or abs(item) < 1 << 63, field, value, "must be an integer below 2**63")


def structure(cls: Any, value: Any, field: str) -> Any:
    """Convert plain JSON `value` to `cls`: a (nested) dataclass, tuple, Literal, union or scalar. Raises `ConfigError`
    with the dotted name of the field, which starts with `field`, if `value` does not fit."""
    origin, arguments = typing.get_origin(cls), typing.get_args(cls)
    if dataclasses.is_dataclass(cls):
        require(isinstance(value, dict), field, value, f"must be an object with the fields of {cls.__name__}")
        hints = _type_hints(cls)
        known = {f.name: f for f in dataclasses.fields(cls)}
        for name in value:
            require(name in known, f"{field}.{name}", value[name], f"no such field; there are {', '.join(known)}")
        for name, f in known.items():
            require(name in value or f.default is not dataclasses.MISSING, f"{field}.{name}", None, "is required")
        return cls(**{name: structure(hints[name], v, f"{field}.{name}") for name, v in value.items()})
    if origin is tuple:
        require(isinstance(value, list | tuple), field, value, "must be a list")
        return tuple(structure(arguments[0], v, f"{field}[{i}]") for i, v in enumerate(value))
    if origin is Literal:
        require(value in arguments, field, value, f"must be one of {', '.join(map(repr, arguments))}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return structure(next(a for a in arguments if a is not type(None)), value, field)
    if cls is float and type(value) is int and abs(value) < 1 << 63:
        return float(value)
    require(type(value) is cls and value == value, field, value, f"must be of type {cls.__name__}")  # no NaN
    return value
