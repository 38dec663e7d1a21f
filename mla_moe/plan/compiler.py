"""Compile a traced program as far as a plan needs: to its final text and the place of every buffer."""

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
    """A program whose buffers have their places. Bytes of one device."""

    text: str
    arguments: float
    temporaries: float
    """With the results that do not take over an argument's memory."""


def compile_to_buffers(traced: Traced, platform: str) -> CompiledProgram:
    """Raises `jax.errors.JaxRuntimeError` where the compiler refuses the program."""
    with without_cache():
        if platform == "tpu":
            return _assign_for_tpu(traced)
        compiled = traced.lower(lowering_platforms=(platform,)).compile()
        return CompiledProgram(compiled.as_text() or "", *bytes_needed(compiled))


def _assign_for_tpu(traced: Traced) -> CompiledProgram:
    """The TPU compiler writes down what it has assigned, then makes machine code of every fusion, which is nine tenths
    of its time and changes nothing of that. No option ends it there; a call that no emitter knows does."""
    lowered = traced.lower(lowering_platforms=("tpu",))
    with tempfile.TemporaryDirectory() as folder, unknown_call(lowered.compiler_ir()):
        try:
            lowered.compile({"xla_dump_to": folder})
        except jax.errors.JaxRuntimeError as error:
            if _END not in str(error):
                raise
        return _read(Path(folder))


@contextmanager
def unknown_call(module: Any) -> Generator[None]:
    """Let the smallest result of a module pass through a call that no compiler knows, for a while: JAX gives the same
    module to whoever lowers the same program again."""
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


def _read(folder: Path) -> CompiledProgram:
    """What the TPU compiler wrote down. Main memory is that of its assignment, by which it accepts or refuses a
    program; `memory_analysis` counts some values that share their place as if they did not."""

    def written(what: str) -> str:
        files = list(folder.glob(f"*.after_optimizations{what}.txt"))
        if len(files) != 1:
            said = f"wrote {len(files)} files like {what or 'program'}.txt, not one; take that of requirements.lock"
            raise ConfigError("libtpu", version("libtpu"), said)
        return files[0].read_text()

    total = re.search(r"\(color=0\)\nTotal bytes: (\d+)", written("-memory-usage-report"))
    assert total is not None
    parameters = re.compile(r"^allocation \d+: size (\d+),.* parameter \d+,", re.MULTILINE)
    arguments = float(sum(map(int, parameters.findall(written("-buffer-assignment")))))
    return CompiledProgram(written(""), arguments, float(total.group(1)) - arguments)


def bytes_needed(compiled: Compiled) -> tuple[float, float]:
    """Of arguments and of temporaries. Results that do not take over an argument's memory are new memory."""
    memory: Any = compiled.memory_analysis()
    temp = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return float(memory.argument_size_in_bytes), float(temp)


@contextmanager
def without_cache() -> Generator[None]:
    """What is compiled for absent devices cannot be read back from JAX's cache."""
    before = jax.config.values["jax_enable_compilation_cache"]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
