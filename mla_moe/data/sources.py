"""Sources of documents: every supported format becomes one sequence of strings with random access.

Grain shuffles by index and reads from several threads, so a source has a length, returns document `i` at any time, and
keeps no file open.
"""

import array
import bisect
import functools
import glob
import itertools
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from mla_moe.config import ConfigError, require
from mla_moe.data import arithmetic, cpython
from mla_moe.data.frozen_files import FrozenFiles, fingerprint
from mla_moe.data.malformed_records import MalformedRecordError, SkipMalformed


def open_documents(
    patterns: Sequence[str], *, field: str, text_field: str, max_malformed_fraction: float = 0.0
) -> SkipMalformed:
    """The documents of all files that match `patterns`, in the order of the patterns and sorted by path within each.

    A pattern is a path, a glob (`**` includes subfolders), or `cpython:train`, `cpython:heldout`, `arithmetic:train` or
    `arithmetic:heldout`. The suffix selects the reader: `.jsonl`, `.parquet`, `.arrayrecord`; any other file is one
    UTF-8 document. A file that matches twice counts once. `text_field` is the key or column of the text; `field` is the
    recipe field that errors name. Malformed records are skipped, up to `max_malformed_fraction` of all.
    """
    parts: list[Sequence[str]] = []
    seen: set[str] = set()
    for pattern in dict.fromkeys(patterns):
        if pattern in cpython.NAMES:
            parts.append(cpython.documents(pattern))
            continue
        if pattern in arithmetic.NAMES:
            parts.append(arithmetic.Documents(pattern))
            continue
        unseen = [path for path in find_files(pattern, field) if path not in seen]
        seen.update(unseen)
        for path in unseen:
            require(not path.endswith(_COMPRESSED), field, path, "is compressed; decompress it first")
        for read, paths in itertools.groupby(
            unseen, key=lambda path: _READERS.get(Path(path).suffix.lower(), TextFiles)
        ):
            parts.append(read(list(paths), field, text_field))
    source = SkipMalformed(ConcatenatedDocuments(parts), max_malformed_fraction, fingerprint(parts))
    if not any(source):  # reads until the first text, which also checks the format before training
        raise ConfigError(field, tuple(patterns), "contains no text: every document is empty; name other files")
    return source


_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")


def find_files(pattern: str, field: str) -> list[str]:
    """Files that match a path or a glob, sorted. Raises `ConfigError` on `field` if there are none."""
    path = os.path.expanduser(pattern)
    if os.path.isfile(path):  # a file name may contain the brackets of a glob
        return [path]
    matches = sorted(match for match in glob.glob(path, recursive=True) if os.path.isfile(match))
    if not matches:
        fix = f"matches no file from {os.getcwd()}; check the path or quote the glob"
        raise ConfigError(field, pattern, f"is a directory; write {pattern}/**/*" if os.path.isdir(path) else fix)
    return matches


