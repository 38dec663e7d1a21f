"""Compile a traced program as far as a plan needs: to its final HLO and XLA's buffer assignment."""

import math
import re
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.stages import Compiled, Traced

from mla_moe.config import ConfigError

_END = "end_of_plan"


class CompiledProgram(NamedTuple):
    """The final HLO of a program, and the bytes on one device that its buffers take."""

    text: str
    argument_bytes: float
    temp_bytes: float
    """Including results, except those that reuse the memory of a donated argument."""


def compile_to_buffers(traced: Traced, platform: str) -> CompiledProgram:
    """Compile up to buffer assignment. Raises `jax.errors.JaxRuntimeError` if the compiler refuses the program."""
    with without_compilation_cache():
        if platform == "tpu":
            return _compile_for_tpu(traced)
        compiled = traced.lower(lowering_platforms=(platform,)).compile()
        return CompiledProgram(compiled.as_text() or "", *memory_bytes(compiled))


def _compile_for_tpu(traced: Traced) -> CompiledProgram:
    """XLA:TPU dumps the buffer assignment, then generates code for every fusion, which takes long (nine tenths of its
    time, where no code for SparseCores comes before) and changes nothing in the plan. No option stops it there; an
    unknown custom call makes code generation fail."""
    lowered = traced.lower(lowering_platforms=("tpu",))
    with tempfile.TemporaryDirectory() as folder, unknown_custom_call(lowered.compiler_ir()):
        try:
            lowered.compile({"xla_dump_to": folder})
        except jax.errors.JaxRuntimeError as error:
            if _END not in str(error):
                raise
        return _read_dump(Path(folder))


@contextmanager
def unknown_custom_call(module: Any) -> Generator[None]:
    """Pass the smallest result of a module through an unknown custom call. The change is undone at the end: JAX returns
    the same module when the same program is lowered again."""
    with module.context, ir.Location.unknown():
        main = next(f for f in module.body.operations if ir.StringAttr(f.attributes["sym_name"]).value == "main")
        end = list(main.regions[0].blocks[0].operations)[-1]
        shapes = [ir.RankedTensorType(result.type).shape for result in end.operands]
        smallest = min(range(len(shapes)), key=lambda i: math.prod(shapes[i]))
        result = end.operands[smallest]
        with ir.InsertionPoint(end):
            call = stablehlo.CustomCallOp([result.type], [result], call_target_name=_END)
        end.operands[smallest] = call.results[0]
        try:
            yield
        finally:
            end.operands[smallest] = result
            call.operation.erase()


def _read_dump(folder: Path) -> CompiledProgram:
    """Parse XLA:TPU's dump. Its buffer assignment decides whether a program is accepted; `memory_analysis` reports
    more, because it counts some values that share a buffer separately."""

    def dumped(kind: str) -> str:
        files = list(folder.glob(f"*.after_optimizations{kind}.txt"))
        if len(files) != 1:
            fix = f"dumped {len(files)} files *{kind or 'after_optimizations'}.txt, not one; install the version in"
            raise ConfigError("libtpu", version("libtpu"), f"{fix} requirements.lock")
        return files[0].read_text()

    total = re.search(r"\(color=0\)\nTotal bytes: (\d+)", dumped("-memory-usage-report"))
    assert total is not None
    parameters = re.compile(r"^allocation \d+: size (\d+),.* parameter \d+,", re.MULTILINE)
    arguments = float(sum(map(int, parameters.findall(dumped("-buffer-assignment")))))
    return CompiledProgram(dumped(""), arguments, float(total.group(1)) - arguments)


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
