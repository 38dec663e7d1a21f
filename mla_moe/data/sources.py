"""Sources of documents: every supported format becomes one sequence of texts, or of token ids, with random access.

Grain shuffles by index and reads from several threads, so a source has a length, returns document `i` at any time, and
keeps no file open.
"""

import array
import functools
import glob
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from mla_moe.config import ConfigError, DataConfig, require
from mla_moe.config.storage import is_url, local_files, require_path
from mla_moe.data import arithmetic, cpython
from mla_moe.data.frozen_files import FrozenFiles, fingerprint
from mla_moe.data.lines import Lines, locate
from mla_moe.data.malformed_records import Document, MalformedRecordError, SkipMalformed, too_long
from mla_moe.data.token_ids import KEYS, TokenFiles, TokenFormat, record_ids

logger = logging.getLogger(__name__)
MAX_JSON_FILE_BYTES = 512 << 20
"""Largest size of a .json file, whose values usually take a few times its size in memory, 25 times at worst."""
MAX_ROW_GROUP_BYTES = 4 << 30
"""Largest size of the columns that are read of a row group of Parquet."""
_CACHE_BYTES = 512 << 20  # of the row groups that are cached, of which there is always one


def open_documents(
    patterns: Sequence[str],
    *,
    field: str,
    text_field: str,
    max_malformed_fraction: float = 0.0,
    max_record_bytes: int = DataConfig.max_record_bytes,
    tokens: TokenFormat | None = None,
) -> SkipMalformed:
    """The documents of all files that match `patterns`, in the order of the patterns and sorted by path within each.

    A pattern is a path, a glob (`**` includes subfolders), or `cpython:train`, `cpython:heldout`, `arithmetic:train` or
    `arithmetic:heldout`. The suffix selects the reader (`_READERS`); any other file is one UTF-8 document, and several
    if it is longer than `max_record_bytes`. `text_field` is the key or column of the text; `field` is the recipe field
    that errors name. Malformed records, and longer ones, are skipped, up to `max_malformed_fraction` of all. Records
    and files of token ids need `tokens`.
    """
    parts: list[Sequence[Document]] = []
    ranges: dict[str, range] = {}
    found = files_by_pattern(patterns, field, _BUILT_IN)
    for pattern, files in found.items():
        start = sum(map(len, parts))
        for read, paths in itertools.groupby(files.values(), key=_reader):
            parts.append(read(list(paths), field, text_field, max_record_bytes, tokens))
        ranges[pattern] = range(start, sum(map(len, parts)))
    source = SkipMalformed(ConcatenatedDocuments(parts), max_malformed_fraction, fingerprint(parts))
    source.ranges, source.files = ranges, set().union(*found.values())
    files = (getattr(part, "files", None) for part in parts)
    source.nbytes = sum(sum(part.sizes) for part in files if part)
    if not any(map(len, source)):  # reads until the first text, which also checks the format before training
        raise ConfigError(field, tuple(patterns), "contains no text: every document is empty; name other files")
    return source


def files_by_pattern(patterns: Sequence[str], field: str, built_in: Container[str] = ()) -> dict[str, dict[str, str]]:
    """The files that each pattern adds, by their real path. A file that is listed twice counts once, which is logged.
    A name in `built_in` is its own file."""
    found: dict[str, dict[str, str]] = {}
    seen: set[str] = set()
    repeated: list[str] = []
    for pattern in patterns:
        for path in [pattern] if pattern in built_in else find_files(pattern, field):
            real = path if pattern in built_in else os.path.realpath(path)
            if real in seen:
                repeated.append(path)
            else:
                seen.add(real)
                found.setdefault(pattern, {})[real] = path
    if repeated:
        logger.warning("%s: %d files are listed twice and count once, %s among them", field, len(repeated), repeated[0])
    return found


