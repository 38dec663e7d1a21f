"""The process that compiles for `compiler.compile_for_tpu`: a file that is run, so that the parent's `sys.path`, the
first thing that it reads, is in place before anything is imported."""

import os
import pickle
import sys
import threading
from pathlib import Path

ERROR = "error"
"""The file in the dump's folder that has the compiler's error."""


def main(folder: Path) -> None:
    """Lower what the second pickle of standard input returns and compile it, with a dump to `folder`."""
    sys.path[:] = pickle.load(sys.stdin.buffer)

    import jax

    from mla_moe.plan.topology import quiet_compilers

    quiet_compilers()
    lower = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        lower().compile({"xla_dump_to": str(folder)})
    except jax.errors.JaxRuntimeError as error:
        (folder / ERROR).write_text(str(error))


def _end_with_parent() -> None:
    """The parent keeps standard input open while it lives."""
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