class ConcatenatedDocuments(Sequence[str]):
    """Several sources, concatenated."""

    def __init__(self, parts: Sequence[Sequence[str]]):
        self._parts = parts
        self._ends = list(itertools.accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> str:
        part, offset = _locate(self._ends, index)
        return self._parts[part][offset]


def _locate(ends: Sequence[int], index: int) -> tuple[int, int]:
    """The part that contains item `index`, and the offset in it, given the cumulative lengths of the parts."""
    if not 0 <= index < ends[-1]:  # IndexError ends a loop over a sequence
        raise IndexError(index)
    part = bisect.bisect_right(ends, index)
    return part, index - (ends[part - 1] if part else 0)


class TextFiles(Sequence[str]):
    """UTF-8 text files, each one document."""

    def __init__(self, paths: list[str], field: str, text_field: str):
        self.files, self._field = FrozenFiles(paths, field), field

    def __len__(self) -> int:
        return len(self.files.paths)

    def __getitem__(self, index: int) -> str:
        with self.files.open(index) as file:
            return _decode(file.read(), self._field, self.files.paths[index])


def _decode(text: bytes, field: str, where: str) -> str:
    try:
        return text.decode("utf-8-sig")  # without a byte order mark
    except UnicodeDecodeError as error:
        raise MalformedRecordError(field, where, f"is not UTF-8 text ({error.reason} at byte {error.start})") from None


_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def has_lone_surrogate(text: str) -> bool:
    """Whether `text` contains half of a surrogate pair, which JSON can express and UTF-8 cannot."""
    return not text.isascii() and _LONE_SURROGATE.search(text) is not None


class Lines(Sequence[bytes]):
    """Lines of files with random access, through an index of their offsets. Blank lines are skipped."""

    def __init__(self, paths: Sequence[str], field: str):
        self.files = FrozenFiles(paths, field)
        self._starts = array.array("q")  # 8 bytes per line: a billion lines fit in host memory
        self._numbers = array.array("q")  # line numbers in the file, for errors
        self._ends: list[int] = []
        for index in range(len(paths)):
            start = 0
            with self.files.open(index) as file:
                for number, line in enumerate(file, 1):
                    if not line.isspace():
                        self._starts.append(start)
                        self._numbers.append(number)
                    start += len(line)
            self._ends.append(len(self._starts))

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> bytes:
        with self.files.open(self._file(index)) as file:  # per call: threads cannot share a handle
            file.seek(self._starts[index])
            return file.readline()

    def where(self, index: int) -> str:
        return f"{self.files.paths[self._file(index)]}, line {self._numbers[index]}"

    def _file(self, index: int) -> int:
        return _locate(self._ends, index)[0]


class JsonLines(Sequence[str]):
    """JSON-lines files: one JSON object per line."""

    def __init__(self, paths: list[str], field: str, text_field: str):
        self._lines, self._field, self._key = Lines(paths, field), field, text_field
        self.files = self._lines.files

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> str:
        line, where = self._lines[index], self._lines.where(index)
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise MalformedRecordError(self._field, where, f"is not JSON: {error}") from None
        text = value.get(self._key) if isinstance(value, dict) else None
        if not isinstance(text, str):
            raise MalformedRecordError(
                self._field, where, f"needs an object with text under {self._key!r} (data.text_field)"
            )
        if has_lone_surrogate(text):
            raise MalformedRecordError(self._field, where, "contains a lone surrogate (half of a character)")
        return text


class Parquet(Sequence[str]):
    """A text column of Parquet files.

    The format is decoded one row group at a time, so a shuffled read costs a row group. A few are cached, and files
    with small row groups (about a thousand rows) are fast. Convert a large corpus to ArrayRecord: it has random access.
    """

    def __init__(self, paths: list[str], field: str, text_field: str):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise ConfigError(field, paths[0], "Parquet needs pyarrow: pip install 'mla_moe[parquet]'") from None
        self._field, self._column, self.files = field, text_field, FrozenFiles(paths, field)
        self._groups: list[tuple[int, int]] = []
        self._ends: list[int] = []
        for number, path in enumerate(paths):
            try:
                with pyarrow.parquet.ParquetFile(path) as file:
                    schema, metadata = file.schema_arrow, file.metadata
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                raise ConfigError(field, path, f"is not a Parquet file: {error}") from None
            if text_field not in schema.names:
                raise ConfigError("data.text_field", text_field, f"{path} has the columns {', '.join(schema.names)}")
            kind = schema.field(text_field).type
            if kind not in (pyarrow.string(), pyarrow.large_string()):
                raise ConfigError("data.text_field", text_field, f"{path} has type {kind} in it; name a text column")
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group))
                self._ends.append(metadata.row_group(group).num_rows + (self._ends[-1] if self._ends else 0))
        self._rows: Callable[[int], Sequence] = functools.lru_cache(maxsize=8)(self._read_group)

    def _read_group(self, index: int) -> Sequence:
        import pyarrow
        import pyarrow.parquet

        number, group = self._groups[index]
        where = f"{self.files.paths[number]}, row group {group}"
        with self.files.open(number) as opened:
            try:  # a separate reader per call, since readers are not thread-safe
                with pyarrow.parquet.ParquetFile(opened) as file:
                    rows = file.read_row_group(group, columns=[self._column]).column(0)
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                raise ConfigError(self._field, where, f"cannot be read: {error}") from None
        expected = self._ends[index] - (self._ends[index - 1] if index else 0)
        if len(rows) != expected:
            raise ConfigError(
                self._field, where, f"has {len(rows)} rows instead of {expected}; download the file again"
            )
        return rows

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> str:
        group, row = _locate(self._ends or [0], index)
        cell, (file, number) = self._rows(group)[row], self._groups[group]
        where = f"{self.files.paths[file]}, row group {number}, row {row}"
        try:
            text = cell.as_py()
        except UnicodeDecodeError as error:
            raise MalformedRecordError(self._field, where, f"is not UTF-8 text ({error.reason})") from None
        if text is None:
            raise MalformedRecordError(self._field, where, f"{self._column!r} is null")
        return text


class ArrayRecord(Sequence[str]):
    """ArrayRecord files whose records are UTF-8 text."""

    def __init__(self, paths: list[str], field: str, text_field: str):
        from grain.sources import ArrayRecordDataSource

        self.files, self._field = FrozenFiles(paths, field), field
        try:
            self._records = ArrayRecordDataSource(paths)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(field, paths[0], f"cannot be read as ArrayRecord: {error}") from None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return _decode(self._records[index], self._field, f"{', '.join(self.files.paths)}, record {index}")


_READERS = {".jsonl": JsonLines, ".parquet": Parquet, ".arrayrecord": ArrayRecord, ".array_record": ArrayRecord}
