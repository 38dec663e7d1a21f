"""Compile a stage of a recipe for a topology, and say what it takes."""

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
from mla_moe.plan.costs import Traffic, traffic
from mla_moe.plan.flops import ExpectedRouting, count_flops
from mla_moe.plan.program import Program
from mla_moe.plan.topology import Topology

STAGES = {"train": stages.train, "decode": stages.decode, "rl": stages.rl}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a stage takes on one device of a topology, unless it says otherwise. Bytes, FLOPs, seconds."""

    stage: str
    topology: str
    devices: int
    mesh: dict[str, int]
    capacity_bytes: float | None
    """None where it is not known: a CPU's is the machine's."""
    argument_bytes: float
    temp_bytes: float
    """Beside the arguments, whose memory the results take over. Where the compiler refuses the program: what it
    would need, if it says so."""
    held: dict[str, float]
    """What lives beside the program, by what it is for."""
    sampling_bytes: float
    """What lives while answers are sampled, without a decode step's temporaries; 0 where the stage samples none."""
    memory: dict[str, float]
    """Of what is known without compiling: parameters, optimizer, and of the temporaries gradients, layer inputs."""
    flops: float
    flops_by_kind: dict[str, float]
    useful_flops_share: float
    """FLOPs that the mathematics needs, of those that run."""
    useful_or_recomputed_flops_share: float
    """Counting what rematerialisation does again on purpose as useful."""
    collectives: list[Traffic]
    memory_traffic_bytes: float
    compute_seconds: float | None
    memory_seconds: float | None
    network_seconds: float | None
    step_seconds: float | None
    """The longest of the three: what is possible if they overlap. Their sum is what it takes if they never do."""
    mfu: float | None
    """Useful FLOPs in that time, of the peak."""
    tokens: int
    """Of all devices in one run."""
    compile_seconds: float
    compile_memory_bytes: float
    refusal: str | None = None
    """The compiler's words, where it does."""

    @property
    def bytes(self) -> float:
        """Of a device at the fullest time."""
        return max(self.argument_bytes + self.temp_bytes + sum(self.held.values()), self.sampling_bytes)

    @property
    def fits(self) -> bool:
        return self.refusal is None and (self.capacity_bytes is None or self.bytes <= self.capacity_bytes)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"fits": self.fits}


def make_plan(recipe: Recipe, topology: Topology, stage: str = "train", **how: Any) -> Plan:
    """Compile `stage` of a recipe; `how` is what its function in `stages` wants to know beside. Raises `ConfigError`
    for a mesh that the topology cannot have."""
    program = STAGES[stage](recipe, topology, **how)
    flops = count_flops(program.traced.jaxpr, program.mesh.size, program.expected)
    start = time.perf_counter()
    refusal, text, argument, temp = None, "", 0.0, 0.0
    try:
        text, argument, temp = compile_to_buffers(program.traced, topology.platform)
    except jax.errors.JaxRuntimeError as error:
        refusal, argument, temp = _refused(str(error), program.kinds)
    seconds = time.perf_counter() - start
    expected = program.expected
    compiled_program = Program(text, partial(_trips, expected), expected.experts) if text else None
    runs = traffic(
        compiled_program.collectives() if compiled_program else (), program.mesh, topology, program.row_share
    )
    moved = compiled_program.memory_traffic() if compiled_program else 0.0
    chip, total = topology.chip, sum(flops.values())
    times = None if chip is None else (total / chip.flops, moved / chip.hbm_bandwidth, sum(t.seconds for t in runs))
    step = None if times is None or refusal else max(times)
    return Plan(
        stage=stage,
        topology=topology.name,
        devices=program.mesh.size,
        mesh=dict(program.mesh.shape),
        capacity_bytes=None if chip is None else chip.hbm_bytes,
        argument_bytes=argument,
        temp_bytes=temp,
        held=program.held,
        sampling_bytes=program.sampling,
        memory=program.kinds,
        flops=total,
        flops_by_kind=flops,
        useful_flops_share=program.useful / total,
        useful_or_recomputed_flops_share=(program.useful + program.recomputed) / total,
        collectives=runs,
        memory_traffic_bytes=moved,
        compute_seconds=times and times[0],
        memory_seconds=times and times[1],
        network_seconds=times and times[2],
        step_seconds=step,
        mfu=program.useful / (step * chip.flops) if step and chip else None,
        tokens=program.tokens,
        compile_seconds=seconds,
        compile_memory_bytes=_peak_memory(),
        refusal=refusal,
    )


def _trips(expected: ExpectedRouting, scope: str) -> float:
    """How often a loop runs whose end the program does not say, by JAX's name of it."""
    if "experts" in scope:
        return expected.rounds
    return expected.blocks if "attend" in scope else 1.0


def _refused(error: str, kinds: dict[str, float]) -> tuple[str, float, float]:
    """The compiler's refusal for want of memory: its words, and the bytes of arguments and temporaries."""
    found = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT])", error)
    if found is None:
        raise ConfigError("topology", "compiler", textwrap.shorten(error, 400))
    used = float(found.group(1)) * 1024.0 ** (1 + "KMGT".index(found.group(2)))
    argument = sum(size for kind, size in kinds.items() if kind not in ("gradients", "layer inputs"))
    return error.splitlines()[0], argument, max(used - argument, 0.0)


def _peak_memory() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
