"""Compile a stage of a recipe for a topology, and report memory, FLOPs, collectives and the estimated step time."""

import dataclasses
import re
import resource
import sys
import textwrap
import time
from functools import partial
from typing import Any

import jax

from mla_moe.config import ConfigError, Recipe
from mla_moe.plan import stages
from mla_moe.plan.compiler import compile_for_tpu, compile_to_end
from mla_moe.plan.costs import CollectiveTraffic, collective_traffic
from mla_moe.plan.flops import count_flops
from mla_moe.plan.hlo import HloModule
from mla_moe.plan.schedule import Simulation, Stall, simulate
from mla_moe.plan.stages import DecodeOptions
from mla_moe.plan.topology import Topology


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one device of a topology needs for a run of a stage's program. Bytes, FLOPs, seconds."""

    stage: str
    topology: str
    devices: int
    mesh: dict[str, int]
    capacity_bytes: float | None
    """HBM that a program may use; None for a CPU."""
    argument_bytes: float
    temp_bytes: float
    """Besides the arguments, whose memory donated results reuse. Of a refused program: as the compiler reports it."""
    resident: dict[str, float]
    """Bytes of other arrays in memory while the program runs, by purpose."""
    sampling_bytes: float
    """Bytes while completions are sampled, without a decode step's temporaries; 0 for a stage without sampling."""
    memory: dict[str, float]
    """Bytes that are known without compiling: of the arguments, and of the temporaries gradients and layer inputs."""
    flops: float
    flops_by_kind: dict[str, float]
    useful_flops_share: float
    """FLOPs of the model's mathematics as a fraction of those that run."""
    useful_or_recomputed_flops_share: float
    """The same, with the FLOPs that rematerialisation repeats counted as useful."""
    collectives: list[CollectiveTraffic]
    memory_traffic_bytes: float
    compute_seconds: float | None
    memory_seconds: float | None
    network_seconds: float | None
    step_seconds: float | None
    """The longest of the three: the lower bound, if they overlap fully. Without overlap it is their sum."""
    mfu: float | None
    """Useful FLOPs of `step_seconds` as a fraction of the peak."""
    simulated_step_seconds: float | None
    """The forecast: the compiled schedule simulated, products at an assumed fraction of the peak (`plan.schedule`)."""
    simulated_mfu: float | None
    simulated_mfu_at_peak: float | None
    """The same, with products at the peak."""
    exposed_communication_seconds: dict[str, Any]
    """Seconds of `simulated_step_seconds` in which a device waits for collectives: `total`, `by_kind`, `by_axes`."""
    stalls: list[Stall]
    """The largest waits, with the source lines that created their instructions."""
    tokens: int
    """Tokens of one run, over all devices."""
    compile_seconds: float
    compile_memory_bytes: float
    bubble_fraction: float = 0.0
    """The fraction of a pipeline's ticks in which a stage has no microbatch. It is in the simulated step time, because
    the stage then computes what nothing uses."""
    refusal: str | None = None
    """The compiler's error, if it refuses the program for lack of memory."""

    @property
    def bytes(self) -> float:
        """Peak memory of a device."""
        return max(self.argument_bytes + self.temp_bytes + sum(self.resident.values()), self.sampling_bytes)

    @property
    def fits(self) -> bool:
        return self.refusal is None and (self.capacity_bytes is None or self.bytes <= self.capacity_bytes)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"fits": self.fits, "stalls": [stall._asdict() for stall in self.stalls]}


def make_plan(recipe: Recipe, topology: Topology, stage: str = "train", options: DecodeOptions | None = None) -> Plan:
    """Compile `stage` (`train`, `sft`, `rl` or `decode`, with its options) of a recipe. Raises `ConfigError` for a
    mesh that the topology or the recipe cannot be sharded over."""
    program = stages.trace_stage(recipe, topology, stage, options)
    flops = count_flops(program.traced.jaxpr, program.mesh.size, program.expected)
    device, total = topology.accelerator, sum(flops.values())
    start = time.perf_counter()
    refusal, text, argument_bytes, temp_bytes = None, "", 0.0, 0.0
    try:
        if topology.platform == "tpu":
            assert device is not None
            lower = partial(stages.lower_stage, recipe, topology, stage, options)
            compiled = compile_for_tpu(lower, device.hbm_bytes)
        else:
            compiled = compile_to_end(stages.lower(program, topology))
        text, argument_bytes, temp_bytes = compiled
    except jax.errors.JaxRuntimeError as error:
        refusal, argument_bytes, temp_bytes = _parse_refusal(str(error), program.memory, topology)
    seconds = time.perf_counter() - start
    expected = program.expected
    hlo = HloModule(text, expected.loop_trips, expected.active_experts) if text else None
    traffic = collective_traffic(hlo.collectives() if hlo else (), program.mesh, topology, expected.dispatch_fill)
    memory_traffic = hlo.memory_traffic() if hlo else 0.0
    times, step = (None, None, None), None
    forecast, at_peak = Simulation(), Simulation()
    if device is not None:
        times = total / device.flops, memory_traffic / device.hbm_bandwidth, sum(t.seconds for t in traffic)
        step = None if refusal else max(times)
        if hlo is not None:
            forecast = simulate(hlo, program.mesh, topology, expected)
            at_peak = simulate(hlo, program.mesh, topology, expected, at_peak=True)

    def mfu(seconds: float | None) -> float | None:
        return program.useful_flops / (seconds * device.flops) if seconds and device else None

    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return Plan(
        stage=stage, topology=topology.name, devices=program.mesh.size, mesh=dict(program.mesh.shape),
        capacity_bytes=None if device is None else device.hbm_bytes, argument_bytes=argument_bytes,
        temp_bytes=temp_bytes, resident=program.resident, sampling_bytes=program.sampling_bytes, memory=program.memory,
        flops=total, flops_by_kind=flops, useful_flops_share=program.useful_flops / total,
        useful_or_recomputed_flops_share=(program.useful_flops + program.recomputed_flops) / total,
        collectives=traffic, memory_traffic_bytes=memory_traffic, compute_seconds=times[0], memory_seconds=times[1],
        network_seconds=times[2], step_seconds=step,
        mfu=mfu(step), simulated_step_seconds=forecast.step_seconds or None, simulated_mfu=mfu(forecast.step_seconds),
        simulated_mfu_at_peak=mfu(at_peak.step_seconds), exposed_communication_seconds=forecast.exposed_communication,
        stalls=forecast.stalls, tokens=program.tokens,
        compile_seconds=seconds, compile_memory_bytes=float(peak * (1 if sys.platform == "darwin" else 1024)),
        bubble_fraction=program.bubble_fraction, refusal=refusal,
    )  # fmt: skip


def _parse_refusal(error: str, memory: dict[str, float], topology: Topology) -> tuple[str, float, float]:
    """The compiler's out-of-memory error, and the bytes of arguments and temporaries that it reports. Raises
    `ConfigError` for any other error of the compiler."""
    found = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT])", error)
    if found is None:
        fix = "change the mesh or the kernels of the recipe"
        raise ConfigError("topology", topology.name, f"the compiler reports: {textwrap.shorten(error, 400)}; {fix}")
    used = float(found.group(1)) * 1024.0 ** (1 + "KMGT".index(found.group(2)))
    argument_bytes = sum(size for kind, size in memory.items() if kind not in stages.TEMPORARIES)
    return error.splitlines()[0], argument_bytes, max(used - argument_bytes, 0.0)
