"""Profiles of a stage: a trace of some steps, its compiled program, and what was in memory when memory ran out."""

import contextlib
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

import jax

from mla_moe.config import ProfileConfig
from mla_moe.training.console import bytes_
from mla_moe.training.errors import TrainingHaltedError


class StepTracer(contextlib.AbstractContextManager["StepTracer"]):
    """Traces the steps of `profile.steps` with JAX's profiler, in the first process."""

    def __init__(self, profile: ProfileConfig, directory: Path, log: Callable[[str], None]):
        self._steps, self._directory, self._log = profile.traced_steps or range(0), directory, log
        self._active, self._traces = False, jax.process_index() == 0

    def step(self, number: int) -> contextlib.AbstractContextManager[object]:
        """The context in which step `number` is dispatched. The first one of `profile.steps` starts the trace."""
        if number not in self._steps or not self._traces:
            return contextlib.nullcontext()
        if not self._active:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # each Python call would be an event: a hundred times the size
            jax.profiler.start_trace(self._directory, profiler_options=options)
            self._active = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def stop_after(self, number: int, wait: Callable[[], None]) -> None:
        """End the trace if step `number` is its last. All processes `wait`, until the devices have finished that step:
        it may raise, which they must do after the same step."""
        if number in self._steps[-1:]:
            wait()
            if self._active:
                self._stop()

    def _stop(self) -> None:
        self._active = False
        jax.profiler.stop_trace()
        self._log(f"trace of steps {self._steps[0]} to {self._steps[-1]}: {self._directory}")

    def __exit__(self, *_: object) -> None:
        if self._active:
            self._stop()


def write_program(directory: Path, name: str, lowered: jax.stages.Lowered, compiled: jax.stages.Compiled) -> None:
    """Write a program as traced, with the named scopes as locations, and as compiled."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.stablehlo.mlir").write_text(lowered.as_text(debug_info=True))
    (directory / f"{name}.compiled.hlo").write_text(compiled.as_text() or "")


@contextlib.contextmanager
def explain_out_of_memory(directory: Path, recipe: Path, memory: Callable[[], Mapping[str, float]]) -> Generator[None]:
    """When the devices run out of memory, write what they hold as `memory.prof`, and raise `TrainingHaltedError` that
    says what the stage needs: `memory` returns bytes per device by name, as `mla-moe plan` prints them. `recipe` is the
    run's recipe.json."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        if not reason.startswith("RESOURCE_EXHAUSTED"):
            raise
        path = directory / f"memory.{jax.process_index()}.prof"
        directory.mkdir(parents=True, exist_ok=True)
        jax.profiler.save_device_memory_profile(str(path))
        needs = ", ".join(f"{bytes_(size)} of {name}" for name, size in memory().items())
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        raise TrainingHaltedError(
            f"out of memory: a device needs {needs}{f'; it has {bytes_(limit)}' if limit else ''}; what it held is in "
            f"{path} (docs/profiles.md); raise gradient accumulation or remat, shorten sequences or shard over more "
            f"devices: `mla-moe plan {recipe} --topology … --search` finds settings that fit ({reason[:300]})"
        ) from None
