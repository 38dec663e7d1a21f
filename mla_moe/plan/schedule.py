"""Simulate a compiled program in the order in which its instructions are scheduled: the step time, and who waits.

XLA's final HLO is a schedule (`is_scheduled=true`): a device's core runs the instructions one after the other. Each
takes the longer of its matrix products and its memory traffic. What runs beside the core is a pair of instructions, a
start and a done; the core waits at the done until the operation has ended:

- A collective occupies its links from its start, or from when they are free, for its time in `plan.costs`. One without
  a pair, or fused with what consumes it, makes the core wait for all of it. XLA:TPU also writes *async collective
  fusions*, in which the core itself passes the data on inside of other fusions: these advance only there.
- A copy (`copy-start`; on GPU also `fusion-start`, which copies slices) uses the memory bandwidth that the core's own
  traffic leaves, in order.
- A computation for the SparseCore runs there at the speed of memory, in order.

A loop's body is simulated twice, and the second time stands for all later iterations. Not simulated: latency,
operations of the vector unit that take longer than their memory traffic, and memory traffic of collectives beside the
core's.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from jax.sharding import Mesh

from mla_moe.plan import costs
from mla_moe.plan.flops import ExpectedRouting
from mla_moe.plan.hlo import Collective, HloComputation, HloInstruction, HloModule
from mla_moe.plan.instruction_flops import SUSTAINED, products
from mla_moe.plan.topology import Topology

LARGEST = 10
"""Stalls that are reported."""

_STEP = re.compile(r'custom_call_target="AsyncCollective(Start|Done)"')
_FREE = (
    "after-all",
    "async-update",
    "bitcast",
    "constant",
    "get-tuple-element",
    "iota",
    "opt-barrier",
    "parameter",
    "tuple",
)


class Stall(NamedTuple):
    """Time in which the core waits, in all runs of the instructions that a source line made."""

    kind: str
    """Kind of the collective, or `copy` or `sparsecore`."""
    axes: str
    """Mesh axes of a collective, as in `CollectiveTraffic`."""
    source: str
    """File and line."""
    seconds: float


WaitKey = tuple[str, str, str]
"""Kind, axes and source of a `Stall`."""


class Transfer(NamedTuple):
    """One run of a collective."""

    seconds: float
    links: tuple[str, ...]
    wait: WaitKey


class Work(NamedTuple):
    """One run of an instruction, with the computations that it calls: the seconds of each resource if it were used
    alone."""

    flops: float
    compute: float
    memory: float
    transfers: tuple[Transfer, ...]

    @property
    def network(self) -> float:
        return sum(transfer.seconds for transfer in self.transfers)


@dataclass
class Simulation:
    """Seconds of one device and one run of a program."""

    step_seconds: float = 0.0
    flops: float = 0.0
    """Of the products that the compiled program has."""
    compute_seconds: float = 0.0
    memory_seconds: float = 0.0
    network_seconds: float = 0.0
    """Each resource's time if it were used alone. Compute is at the assumed fractions of the peak."""
    waits: dict[WaitKey, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds of waits by kind, axes and source line."""

    @property
    def stalls(self) -> list[Stall]:
        """The largest, largest first."""
        found = (Stall(*key, seconds) for key, seconds in self.waits.items())
        return sorted(found, key=lambda stall: -stall.seconds)[:LARGEST]

    @property
    def exposed_communication(self) -> dict[str, dict[str, float] | float]:
        """Seconds in which the core waits for a collective: in total, and by kind and by mesh axes."""
        waits = [(kind, axes, s) for (kind, axes, _), s in self.waits.items() if axes]
        by_kind, by_axes = defaultdict(float), defaultdict(float)
        for kind, axes, seconds in waits:
            by_kind[kind] += seconds
            by_axes[axes] += seconds
        return {"total": sum(s for _, _, s in waits), "by_kind": dict(by_kind), "by_axes": dict(by_axes)}


@dataclass(eq=False)
class _Running:
    """What runs beside the core. Two that are alike are not the same."""

    wait: WaitKey
    end: float = 0.0
    """Time at which it ends, of a collective on its links and of the SparseCore."""
    remaining: float = 0.0
    """Seconds of work left, of a copy and of an async collective fusion."""


def simulate(
    module: HloModule, mesh: Mesh, topology: Topology, expected: ExpectedRouting, *, at_peak: bool = False
) -> Simulation:
    """Simulate a module compiled for an accelerator. Products run at the fractions of the peak in `SUSTAINED`, or
    `at_peak`."""
    return _Simulator(module, mesh, topology, expected, None if at_peak else SUSTAINED).run()


class _Simulator:
    def __init__(
        self, module: HloModule, mesh: Mesh, topology: Topology, expected: ExpectedRouting,
        sustained: dict[str, float] | None,
    ):  # fmt: skip
        assert topology.accelerator is not None
        self.module, self.mesh, self.topology, self.expected = module, mesh, topology, expected
        self.device, self.sustained = topology.accelerator, sustained
        self.now, self.weight, self.result = 0.0, 1.0, Simulation()
        self.free: dict[str, float] = defaultdict(float)  # when links and engines are
        self.running: dict[str, _Running] = {}
        self.copies: list[_Running] = []
        self.work_of: dict[str, Work] = {}

    def run(self) -> Simulation:
        self._computation(self.module.computations[self.module.entry])
        return self.result

    def _computation(self, computation: HloComputation) -> None:
        for instruction in computation.instructions.values():
            self._instruction(computation, instruction)

    def _instruction(self, computation: HloComputation, instruction: HloInstruction) -> None:
        opcode = instruction.opcode
        if opcode in _FREE:
            return
        if opcode == "while":
            trips = self.module.trip_count(computation, instruction)
            body = self.module.computations[instruction.called("body")[0]]
            self._weighted(min(trips, 1.0), self._computation, body)
            self._weighted(max(trips - 1.0, 0.0), self._computation, body)
        elif opcode in ("conditional", "call"):
            self._computation(self.module.computations[self.module.callee(instruction)])
        elif opcode.endswith("-done"):
            self._wait_for(self._start_of(computation, instruction))
        else:
            self._execute(computation, instruction)

    def _weighted(self, weight: float, simulate: Callable[[HloComputation], None], body: HloComputation) -> None:
        if weight:
            outer, self.weight = self.weight, self.weight * weight
            simulate(body)
            self.weight = outer

    def _execute(self, computation: HloComputation, instruction: HloInstruction) -> None:
        work = self._work(computation, instruction)
        self._count(work)
        if instruction.opcode.endswith("-start") or instruction.opcode in ("send", "recv"):
            self.running[instruction.name] = self._start(instruction, work)
        elif steps := self._fusion_steps(instruction):
            self._async_collective_fusion(work, steps)
        else:
            for transfer in work.transfers:
                self._wait_until(self._occupy(transfer), transfer.wait)
            memory = max(work.memory - work.network, 0.0)
            self._advance(max(work.compute, memory), memory)

    def _start(self, instruction: HloInstruction, work: Work) -> "_Running":
        """Start what runs beside the core: a collective, a copy, or a computation on another engine."""
        if work.transfers:
            end = max(map(self._occupy, work.transfers))
            return _Running(work.transfers[0].wait, max(end, self.now + work.memory))
        source = self.module.source(instruction)
        if instruction.opcode in ("copy-start", "fusion-start"):
            self.copies.append(_Running(("copy", "", source), remaining=work.memory))
            return self.copies[-1]
        engine = instruction.thread or "async"
        end = max(self.now, self.free[engine]) + max(work.memory, work.compute)
        self.free[engine] = end
        return _Running((engine, "", source), end)

    def _occupy(self, transfer: Transfer) -> float:
        """The time at which a transfer that is issued now ends."""
        end = max([self.now, *(self.free[link] for link in transfer.links)]) + transfer.seconds
        self.free.update(dict.fromkeys(transfer.links, end))
        return end

    def _start_of(self, computation: HloComputation, done: HloInstruction) -> str:
        """The name of the start that a done belongs to."""
        name = done.operands[0]
        while (instruction := computation.instructions[name]).opcode in ("async-update", "get-tuple-element"):
            name = instruction.operands[0]
        return name

    def _wait_for(self, name: str) -> None:
        running = self.running.pop(name, None)
        if running is None:
            return
        while running in self.copies:
            first = self.copies[0]
            self._stall(first.remaining, running.wait)
        self._wait_until(running.end, running.wait)

    def _wait_until(self, end: float, wait: WaitKey) -> None:
        if end > self.now:
            self._stall(end - self.now, wait)

    def _stall(self, seconds: float, wait: WaitKey) -> None:
        self.result.waits[wait] += self.weight * seconds
        self._advance(seconds, 0.0)

    def _advance(self, seconds: float, memory: float) -> None:
        """Let time pass, in which the core uses the memory for `memory` seconds."""
        self.now += seconds
        self.result.step_seconds += self.weight * seconds
        spare = seconds - memory
        while self.copies and spare >= self.copies[0].remaining:
            spare -= self.copies.pop(0).remaining
        if self.copies:
            self.copies[0].remaining -= spare

    def _fusion_steps(self, fusion: HloInstruction) -> list[tuple[str, str]]:
        """The async collectives that a fusion starts, continues or ends, as pairs of a name and what it does."""
        if fusion.opcode != "fusion":
            return []
        inner = self.module.computations[fusion.called("calls")[0]]
        steps = [(found.group(1), i) for i in inner.instructions.values() if (found := _STEP.search(i.rest))]
        named = {name: i for i in inner.instructions.values() if (name := _chain(i))}
        return [(name, steps[0][0] if len(named) == 1 and steps else "Continue") for name in named]

    def _async_collective_fusion(self, work: Work, steps: list[tuple[str, str]]) -> None:
        seconds = max(work.compute, work.memory)
        for name, step in steps:
            if step == "Start":
                self.running[name] = _Running(work.transfers[0].wait, remaining=work.network)
            elif running := self.running.get(name):
                if step == "Done":
                    self._stall(running.remaining, running.wait)
                    del self.running[name]
                else:
                    running.remaining = max(running.remaining - seconds, 0.0)
        if all(step == "Continue" for _, step in steps):
            self._advance(seconds, work.memory)

    def _work(self, computation: HloComputation, instruction: HloInstruction) -> Work:
        """What one run of an instruction takes, with the computations that it calls."""
        if instruction.name not in self.work_of:
            flops, compute, memory, transfers = 0.0, 0.0, 0.0, []
            called = [(computation, instruction, False)]
            if instruction.opcode in ("fusion", "async-start"):
                executions = self.module.executions(
                    self.module.callee(instruction), fused=instruction.opcode == "fusion"
                )
                called += [(c, i, fused) for c, _, fused in executions for i in c.instructions.values()]
            for inner, i, fused in called:
                if (collective := self.module.collective(inner, i, fused)) is not None:
                    transfers.append(self._transfer(collective, instruction))
                if not fused:
                    memory += self.module.traffic(inner, i) / self.device.hbm_bandwidth
                    for product in products(self.module, inner, i, self.expected, self.device.matmul_tile):
                        flops += product.flops
                        compute += product.seconds(self.device.flops, self.sustained)
            self.work_of[instruction.name] = Work(flops, compute, memory, tuple(transfers))
        return self.work_of[instruction.name]

    def _transfer(self, collective: Collective, instruction: HloInstruction) -> Transfer:
        seconds = costs.collective_seconds(collective, self.mesh, self.topology, self.expected.dispatch_fill)
        axes = costs.traffic_axes(collective, self.mesh) or "one device"
        names = costs.links(collective, self.mesh, self.topology) if seconds else ()
        return Transfer(seconds, names, (collective.kind, axes, self.module.source(instruction)))

    def _count(self, work: Work) -> None:
        result, weight = self.result, self.weight
        result.flops += weight * work.flops
        result.compute_seconds += weight * work.compute
        result.memory_seconds += weight * work.memory
        result.network_seconds += weight * work.network


def _chain(instruction: HloInstruction) -> str:
    """The name by which the fusions of one async collective fusion repeat their collective."""
    if "async_collective_fusion_config" not in instruction.rest:
        return ""
    return "".join(re.findall(r'channel_id=\d+|chain_id="\d+"', instruction.rest))
