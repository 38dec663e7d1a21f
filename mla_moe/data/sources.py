"""Documents to read from: every supported format becomes one sequence of strings with random access.

Grain shuffles by index and reads from several threads, so a source knows its length, returns document `i` at any time
and keeps no open file of its own.
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
from mla_moe.data.malformed_records import SkipMalformed, TooManyMalformedError


def open_documents(patterns: Sequence[str], *, field: str, text_field: str, malformed: float = 0.0) -> SkipMalformed:
    """The documents of all files that `patterns` match, in the patterns' order and sorted by path within each.

    A pattern is a path, a glob (`**` descends), or `NAME:train` or `NAME:heldout` of `cpython` or `arithmetic`. The
    suffix says how a file is read: `.jsonl`, `.parquet`, `.arrayrecord`; any other file is one document of UTF-8 text.
    A file matched twice counts once. `text_field` is the key or column that holds a document; `field` is the recipe's
    field to blame. Up to a share of `malformed` records are left out as they are met.
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
        fresh = [path for path in find_files(pattern, field) if path not in seen]
        seen.update(fresh)
        for path in fresh:
            require(not path.endswith(_COMPRESSED), field, path, "is compressed; unpack it first")
        for read, paths in itertools.groupby(
            fresh, key=lambda path: _READERS.get(Path(path).suffix.lower(), TextFiles)
        ):
            parts.append(read(list(paths), field, text_field))
    source = SkipMalformed(ConcatenatedDocuments(parts), malformed, fingerprint(parts))
    if not any(source):  # stops at the first document with text, which also tries the format before training starts
        raise ConfigError(field, tuple(patterns), "holds no text: every document is empty")
    return source


_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")


def find_files(pattern: str, field: str) -> list[str]:
    """What a path or a glob matches, sorted. Raises `ConfigError` on the recipe's `field` where that is nothing."""
    path = os.path.expanduser(pattern)
    if os.path.isfile(path):  # a name with brackets is a path before it is a glob
        return [path]
    matches = sorted(match for match in glob.glob(path, recursive=True) if os.path.isfile(match))
    if not matches:
        fix = f"matches no file from {os.getcwd()}; check the path or quote the glob"
        raise ConfigError(field, pattern, f"is a directory; write {pattern}/**/*" if os.path.isdir(path) else fix)
    return matches


class ConcatenatedDocuments(Sequence[str]):
    """Several sources, one after the other."""

    def __init__(self, parts: Sequence[Sequence[str]]):
        self._parts = parts
        self._ends = list(itertools.accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> str:
        part, offset = _locate(self._ends, index)
        return self._parts[part][offset]


def _locate(ends: Sequence[int], index: int) -> tuple[int, int]:
    """Which part holds item `index`, and where in it, given the running totals of the parts' lengths."""
    if not 0 <= index < ends[-1]:  # IndexError is what ends a loop over a sequence
        raise IndexError(index)
    part = bisect.bisect_right(ends, index)
    return part, index - (ends[part - 1] if part else 0)


class TextFiles(Sequence[str]):
    """Files of UTF-8 text, each one document."""

    def __init__(self, paths: list[str], field: str, text_field: str):
        self.files, self._field = FrozenFiles(paths, field), field

    def __len__(self) -> int:
        return len(self.files.paths)

    def __getitem__(self, index: int) -> str:
        with self.files.open(index) as file:
            return _decode(file.read(), self._field, self.files.paths[index])


def _decode(text: bytes, field: str, where: str) -> str:
    try:
        return text.decode("utf-8-sig")  # without the mark that some editors put in front
    except UnicodeDecodeError as error:
        raise TooManyMalformedError(field, where, f"is not UTF-8 text ({error.reason} at byte {error.start})") from None


_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def has_lone_surrogate(text: str) -> bool:
    """JSON can spell what no UTF-8 can hold."""
    return not text.isascii() and _LONE_SURROGATE.search(text) is not None


class Lines(Sequence[bytes]):
    """The lines of files, found through an index of where they start; blank ones do not count."""

    def __init__(self, paths: Sequence[str], field: str):
        self.files = FrozenFiles(paths, field)
        self._starts = array.array("q")  # 8 bytes a line: a billion lines fit a host's memory
        self._numbers = array.array("q")  # in the file, to name a broken one
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
        with self.files.open(self._file(index)) as file:  # anew: threads would share a handle's position
            file.seek(self._starts[index])
            return file.readline()

    def where(self, index: int) -> str:
        return f"{self.files.paths[self._file(index)]}, line {self._numbers[index]}"

    def _file(self, index: int) -> int:
        return _locate(self._ends, index)[0]


class JsonLines(Sequence[str]):
    """Files with one JSON object a line."""

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
            raise TooManyMalformedError(self._field, where, f"is not JSON: {error}") from None
        text = value.get(self._key) if isinstance(value, dict) else None
        if not isinstance(text, str):
            raise TooManyMalformedError(
                self._field, where, f"needs an object with text under {self._key!r} (data.text_field)"
            )
        if has_lone_surrogate(text):
            raise TooManyMalformedError(self._field, where, "has half of a surrogate pair, which is no character")
        return text


class Parquet(Sequence[str]):
    """A text column of Parquet files.

    The format is decoded a row group at a time, so a shuffled read costs a row group: a few are kept, and files with
    small ones (about a thousand rows) read well. Convert a large corpus to ArrayRecord, which has true random access.
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
                raise ConfigError("data.text_field", text_field, f"{path} holds {kind} in it; name a column of text")
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
            try:  # with a reader of its own, since they are not safe to share
                with pyarrow.parquet.ParquetFile(opened) as file:
                    rows = file.read_row_group(group, columns=[self._column]).column(0)
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                raise ConfigError(self._field, where, f"cannot be read: {error}") from None
        promised = self._ends[index] - (self._ends[index - 1] if index else 0)
        if len(rows) != promised:
            raise ConfigError(self._field, where, f"has {len(rows)} rows, not the {promised} it should; fetch it again")
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
            raise TooManyMalformedError(self._field, where, f"is not UTF-8 text ({error.reason})") from None
        if text is None:
            raise TooManyMalformedError(self._field, where, f"{self._column!r} is null")
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
