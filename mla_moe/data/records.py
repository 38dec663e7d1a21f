"""Records of data files, one JSON object each, read once from beginning to end: JSON lines, JSON and Parquet."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mla_moe.config import ConfigError, require
from mla_moe.data.frozen_files import FrozenFiles
from mla_moe.data.lines import bounded_lines
from mla_moe.data.malformed_records import too_long
from mla_moe.data.sources import MAX_JSON_FILE_BYTES, MAX_ROW_GROUP_BYTES, has_lone_surrogate

_ROWS = 64  # of Parquet that are Python objects at a time


class Record(NamedTuple):
    where: str
    """File and line, for errors."""
    value: dict[str, Any] | None
    """None if it is malformed."""
    error: str = ""


def read_records(files: FrozenFiles, field: str, max_record_bytes: int) -> Iterator[Record]:
    """The records of all files, in order. The suffix selects the reader: `.parquet`, `.json` (an array of objects) or
    JSON lines. Null values are left out: Parquet has them for every key that a record lacks. A record with more than
    `max_record_bytes` of text is malformed. Raises `ConfigError` on `field` for a file that is of another format as a
    whole."""
    for index, path in enumerate(files.paths):
        reader = _READERS.get(Path(path).suffix.lower(), _json_lines)
        for where, value, error in reader(files, index, field, max_record_bytes):
            if not error and not isinstance(value, dict):
                error = "is not a JSON object"
            try:
                texts = [] if error else texts_of(value)
                if any(map(has_lone_surrogate, texts)):
                    error = "contains a lone surrogate (half of a character)"
                elif sum(len(text.encode()) for text in texts) > max_record_bytes:
                    error = too_long(field, where, max_record_bytes).message
                value = None if error else _without_nulls(value)
            except RecursionError:
                value, error = None, "is nested too deeply"
            yield Record(f"{path}, {where}", value, error)


_Parsed = Iterator[tuple[str, Any, str]]


def _json_lines(files: FrozenFiles, index: int, field: str, most: int) -> _Parsed:
    with files.open(index) as file:
        for number, (_, line) in enumerate(bounded_lines(file, most), 1):
            where = f"line {number}"
            if len(line) > most:
                yield where, None, too_long(field, where, most).message
            elif not line.isspace():
                try:
                    yield where, json.loads(line), ""
                except (ValueError, RecursionError) as error:
                    yield where, None, str(error)


def _json(files: FrozenFiles, index: int, field: str, most: int) -> _Parsed:
    path, size = files.paths[index], files.sizes[index]
    fix = f"is larger than {MAX_JSON_FILE_BYTES >> 20} MB and read at once; write it as JSON lines, with suffix .jsonl"
    require(size <= MAX_JSON_FILE_BYTES, field, path, fix)
    with files.open(index) as file:
        try:
            value = json.loads(file.read(size))
        except (ValueError, RecursionError) as error:
            raise ConfigError(field, path, f"is not JSON: {error}; the suffix of JSON lines is .jsonl") from None
    for number, record in enumerate(value if isinstance(value, list) else [value], 1):
        yield f"record {number}", record, ""


def _parquet(files: FrozenFiles, index: int, field: str, most: int) -> _Parsed:
    path = files.paths[index]
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(field, path, "Parquet needs pyarrow: pip install 'mla_moe[parquet]'") from None
    with files.open(index) as opened:
        try:
            with pyarrow.parquet.ParquetFile(opened) as file:
                groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
                size = max((group.total_byte_size for group in groups), default=0)
                fix = f"has a row group of {size >> 20} MB, read at once; write it with row_group_size=1000"
                require(size <= MAX_ROW_GROUP_BYTES, field, path, fix)
                number = 0
                for batch in file.iter_batches(batch_size=_ROWS):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"row {number}", json.loads(json.dumps(row, default=_as_json)), ""
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # the last of dates
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(field, path, f"cannot be read as Parquet: {error}; download or write it again") from None


_READERS: dict[str, Callable[[FrozenFiles, int, str, int], _Parsed]] = {".json": _json, ".parquet": _parquet}


def _as_json(value: Any) -> str | None:
    """A date or a number as its text; bytes, such as those of an image, are left out: `b'…'` is no text."""
    return None if isinstance(value, bytes) else str(value)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def texts_of(value: Any) -> Sequence[str]:
    """All texts in a record, its keys included."""
    if isinstance(value, str):
        return [value]
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for one in inner for text in texts_of(one)]
