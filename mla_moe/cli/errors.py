"""Errors of the commands: one line each, and an exit code."""

import errno
import io
import sys

import jax

from mla_moe.config import ConfigError
from mla_moe.training.errors import TrainingHaltedError

_FIXES = {
    errno.ENOSPC: "free disk space",
    errno.EDQUOT: "free disk space, or raise your quota",
    errno.EFBIG: "the system limits the size of a file: raise `ulimit -f`",
    errno.EMFILE: "the system limits open files: raise `ulimit -n`",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.EACCES: "check its owner and its permissions",
    errno.EPERM: "check its owner and its permissions",
    errno.EROFS: "name a path on a file system that can be written",
    errno.EADDRINUSE: "end the process that listens there, or choose another --port",
}
_MEMORY = "out of memory: shorten sequences, or lower the batch or --max-num-seqs"
EXPECTED = (ConfigError, TrainingHaltedError, OSError, MemoryError, jax.errors.JaxRuntimeError)
"""Errors whose traceback would not help: invalid input, and what the system refuses."""


def print_any_text() -> None:
    """Let text that the terminal's encoding lacks be printed as an escape, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def report_error(error: BaseException) -> int:
    """Print one of the `EXPECTED` errors in one line on standard error. Returns the exit code: 2 for invalid input,
    else 1. Raises other errors of the devices again."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        where = f"{error.filename!r}: " if error.filename is not None else ""
        fix = _FIXES.get(error.errno or 0)
        text = f"{where}{error.strerror}" + (f"; {fix}" if fix else "")
    elif isinstance(error, MemoryError) or text.startswith("RESOURCE_EXHAUSTED"):
        text = f"{_MEMORY} ({text.partition(chr(10))[0][:200]})"
    elif isinstance(error, jax.errors.JaxRuntimeError):
        raise error
    print(f"error: {' '.join(text.splitlines())[:3000]}", file=sys.stderr)
    return 2 if isinstance(error, ConfigError) else 1
