"""Errors of one line, and the checks of ranges and paths that all fields and flags share."""

import dataclasses
import math

import pytest

from mla_moe.config import ConfigError
from mla_moe.config.errors import require_between, require_local, require_number, visible, without_secrets


def test_an_error_is_one_line_of_limited_length():
    error = ConfigError("field", "x\n" * 10_000, "a\nb\r\nc\u2028d" + "e" * 10_000)
    assert str(error).startswith("field = 'x\\nx\\n")
    assert len(str(error)) < 2500
    assert len(str(error).splitlines()) == 1
    assert (error.field, len(error.value)) == ("field", 20_000)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('to the endpoint: "http://key:secret@host:9000/b"', 'to the endpoint: "http://host:9000/b"'),
        ("403 for url: https://host/a?X-Signature=secret. See b?", "403 for url: https://host/a See b?"),
        ("a?b=c and me@host stay, and s3://bucket/a@b", "a?b=c and me@host stay, and s3://bucket/a@b"),
    ],
)
def test_urls_in_messages_of_clients_hold_no_credentials(text, shown):
    assert without_secrets(text) == shown


def test_foreign_text_does_not_control_the_terminal():
    assert visible("a\x1b[2J\r\x9b日\n\tb\x7f") == "a\\x1b[2J\\x0d\\x9b日\n\tb\\x7f"
    assert str(ConfigError("field", "\x1b", "has the keys \x1b]0;title\x07")) == (
        "field = '\\x1b': has the keys \\x1b]0;title\\x07"
    )


@dataclasses.dataclass
class Flags:
    a: float | None = None
    b: float = 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, 2.01, 10**12])
def test_a_range_excludes_nan(value):
    with pytest.raises(ConfigError, match=r"^section.b = .*: must be between 0 and 2"):
        require_between(Flags(b=value), "section", "a b", 0, 2)
    require_between(Flags(), "", "a b", 0, 2)


@pytest.mark.parametrize("value", [math.nan, 1 << 63, -(1 << 63), (1.0, math.nan), (10**400,)])
def test_numbers_that_no_field_takes(value):
    with pytest.raises(ConfigError, match=r"^a.b = "):
        require_number("a.b", value)
    for other in (None, "nan", True, 0, 1.5, math.inf, 10**12, (1.0, "x")):
        require_number("a.b", other)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gs://b/x", "is a URL"),
        ("a\0b", "null byte"),
        ("a\udcff", "not UTF-8"),
        ("\ud800", "not UTF-8"),
        ("ä" * 128, "too long"),
        ("a/" * 2048, "too long"),
    ],
)
def test_what_names_no_file(path, message):
    with pytest.raises(ConfigError, match=rf"^a.b = .*: .*{message}"):
        require_local("a.b", path)
    for other in (None, "", "a", "a" * 255, "a/" * 2047, "ä" * 127):
        require_local("a.b", other)
