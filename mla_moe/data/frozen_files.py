"""Files that must stay as they are while a run reads them."""

import array
import os
import zlib
from collections.abc import Iterable, Sequence
from typing import BinaryIO

from mla_moe.config import ConfigError


class FrozenFiles:
    """Paths, each with its size and the time of its last change when this was made."""

    def __init__(self, paths: Sequence[str], field: str):
        """`field` is the recipe's field to blame."""
        self.paths, self._field = paths, field
        self.sizes, self._times = array.array("q"), array.array("q")  # 16 bytes a file: there may be millions
        for path in paths:
            found = os.stat(path)
            self.sizes.append(found.st_size)
            self._times.append(found.st_mtime_ns)

    def open(self, index: int) -> BinaryIO:
        """A file, to be read from its beginning. Raises `ConfigError` if it is gone or has changed."""
        path = self.paths[index]
        try:
            file = open(path, "rb")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(self._field, path, f"is gone ({error.strerror}); put it back and start again") from None
        found = os.fstat(file.fileno())
        if (found.st_size, found.st_mtime_ns) != (self.sizes[index], self._times[index]):
            file.close()
            raise ConfigError(self._field, path, "has changed while it was read; start again with files that stay")
        return file


def fingerprint(parts: Iterable[Sequence]) -> int:
    """What tells, before anything is read, that these are the documents of another time: the sizes of all files."""
    digest = 0
    for part in parts:
        files = getattr(part, "files", None)
        sizes = files.sizes if files else map(len, part) if isinstance(part, list) else [len(part)]
        digest = zlib.crc32(repr(list(sizes)).encode(), digest)
    return digest
