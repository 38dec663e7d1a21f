"""The process that compiles for a TPU, after its parent was killed."""

import subprocess
import sys
import time
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from mla_moe.plan import compiler_process


@pytest.mark.parametrize("sent", [[], [partial(time.sleep, 60)]], ids=["before", "while compiling"])
def test_it_ends_and_removes_the_dump(sent: list[Any], tmp_path: Path) -> None:
    folder = tmp_path / "dump"
    folder.mkdir()
    (folder / "module.after_optimizations.txt").write_text("HloModule")
    ours, theirs = Pipe()
    command = [sys.executable, "-P", compiler_process.__file__, str(folder), str(theirs.fileno())]
    with ours, subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE) as process:
        theirs.close()
        for item in (sys.path, *sent):
            ours.send(item)
        ours.close()  # as the kernel does for a parent that is killed
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (1, b"")
    assert not folder.exists()
