"""Data files that must not change while a run reads them."""

import array
import os
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, BinaryIO

from mla_moe.config import ConfigError


class FrozenFiles:
    """Paths with the size and modification time that each file had when this object was created."""

    def __init__(self, paths: Sequence[str], field: str):
        """`field` is the recipe field that errors name."""
        self.paths, self._field = paths, field
        self.sizes, self._times = array.array("q"), array.array("q")  # 16 bytes per file: there may be millions
        for path in paths:
            found = os.stat(path)
            self.sizes.append(found.st_size)
            self._times.append(found.st_mtime_ns)

    def open(self, index: int) -> BinaryIO:
        """Open file number `index` for reading. Raises `ConfigError` if it is missing or has changed."""
        path = self.paths[index]
        try:
            file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115
        except OSError as error:
            raise ConfigError(self._field, path, f"is missing ({error.strerror}); restore it and start again") from None
        found = os.fstat(file.fileno())
        if (found.st_size, found.st_mtime_ns) != (self.sizes[index], self._times[index]):
            file.close()
            raise ConfigError(
                self._field, path, "has changed while the run was reading it; start again with files that do not change"
            )
        return file


def _without_waiting(path: str, flags: int) -> int:
    """Opening a pipe would wait for its writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def fingerprint(parts: Iterable[Sequence[Any]]) -> int:
    """A checksum of the sizes of all files, and of the numbers of their windows where one has several: detects other
    data on resume, before anything is read."""
    checksum = 0
    for part in parts:
        files = getattr(part, "files", None)
        sizes = files.sizes if files else map(len, part) if isinstance(part, list) else [len(part)]
        checksum = zlib.crc32(repr([*sizes, *getattr(part, "windows", ())]).encode(), checksum)
    return checksum
