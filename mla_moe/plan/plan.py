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
from mla_moe.plan.compiler import compile_to_buffers
from mla_moe.plan.costs import CollectiveTraffic, collective_traffic
from mla_moe.plan.flops import ExpectedRouting, count_flops
from mla_moe.plan.hlo import HloModule
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
    """Besides the arguments, whose memory donated results reuse. If the compiler refuses the program: what it would
    need, where the compiler reports that."""
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
    tokens: int
    """Tokens of one run, over all devices."""
    compile_seconds: float
    compile_memory_bytes: float
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
        return dataclasses.asdict(self) | {"fits": self.fits}


def make_plan(recipe: Recipe, topology: Topology, stage: str = "train", options: DecodeOptions | None = None) -> Plan:
    """Compile `stage` (`train`, `rl` or `decode`, with its options) of a recipe. Raises `ConfigError` for a mesh that
    the topology or the recipe cannot be sharded over."""
    program = stages.trace(recipe, topology, stage, options)
    flops = count_flops(program.traced.jaxpr, program.mesh.size, program.expected)
    start = time.perf_counter()
    refusal, text, argument_bytes, temp_bytes = None, "", 0.0, 0.0
    try:
        text, argument_bytes, temp_bytes = compile_to_buffers(program.traced, topology.platform)
    except jax.errors.JaxRuntimeError as error:
        refusal, argument_bytes, temp_bytes = _parse_refusal(str(error), program.memory, topology)
    seconds = time.perf_counter() - start
    expected = program.expected
    hlo = HloModule(text, partial(_loop_trips, expected), expected.active_experts) if text else None
    traffic = collective_traffic(hlo.collectives() if hlo else (), program.mesh, topology, program.dispatch_fill)
    memory_traffic = hlo.memory_traffic() if hlo else 0.0
    device, total = topology.accelerator, sum(flops.values())
    times = None
    if device is not None:
        times = total / device.flops, memory_traffic / device.hbm_bandwidth, sum(t.seconds for t in traffic)
    step = None if times is None or refusal else max(times)
    return Plan(
        stage=stage,
        topology=topology.name,
        devices=program.mesh.size,
        mesh=dict(program.mesh.shape),
        capacity_bytes=None if device is None else device.hbm_bytes,
        argument_bytes=argument_bytes,
        temp_bytes=temp_bytes,
        resident=program.resident,
        sampling_bytes=program.sampling_bytes,
        memory=program.memory,
        flops=total,
        flops_by_kind=flops,
        useful_flops_share=program.useful_flops / total,
        useful_or_recomputed_flops_share=(program.useful_flops + program.recomputed_flops) / total,
        collectives=traffic,
        memory_traffic_bytes=memory_traffic,
        compute_seconds=times and times[0],
        memory_seconds=times and times[1],
        network_seconds=times and times[2],
        step_seconds=step,
        mfu=program.useful_flops / (step * device.flops) if step and device else None,
        tokens=program.tokens,
        compile_seconds=seconds,
        compile_memory_bytes=_peak_memory(),
        refusal=refusal,
    )


def _loop_trips(expected: ExpectedRouting, scope: str) -> float:
    """Expected trip count of a while loop, from JAX's name of it."""
    if "experts" in scope:
        return expected.num_chunks
    return expected.key_blocks if "attend" in scope else 1.0


def _parse_refusal(error: str, memory: dict[str, float], topology: Topology) -> tuple[str, float, float]:
    """The compiler's out-of-memory error, and the bytes of arguments and temporaries that it reports. Raises
    `ConfigError` for any other error of the compiler."""
    found = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT])", error)
    if found is None:
        fix = "change the mesh or the kernels of the recipe"
        raise ConfigError("topology", topology.name, f"the compiler says: {textwrap.shorten(error, 400)}; {fix}")
    used = float(found.group(1)) * 1024.0 ** (1 + "KMGT".index(found.group(2)))
    argument_bytes = sum(size for kind, size in memory.items() if kind not in stages.TEMPORARIES)
    return error.splitlines()[0], argument_bytes, max(used - argument_bytes, 0.0)


def _peak_memory() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
