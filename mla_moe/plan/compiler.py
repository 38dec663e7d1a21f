"""Compile a traced program as far as a plan needs: to its final HLO and XLA's buffer assignment."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.stages import Compiled, Lowered

from mla_moe.config import ConfigError
from mla_moe.plan import compiler_process

_HLO = ""
_MEMORY = "-memory-usage-report"
_BUFFERS = "-buffer-assignment"


class CompiledProgram(NamedTuple):
    """The final HLO of a program, and the bytes on one device that its buffers take."""

    text: str
    argument_bytes: float
    temp_bytes: float
    """Including results, except those that reuse the memory of a donated argument."""


def compile_to_end(lowered: Lowered) -> CompiledProgram:
    """Raises `jax.errors.JaxRuntimeError` if the compiler refuses the program."""
    with without_compilation_cache():
        compiled = lowered.compile()
    return CompiledProgram(compiled.as_text() or "", *memory_bytes(compiled))


def compile_for_tpu(lower: Callable[[], Lowered], capacity_bytes: float) -> CompiledProgram:
    """Compile the program that `lower`, which is picklable, returns, up to buffer assignment.

    XLA:TPU dumps the final HLO and the buffer assignment, then generates the machine code of SparseCores and fusions.
    That takes many times as long and changes nothing in the plan, and no option stops it: so another process compiles,
    which is killed once the dump is complete. A program that needs more than `capacity_bytes` is refused soon after it.
    Raises `jax.errors.JaxRuntimeError` if the compiler refuses the program.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, program = Path(name).resolve(), None  # as /proc has it
        log, error = folder / "log", folder / compiler_process.ERROR
        (ours, theirs), env = Pipe(), {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
        command = [sys.executable, "-P", compiler_process.__file__, name, str(theirs.fileno())]
        with ours, theirs, log.open("wb") as output, subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=os.environ | env,
            pass_fds=[theirs.fileno()],
        ) as process:  # fmt: skip
            try:
                theirs.close()
                ours.send(sys.path)
                ours.send(lower)
                while process.poll() is None and not _is_complete(folder, process.pid):
                    time.sleep(0.1)
                if process.returncode is None:
                    program = _read_dump(folder)
                    if program.argument_bytes + program.temp_bytes > capacity_bytes:
                        process.wait()
            finally:
                process.kill()
        if error.exists():
            raise jax.errors.JaxRuntimeError(error.read_text())
        if program is None and process.returncode:
            said = log.read_text(errors="replace").strip()[-300:]
            raise jax.errors.JaxRuntimeError(f"its process ended with status {process.returncode}: {said}")
        return program or _read_dump(folder)


def _is_complete(folder: Path, process: int) -> bool:
    """Whether the files of a dump exist, and the process that writes them has none open: each is written at once."""
    if not all(any(folder.glob(_file(kind))) for kind in (_HLO, _MEMORY, _BUFFERS)):
        return False
    try:
        opened = [os.readlink(link) for link in Path(f"/proc/{process}/fd").iterdir()]
    except (FileNotFoundError, PermissionError):  # closed since, or the process has ended, whose entry is root's then
        return False
    return not any(Path(path).suffix == ".txt" and Path(path).parent == folder for path in opened)


def _file(kind: str) -> str:
    return f"*.after_optimizations{kind}.txt"


def _read_dump(folder: Path) -> CompiledProgram:
    """Parse XLA:TPU's dump. Its buffer assignment decides whether a program is accepted; `memory_analysis` reports
    more, because it counts some values that share a buffer separately."""

    def dumped(kind: str) -> str:
        files = list(folder.glob(_file(kind)))
        if len(files) != 1:
            fix = f"dumped {len(files)} files {_file(kind)}, not one; install the version in requirements.lock"
            raise ConfigError("libtpu", version("libtpu"), fix)
        return files[0].read_text()

    total = re.search(r"\(color=0\)\nTotal bytes: (\d+)", dumped(_MEMORY))
    assert total is not None
    parameters = re.compile(r"^allocation \d+: size (\d+),.* parameter \d+,", re.MULTILINE)
    arguments = float(sum(map(int, parameters.findall(dumped(_BUFFERS)))))
    return CompiledProgram(dumped(_HLO), arguments, float(total.group(1)) - arguments)


def memory_bytes(compiled: Compiled) -> tuple[float, float]:
    """Bytes of arguments and of temporaries by `memory_analysis`, and of results that reuse no donated argument."""
    memory: Any = compiled.memory_analysis()
    temp = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return float(memory.argument_size_in_bytes), float(temp)


@contextmanager
def without_compilation_cache() -> Generator[None]:
    """Turn JAX's persistent compilation cache off: a program compiled for absent devices cannot be read back."""
    before = jax.config.values["jax_enable_compilation_cache"]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
