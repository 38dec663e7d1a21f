"""Flags of the command line."""

import contextlib
import io
import re
import sys
from collections.abc import Callable
from typing import TypeVar

from mla_moe.config.errors import ConfigError

Parsed = TypeVar("Parsed")
_RULE = re.compile(r"[╭╰─-]{2,}.*[╮╯─-]{2,}")


def parse_flags(parse: Callable[[], Parsed]) -> Parsed:
    """Call tyro, which prints an error in a box of several lines and exits. Raises the `ConfigError` of a dataclass
    instead, and prints any other error in one line. `SystemExit` is raised for those and for `--help`."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return parse()
    except SystemExit as stop:
        error = stop.__context__
        while error is not None and not isinstance(error, ConfigError):
            error = error.__context__
        text, printed = printed.getvalue(), io.StringIO()
        if error is not None:
            raise error from None
        if text:
            print(f"error: {_one_line(text)}", file=sys.stderr)
        raise
    finally:
        sys.stderr.write(printed.getvalue())


def _one_line(box: str) -> str:
    """The text of a box, without its title; what rules separate is joined by semicolons."""
    sections: list[list[str]] = []
    for row in (line.strip(" │") for line in box.splitlines()):
        if _RULE.fullmatch(row):
            sections.append([])
        elif sections:
            sections[-1].append(row)
    return "; ".join(text for text in (" ".join(" ".join(rows).split()) for rows in sections) if text)
