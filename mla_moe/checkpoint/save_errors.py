"""A save that fails, as one error: Orbax and TensorStore log a traceback for each of their threads besides."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Generator
from pathlib import Path

from mla_moe.checkpoint.bucket_run import location, mirror_of
from mla_moe.checkpoint.files import CheckpointSaveError
from mla_moe.config import ConfigError


@contextlib.contextmanager
def as_save_error(directory: Path, fix: str) -> Generator[None]:
    """Raise `CheckpointSaveError` for any other error than a `ConfigError`: Orbax raises that of a background save, of
    whatever type, at the next save or when it is closed."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        remedy = "free disk space, raise `ulimit -f` or check the disk"
        if mirror_of(directory):
            remedy = "check the connection and your credentials"
        fix = f"{remedy}; {fix}"
        problem = f"{location(directory)}: a checkpoint could not be saved ({_first_line(error)})"
        raise CheckpointSaveError(f"{problem}; {fix}") from error


class suppress_repeated_errors(contextlib.AbstractContextManager[None]):
    """Orbax logs the error of each of its threads with a traceback, asyncio that of each of its tasks, and TensorStore
    prints one for each write that then finds Orbax's event loop closed. They are not shown: Orbax raises the first
    error itself. Where that error leaves the context too, the others stay hidden, since they come as late as the end
    of the process."""

    _LOGS = logging.getLogger("absl"), logging.getLogger("asyncio")

    def __enter__(self) -> None:
        self._previous_hook = sys.unraisablehook
        sys.unraisablehook = self._unraisable
        for log in self._LOGS:
            log.addFilter(self._is_shown)

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            sys.unraisablehook = self._previous_hook
            for log in self._LOGS:
                log.removeFilter(self._is_shown)

    def _unraisable(self, unraisable: "sys.UnraisableHookArgs") -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            self._previous_hook(unraisable)

    def _is_shown(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        merges_nothing = "Skipping merge of OCDBT" in message  # of which a step without that format has none
        return not merges_nothing and (not record.exc_info or "orbax" not in record.pathname + message)


def _first_line(error: Exception) -> str:
    """The first line, or of the long ones of TensorStore what the system said."""
    text = str(error).partition("\n")[0]
    system = re.search(r"\[os_error_code='(\d+)'", text)
    return os.strerror(int(system[1])) if system else text[:200]
