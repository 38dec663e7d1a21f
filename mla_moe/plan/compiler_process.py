"""The process that compiles for `compiler.compile_for_tpu`: a file that is run, so that the parent's `sys.path`, the
first thing that it reads, is in place before anything is imported."""

import os
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

ERROR = "error"
"""The file in the dump's folder that has the compiler's error."""


def main(folder: Path, parent: Connection) -> None:
    """Lower what the parent's second object returns and compile it, with a dump to `folder`."""
    sys.path[:] = parent.recv()

    import jax

    from mla_moe.plan.topology import quiet_compilers

    quiet_compilers()
    lower = parent.recv()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        lower().compile({"xla_dump_to": str(folder)})
    except jax.errors.JaxRuntimeError as error:
        (folder / ERROR).write_text(str(error))


def _end_with(parent: Connection) -> None:
    """End this process when the parent closes its end, or is killed."""
    try:
        parent.recv()
    finally:
        os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Connection(int(sys.argv[2])))
