"""The process that compiles for a TPU: when its dump is complete, and after its parent was killed."""

import subprocess
import sys
import time
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from mla_moe.plan import compiler, compiler_process


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


def test_a_dump_is_complete_when_its_files_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("", "-memory-usage-report"):
        (tmp_path / f"module.after_optimizations{kind}.txt").write_text("")
    write_last = "import sys; file = open(sys.argv[1], 'w'); print(flush=True); input()"
    write_last += "; file.close(); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", write_last, str(tmp_path / "module.after_optimizations-buffer-assignment.txt")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        assert not compiler._is_complete(tmp_path, process.pid)
        print(file=process.stdin, flush=True)
        process.stdout.readline()
        assert compiler._is_complete(tmp_path, process.pid)

        def refused(path: Path) -> str:
            raise PermissionError(path)

        monkeypatch.setattr("os.readlink", refused)  # as of a process that has ended, to all but root
        assert not compiler._is_complete(tmp_path, process.pid)
