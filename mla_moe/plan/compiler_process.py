"""The process that compiles for `compiler.compile_for_tpu`: a file that is run, so that the parent's `sys.path`, the
first thing that it reads, is in place before anything is imported."""

import os
import shutil
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

ERROR = "error"
"""The file in the dump's folder that has the compiler's error."""


def main(folder: Path, parent: Connection) -> None:
    """Lower what the parent's second object returns and compile it, with a dump to `folder`."""
    sys.path[:] = parent.recv()

    import jax

    from mla_moe.plan.topology import quiet_compilers

    quiet_compilers()
    try:
        lower = parent.recv()
    except EOFError:
        _end(folder)
    threading.Thread(target=_end_with, args=(parent, folder), daemon=True).start()
    try:
        lower().compile({"xla_dump_to": str(folder)})
    except jax.errors.JaxRuntimeError as error:
        (folder / ERROR).write_text(str(error))


def _end_with(parent: Connection, folder: Path) -> None:
    """End this process when the parent is killed, which otherwise kills this process before it closes its end."""
    try:
        parent.recv()
    finally:
        _end(folder)


def _end(folder: Path) -> NoReturn:
    """Remove what the parent, which is gone, cannot."""
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Connection(int(sys.argv[2])))
