"""Read small files that come from elsewhere, as those beside a checkpoint's weights: their kind and size come first."""

import json
import os
from pathlib import Path
from typing import Any

from mla_moe.config.errors import ConfigError, require

MAX_JSON_BYTES = 32 << 20
"""Nearly twice the index of Kimi-K2's files. The worst JSON of this size takes 0.8 GB as Python objects."""


def read_text(path: Path, field: str, max_bytes: int = MAX_JSON_BYTES) -> str:
    """The text of a file. Raises `ConfigError` on `field` for a pipe, a device, a loop of links or anything else
    that is not a regular file, for one of more than `max_bytes`, and for text that is not UTF-8."""
    require(os.path.lexists(path), field, str(path), "no such file; check the path")
    require(path.is_file(), field, str(path), "is not a regular file, or is a broken link; replace it by the file")
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise ConfigError(field, str(path), f"cannot be read: {error.strerror}") from None
    fix = f"is larger than {max_bytes >> 20} MB, the limit for such files; fetch it again"
    require(len(content) <= max_bytes, field, str(path), fix)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(field, str(path), "is not UTF-8 text; fetch it again") from None


def read_json_object(path: Path, field: str, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A file's JSON object. Raises `ConfigError` on `field` for anything else, and for more than `max_bytes`."""
    text = read_text(path, field, max_bytes)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(field, str(path), f"is not JSON: {error}; correct it, or fetch it again") from None
    require(isinstance(value, dict), field, str(path), "is not a JSON object; correct or remove the file")
    return value
