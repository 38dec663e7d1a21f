"""Lines of files with random access. No more of a file is in memory than one record of limited size."""

import array
import bisect
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from mla_moe.data.frozen_files import FrozenFiles
from mla_moe.data.malformed_records import too_long


class Lines(Sequence[bytes]):
    """Lines of files with random access, through an index of their offsets. Blank lines are skipped; reading one that
    is longer than `max_record_bytes` raises `MalformedRecordError` on `field`."""

    def __init__(self, paths: Sequence[str], field: str, max_record_bytes: int):
        self.files, self._field, self._max_record_bytes = FrozenFiles(paths, field), field, max_record_bytes
        self._starts = array.array("q")  # 8 bytes per line: a billion lines fit in host memory
        self._numbers = array.array("q")  # line numbers in the file, for errors
        self._ends: list[int] = []
        for index in range(len(paths)):
            with self.files.open(index) as file:
                for number, (start, line) in enumerate(bounded_lines(file, max_record_bytes), 1):
                    if not line.isspace():
                        self._starts.append(start)
                        self._numbers.append(number)
            self._ends.append(len(self._starts))

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> bytes:
        with self.files.open(self._file(index)) as file:  # per call: threads cannot share a handle
            file.seek(self._starts[index])
            line = file.readline(self._max_record_bytes + 1)
        if len(line) > self._max_record_bytes:
            raise too_long(self._field, self.where(index), self._max_record_bytes)
        return line

    def where(self, index: int) -> str:
        return f"{self.files.paths[self._file(index)]}, line {self._numbers[index]}"

    def _file(self, index: int) -> int:
        return locate(self._ends, index)[0]


def bounded_lines(file: BinaryIO, most: int) -> Iterator[tuple[int, bytes]]:
    """The byte offset of each line, and the line itself, newline included; of a line that is longer than `most` bytes,
    only the first `most` + 1."""
    start = 0
    while line := file.readline(most + 1):
        yield start, line
        start += len(line)
        rest = line if len(line) > most else b"\n"
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(1 << 20)
            start += len(rest)


def locate(ends: Sequence[int], index: int) -> tuple[int, int]:
    """The part that contains item `index`, and the offset in it, given the cumulative lengths of the parts."""
    if not 0 <= index < ends[-1]:  # IndexError ends a loop over a sequence
        raise IndexError(index)
    part = bisect.bisect_right(ends, index)
    return part, index - (ends[part - 1] if part else 0)