def find_files(pattern: str, field: str) -> list[str]:
    """Files that match a path or a glob, sorted; no hidden ones. Of those at URLs local copies. Raises
    `ConfigError` on `field` if there are none."""
    require_path(field, pattern)
    if is_url(pattern):
        return local_files(pattern, field)
    path = os.path.expanduser(pattern)
    if os.path.isfile(path):  # a file name may contain the brackets of a glob
        return [path]
    matches = sorted(match for match in glob.glob(path, recursive=True) if os.path.isfile(match))
    if not matches:
        fix = f"matches no file from {os.getcwd()}; check the path or quote the glob"
        raise ConfigError(field, pattern, f"is a directory; write {pattern}/**/*" if os.path.isdir(path) else fix)
    return matches


class ConcatenatedDocuments(Sequence[Document]):
    """Several sources, concatenated."""

    def __init__(self, parts: Sequence[Sequence[Document]]):
        self._parts = parts
        self._ends = list(itertools.accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Document:
        part, offset = locate(self._ends, index)
        return self._parts[part][offset]


class TextFiles(Sequence[str]):
    """UTF-8 text files, each one document. A file longer than `max_record_bytes` is read in windows of that size, each
    a document, which begin at the next whole character."""

    def __init__(self, paths: list[str], field: str, text_field: str, max_record_bytes: int, *_: object):
        self.files, self._field, self._window = FrozenFiles(paths, field), field, max_record_bytes
        counts = [max(1, -(-(size - _SPLIT) // max_record_bytes)) for size in self.files.sizes]
        self._ends = array.array("q", itertools.accumulate(counts))
        self.windows = counts if max(counts) > 1 else []
        """Number of windows of each file, if one has several."""
        if long := [path for path, count in zip(paths, counts, strict=True) if count > 1]:
            note = "%s: %d files are longer than data.max_record_bytes and read in windows of %d bytes, %s among them"
            logger.warning(note, field, len(long), max_record_bytes, long[0])

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> str:
        number, window = locate(self._ends, index)
        path, start, is_last = self.files.paths[number], window * self._window, index + 1 == self._ends[number]
        with self.files.open(number) as file:
            file.seek(start)
            text = file.read(min(self._window + _SPLIT, self.files.sizes[number] - start))
        end = len(text) if is_last else self._window + _continuation_bytes(text[self._window :])
        if not window:
            return _decode(text[:end], self._field, path if is_last else f"{path}, byte 0")
        begin = _continuation_bytes(text[:_SPLIT])
        return _decode(text[begin:end], self._field, f"{path}, byte {start + begin}", "utf-8")


_SPLIT = 3  # most bytes of a character of UTF-8 after its first


def _continuation_bytes(text: bytes) -> int:
    """Number of bytes at the beginning that continue a character."""
    return len(text) - len(text.lstrip(bytes(range(0x80, 0xC0))))


def _decode(text: bytes, field: str, where: str, encoding: str = "utf-8-sig") -> str:
    """Decode without a byte order mark at the beginning."""
    try:
        return text.decode(encoding)
    except UnicodeDecodeError as error:
        raise MalformedRecordError(field, where, f"is not UTF-8 text ({error.reason} at byte {error.start})") from None


_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def has_lone_surrogate(text: str) -> bool:
    """Whether `text` contains half of a surrogate pair, which JSON can express and UTF-8 cannot."""
    return not text.isascii() and _LONE_SURROGATE.search(text) is not None


class JsonLines(Sequence[Document]):
    """JSON-lines files: one JSON object per line."""

    def __init__(
        self, paths: list[str], field: str, text_field: str, max_record_bytes: int, tokens: TokenFormat | None = None
    ):
        self._lines, self._field, self._key = Lines(paths, field, max_record_bytes), field, text_field
        self._tokens = tokens
        self.files = self._lines.files

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Document:
        line, where = self._lines[index], self._lines.where(index)
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise MalformedRecordError(self._field, where, f"is not JSON: {error}") from None
        return _document_of(value, self._key, self._tokens, self._field, where)


def _document_of(record: Any, key: str, tokens: TokenFormat | None, field: str, where: str) -> Document:
    """What is under `key`, text or token ids; without it the token ids under one of their usual keys."""
    found = record if isinstance(record, dict) else {}
    text = next((found[name] for name in (key, *KEYS) if name in found), None)
    if isinstance(text, list):
        return record_ids(text, tokens, field, where)
    if not isinstance(text, str):
        raise MalformedRecordError(field, where, f"needs an object with text under {key!r} (data.text_field)")
    if has_lone_surrogate(text):
        raise MalformedRecordError(field, where, "contains a lone surrogate (half of a character)")
    return text


class Json(Sequence[Document]):
    """JSON files, each one object or an array of objects, held in memory: a large corpus should be JSON lines."""

    def __init__(
        self, paths: list[str], field: str, text_field: str, max_record_bytes: int, tokens: TokenFormat | None = None
    ):
        self.files, self._field, self._key = FrozenFiles(paths, field), field, text_field
        self._most, self._records, self._tokens = max_record_bytes, [], tokens
        for path, size in zip(paths, self.files.sizes, strict=True):
            size_limit = f"is larger than {MAX_JSON_FILE_BYTES >> 20} MB and read at once"
            fix = f"{size_limit}; write it as JSON lines, with suffix .jsonl"
            require(size <= MAX_JSON_FILE_BYTES, field, path, fix)
            try:
                value = json.loads(Path(path).read_bytes())
            except (ValueError, RecursionError) as error:
                raise ConfigError(field, path, f"is not JSON: {error}; the suffix of JSON lines is .jsonl") from None
            self._records.append(value if isinstance(value, list) else [value])
        self._ends = list(itertools.accumulate(map(len, self._records)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Document:
        file, number = locate(self._ends, index)
        where = f"{self.files.paths[file]}, record {number + 1}"
        text = _document_of(self._records[file][number], self._key, self._tokens, self._field, where)
        if isinstance(text, str) and len(text.encode()) > self._most:
            raise too_long(self._field, where, self._most)
        return text


class Parquet(Sequence[Document]):
    """A text column of Parquet files.

    The format is decoded one row group at a time, so a shuffled read costs a row group. A few are cached, and files
    with small row groups (about a thousand rows) are fast. Convert a large corpus to ArrayRecord: it has random access.
    """

    def __init__(
        self, paths: list[str], field: str, text_field: str, max_record_bytes: int, tokens: TokenFormat | None = None
    ):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise ConfigError(field, paths[0], "Parquet needs pyarrow: pip install 'mla_moe[parquet]'") from None
        self._field, self._tokens, self.files = field, tokens, FrozenFiles(paths, field)
        self._columns: list[str] = []
        self._groups: list[tuple[int, int]] = []
        self._ends: list[int] = []
        self._most, largest = max_record_bytes, 1
        for number, path in enumerate(paths):
            try:
                with pyarrow.parquet.ParquetFile(path) as file:
                    schema, metadata = file.schema_arrow, file.metadata
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                raise ConfigError(field, path, f"is not a Parquet file: {error}; download or write it again") from None
            column = next((name for name in (text_field, *KEYS) if name in schema.names), None)
            if column is None:
                raise ConfigError("data.text_field", text_field, f"{path} has the columns {', '.join(schema.names)}")
            kind = schema.field(column).type
            is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
            has_ids = is_list and pyarrow.types.is_integer(kind.value_type)
            if kind not in (pyarrow.string(), pyarrow.large_string()) and not has_ids:
                fix = f"{path} has type {kind} in it; name a column of text or of token ids"
                raise ConfigError("data.text_field", text_field, fix)
            self._columns.append(column)
            for group in map(metadata.row_group, range(metadata.num_row_groups)):
                columns = map(group.column, range(group.num_columns))
                parts = (c for c in columns if f"{c.path_in_schema}.".startswith(f"{column}."))  # of a list several
                size = sum(part.total_uncompressed_size for part in parts)
                fix = f"has a row group of {size >> 20} MB of text, read at once; write it with row_group_size=1000"
                require(size <= MAX_ROW_GROUP_BYTES, field, path, fix)
                largest = max(largest, size)
                self._ends.append(group.num_rows + (self._ends[-1] if self._ends else 0))
            self._groups += [(number, group) for group in range(metadata.num_row_groups)]
        cached = max(1, min(8, _CACHE_BYTES // largest))
        self._rows: Callable[[int], Sequence] = functools.lru_cache(maxsize=cached)(self._read_group)

    def _read_group(self, index: int) -> Sequence:
        import pyarrow
        import pyarrow.parquet

        number, group = self._groups[index]
        where = f"{self.files.paths[number]}, row group {group}"
        with self.files.open(number) as opened:
            try:  # a separate reader per call, since readers are not thread-safe
                with pyarrow.parquet.ParquetFile(opened) as file:
                    rows = file.read_row_group(group, columns=[self._columns[number]]).column(0)
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                raise ConfigError(self._field, where, f"cannot be read: {error}; download it again") from None
        expected = self._ends[index] - (self._ends[index - 1] if index else 0)
        if len(rows) != expected:
            raise ConfigError(
                self._field, where, f"has {len(rows)} rows instead of {expected}; download the file again"
            )
        return rows

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Document:
        group, row = locate(self._ends or [0], index)
        cell, (file, number) = self._rows(group)[row], self._groups[group]
        where = f"{self.files.paths[file]}, row group {number}, row {row}"
        if not cell.is_valid:
            raise MalformedRecordError(self._field, where, f"{self._columns[file]!r} is null")
        ids = getattr(cell, "values", None)
        if (cell.as_buffer().size if ids is None else ids.nbytes) > self._most:
            raise too_long(self._field, where, self._most)
        if ids is not None:
            return record_ids(ids.to_pylist() if ids.null_count else ids.to_numpy(), self._tokens, self._field, where)
        try:
            return cell.as_py()
        except UnicodeDecodeError as error:
            raise MalformedRecordError(self._field, where, f"is not UTF-8 text ({error.reason})") from None


class ArrayRecord(Sequence[str]):
    """ArrayRecord files whose records are UTF-8 text."""

    def __init__(self, paths: list[str], field: str, text_field: str, max_record_bytes: int, *_: object):
        from grain.sources import ArrayRecordDataSource

        self.files, self._field, self._most = FrozenFiles(paths, field), field, max_record_bytes
        try:
            self._records = ArrayRecordDataSource(paths)
        except (RuntimeError, ValueError) as error:
            fix = f"cannot be read as ArrayRecord: {error}; download or write it again"
            raise ConfigError(field, paths[0], fix) from None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        text, where = self._records[index], f"{', '.join(self.files.paths)}, record {index}"
        if len(text) > self._most:
            raise too_long(self._field, where, self._most)
        return _decode(text, self._field, where)


def _compressed(paths: list[str], field: str, *_: object) -> Sequence[str]:
    raise ConfigError(field, paths[0], "is compressed; decompress it first")


_Reader = Callable[[list[str], str, str, int, TokenFormat | None], Sequence[Document]]
_READERS: Mapping[str, _Reader] = {
    ".jsonl": JsonLines, ".ndjson": JsonLines, ".json": Json, ".parquet": Parquet, ".arrayrecord": ArrayRecord,
    ".array_record": ArrayRecord, ".npy": TokenFiles, ".bin": TokenFiles,
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip"), _compressed),
}  # fmt: skip
_BUILT_IN: Mapping[str, _Reader] = {
    **{name: lambda names, *_: cpython.documents(*names) for name in cpython.NAMES},
    **{name: lambda names, *_: arithmetic.Documents(*names) for name in arithmetic.NAMES},
}


def _reader(path: str) -> _Reader:
    return _BUILT_IN.get(path) or _READERS.get(Path(path).suffix.lower(), TextFiles)
