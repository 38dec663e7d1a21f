"""Read a compiled program (the text of XLA's HLO): what a device sends, how often, and its memory traffic.

XLA's own `cost_analysis` counts the body of a loop once. Here every computation counts as often as it runs: a loop
whose condition compares with a constant by that trip count, any other loop by what the caller expects.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][\w\-]*)\((.*)$")
_COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
)  # fmt: skip
_FREE = (  # instructions without memory traffic of their own
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "partition-id", "replica-id",
    "while", "conditional", "call", "opt-barrier", "async-update",
)  # fmt: skip
_MESH_GROUP = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)

_BETWEEN_SLICES = re.compile(
    r'_xla_megascale_target="\{([\d,]+)\}x\{(\d+):(\d+)\}",_xla_megascale_transfer_type="(\w+)"'
)
"""A transfer between slices over the hosts' network: the slices, and the first and last device of each."""
_ONE_TO_ONE = {"ONE_TO_ONE": "collective-permute"}


@dataclass
class HloInstruction:
    name: str
    type: str
    opcode: str
    rest: str
    """Operands and attributes."""

    @cached_property
    def operands(self) -> list[str]:
        depth, end = 1, len(self.rest)
        for i, letter in enumerate(self.rest):
            depth += (letter in "([{") - (letter in ")]}")
            if depth == 0:
                end = i
                break
        return re.findall(r"%([\w.\-#]+)", self.rest[:end])

    @cached_property
    def scope(self) -> str:
        """JAX's name stack of the operation that it was compiled from."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1) if found else ""

    def called(self, attribute: str) -> list[str]:
        """The computations that an attribute names."""
        found = re.search(attribute + r"=\{?((?:%[\w.\-]+(?:, )?)+)", self.rest)
        return re.findall(r"%([\w.\-]+)", found.group(1)) if found else []


@dataclass
class HloComputation:
    name: str
    instructions: dict[str, HloInstruction] = field(default_factory=dict)
    root: HloInstruction | None = None

    @property
    def parameters(self) -> dict[int, str]:
        """Names of the parameters by their number."""
        found = (i for i in self.instructions.values() if i.opcode == "parameter")
        return {int(i.rest.split(")")[0]): i.name for i in found}


@dataclass
class Collective:
    """One collective of the program, over all its runs."""

    kind: str
    group: tuple[int, ...]
    """The first group of devices, by their number in the mesh."""
    size: float
    """Bytes of the full array on one device: after an all-gather, before a reduce-scatter, or exchanged."""
    runs: float
    scope: str

    @property
    def sent(self) -> float:
        """Bytes that a device sends in one run by the usual algorithms (ring, or directly)."""
        n = len(self.group)
        fraction = (n - 1) / n if n > 1 else 0.0
        passes = 2 if self.kind == "all-reduce" else 1
        return self.size if self.kind == "collective-permute" else self.size * fraction * passes


class HloModule:
    """Parses the text that `compiled.as_text()` returns.

    `loop_trips` gives the expected trip count of a loop without a known one, from its scope. `active_experts` is the
    number of matrices that a grouped matmul over experts reads; None stands for all.
    """

    def __init__(
        self, text: str, loop_trips: Callable[[str], float] = lambda scope: 1.0, active_experts: float | None = None
    ):
        self.computations: dict[str, HloComputation] = {}
        self.entry = ""
        self._loop_trips, self._active_experts = loop_trips, active_experts
        self._parse(text)

    def _parse(self, text: str) -> None:
        current = None
        for line in text.splitlines():
            if line.endswith("{") and (line.startswith("%") or line.startswith("ENTRY")):
                name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)
                assert name is not None
                current = HloComputation(name.group(1))
                self.computations[current.name] = current
                self.entry = current.name if line.startswith("ENTRY") else self.entry
            elif current is not None and (found := _INSTRUCTION.match(line)):
                instruction = HloInstruction(*found.groups())
                for name in instruction.operands if "#" in instruction.rest else ():
                    _add_tuple_element(current, name)
                current.instructions[instruction.name] = instruction
                if line.lstrip().startswith("ROOT"):
                    current.root = instruction

    def executions(self) -> Iterator[tuple[HloComputation, float, bool]]:
        """Every computation that runs, how often, and whether inside a fusion."""
        yield from self._walk(self.entry, 1.0, False)

    def _walk(self, name: str, runs: float, fused: bool) -> Iterator[tuple[HloComputation, float, bool]]:
        computation = self.computations[name]
        yield computation, runs, fused
        for instruction in computation.instructions.values():
            if instruction.opcode == "while":
                trips = self.trip_count(computation, instruction)
                yield from self._walk(instruction.called("body")[0], runs * trips, fused)
            elif instruction.opcode == "conditional":
                branches = instruction.called("branch_computations")
                branches = branches or instruction.called("true_computation") + instruction.called("false_computation")
                longest = max(branches, key=lambda branch: len(self.computations[branch].instructions))
                yield from self._walk(longest, runs, fused)
            elif instruction.opcode in ("fusion", "call", "async-start"):
                to_apply = instruction.called("to_apply")[:1] if instruction.opcode == "call" else []
                for callee in instruction.called("calls") + to_apply:
                    yield from self._walk(callee, runs, fused or instruction.opcode == "fusion")

    def trip_count(self, caller: HloComputation, loop: HloInstruction) -> float:
        """How often a while loop runs."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return float(known.group(1))
        condition = self.computations[loop.called("condition")[0]]
        test = condition.root
        operands = test.operands if test is not None else []
        limits = [_constant(condition.instructions.get(name)) for name in operands]
        if test is not None and test.opcode == "fusion":  # the operands of the comparison are those of the fusion
            test = self.computations[test.called("calls")[0]].root
        else:
            limits += [self._loop_carried(caller, loop, condition, name) for name in operands][1:]
        known_limits = [limit for limit in limits if limit is not None]
        if test is not None and test.opcode == "compare" and known_limits and "direction=LT" in test.rest:
            return float(max(known_limits))
        return self._loop_trips(loop.scope)

    def _loop_carried(
        self, caller: HloComputation, loop: HloInstruction, condition: HloComputation, name: str
    ) -> int | None:
        """A limit that the loop carries and that is a constant outside of it."""
        element = condition.instructions.get(name)
        if element is None or element.opcode != "get-tuple-element":
            return None
        index = re.search(r"index=(\d+)", element.rest)
        start = caller.instructions.get(loop.operands[0])
        if index is None or start is None or start.opcode != "tuple":
            return None
        return _constant(caller.instructions.get(start.operands[int(index.group(1))]))

    def collectives(self) -> list[Collective]:
        found = []
        for computation, runs, fused in self.executions():
            scatters = fused and any(i.opcode == "dynamic-slice" for i in computation.instructions.values())
            for instruction in computation.instructions.values():
                kind, result = instruction.opcode.removesuffix("-start"), _result_type(instruction)
                if kind == "recv" and (between := _BETWEEN_SLICES.search(instruction.rest)):
                    slices, first, last, kind = between.groups()
                    kind, result = _ONE_TO_ONE.get(kind, kind.lower().replace("_", "-")), _tuple_types(result)[0]
                    devices = int(last) - int(first) + 1
                    group = tuple(devices * i for i in range(slices.count(",") + 1))
                elif kind in _COLLECTIVES:
                    group = first_group(instruction.rest)
                else:
                    continue
                size = sum(array_bytes(match) for match in _ARRAY.finditer(result))
                if kind == "reduce-scatter":
                    size *= len(group)
                if kind == "all-reduce" and scatters:
                    kind = "reduce-scatter"  # XLA:TPU writes it as an all-reduce fused with a dynamic-slice
                found.append(Collective(kind, group, size, runs, instruction.scope))
        return found

    def memory_traffic(self) -> float:
        """Bytes between a device's HBM and its cores: operands and results of every fusion, each once."""
        total = 0.0
        for computation, runs, fused in self.executions():
            if not fused:
                total += runs * sum(self._traffic(computation, i) for i in computation.instructions.values())
        return total

    def _bytes_read(self, inner: HloComputation, name: str) -> float:
        """Bytes of a parameter that a fusion reads: only the slices, if it is only sliced (in nested fusions too)."""
        users = [i for i in inner.instructions.values() if name in i.operands]
        total = 0.0
        for user in users:
            if user.opcode in ("dynamic-slice", "gather", "slice") and user.operands[0] == name:
                total += hbm_bytes(user.type)
            elif user.opcode == "fusion":
                nested = self.computations[user.called("calls")[0]]
                total += self._bytes_read(nested, nested.parameters[user.operands.index(name)])
            else:
                return math.inf
        return total if users else math.inf

    def _traffic(self, computation: HloComputation, instruction: HloInstruction) -> float:
        if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
            return 0.0
        inner = self.computations[called[0]] if (called := instruction.called("calls")) else None
        if inner is not None and instruction.opcode == "fusion":
            return self._fusion_traffic(computation, instruction, inner)
        out = hbm_bytes(_result_type(instruction))
        operands = [computation.instructions.get(name) for name in instruction.operands]
        sizes = [hbm_bytes(o.type) * self._active_fraction(instruction, o) for o in operands if o]
        if instruction.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * out
        if instruction.opcode == "dynamic-update-slice":
            return 2 * sizes[1] if len(sizes) > 1 else 0.0
        if instruction.opcode == "copy-start":
            return sum(sizes) + sum(hbm_bytes(element) for element in _tuple_types(instruction.type)[:1])
        return out + sum(sizes)

    def _active_fraction(self, instruction: HloInstruction, operand: HloInstruction) -> float:
        """The fraction of a grouped matmul's stacked matrices that is read."""
        stack = re.match(r"\w+\[(\d+),\d+,\d+\]", operand.type)
        grouped = instruction.opcode == "custom-call" and "experts" in instruction.scope
        return min(self._active_experts / int(stack.group(1)), 1.0) if self._active_experts and grouped and stack else 1

    def _fusion_traffic(self, computation: HloComputation, fusion: HloInstruction, inner: HloComputation) -> float:
        """Operands and result, but only the slices of an operand that is sliced or updated in place."""
        total = 0.0
        if any(i.opcode == "scatter" for i in inner.instructions.values()):  # in place: the rows that it adds to
            sizes = [hbm_bytes(o.type) for n in fusion.operands if (o := computation.instructions.get(n)) is not None]
            return 3 * (sum(sizes) - max(sizes, default=0.0))
        in_place = inner.root is not None and inner.root.opcode in ("dynamic-update-slice", "bitcast", "tuple")
        updates = [i for i in inner.instructions.values() if i.opcode == "dynamic-update-slice"] if in_place else []
        updated = {_source(inner, update.operands[0]) for update in updates}
        for number, name in inner.parameters.items():
            operand = computation.instructions.get(fusion.operands[number])
            if operand is None or name in updated:
                continue
            total += min(self._bytes_read(inner, name), hbm_bytes(operand.type))
        written = sum(
            hbm_bytes(inner.instructions[update.operands[1]].type)
            for update in updates
            if update.operands[1] in inner.instructions
        )
        return total + (written if updates else hbm_bytes(fusion.type))


def _result_type(instruction: HloInstruction) -> str:
    """The type of the result; an asynchronous start's type is a tuple of operands, results and more."""
    kind = instruction.opcode.removesuffix("-start")
    started = kind != instruction.opcode and kind in _COLLECTIVES and kind != "all-reduce"
    return _tuple_types(instruction.type)[1] if started else instruction.type


def array_bytes(array: re.Match[str]) -> float:
    return float(math.prod(int(n) for n in array.group(2).split(",") if n) * _BYTES[array.group(1)])


def hbm_bytes(type_: str) -> float:
    """Bytes of the arrays of a type that are in HBM; S(n) in the layout marks another memory space."""
    return sum(array_bytes(array) for array in _ARRAY.finditer(type_) if "S(" not in (array.group(3) or ""))


def first_group(rest: str) -> tuple[int, ...]:
    """The first group of devices of a collective, in any of XLA's notations."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest):
        return int(pairs.group(1)), int(pairs.group(2))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return tuple(int(n) for n in listed.group(1).split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        ids = _iota(iota.group(3), iota.group(4)).reshape(int(iota.group(1)), int(iota.group(2)))
        return tuple(ids[0].tolist())
    mesh = _MESH_GROUP.search(rest)
    if mesh is None:
        return ()
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))}
    count = str(math.prod(sizes.values()))
    ids = _iota(mesh.group(2) or count, mesh.group(3)).reshape(tuple(sizes.values()))
    axes = re.findall(r"'([^']+)'", mesh.group(4))
    return tuple(ids[tuple(slice(None) if name in axes else 0 for name in sizes)].reshape(-1).tolist())


def _iota(sizes: str, order: str | None) -> np.ndarray:
    shape = [int(n) for n in sizes.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose([int(n) for n in order.split(",")]) if order else ids).reshape(-1)


def _constant(instruction: HloInstruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant" or instruction.type[:3] not in ("s32", "u32", "s64"):
        return None
    found = re.match(r"(\d+)\)", instruction.rest)
    return int(found.group(1)) if found else None


def _source(inner: HloComputation, name: str) -> str:
    """The array that a chain of bitcasts, copies and converts starts from."""
    instruction = inner.instructions.get(name)
    while instruction is not None and instruction.opcode in ("bitcast", "copy", "convert") and instruction.operands:
        name = instruction.operands[0]
        instruction = inner.instructions.get(name)
    return name


def _add_tuple_element(computation: HloComputation, name: str) -> None:
    """Add the get-tuple-element that `%tuple#1` stands for, a tuple's element as newer compilers write it."""
    source, _, index = name.rpartition("#")
    if source and name not in computation.instructions:
        _add_tuple_element(computation, source)
        kind = _tuple_types(computation.instructions[source].type)[int(index)]
        rest = f"%{source}), index={index}"
        computation.instructions[name] = HloInstruction(name, kind, "get-tuple-element", rest)


def _tuple_types(type_: str) -> list[str]:
    """The element types of a tuple type."""
    elements, depth = [""], 0
    for letter in re.sub(r"/\*.*?\*/", "", type_)[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            elements.append("")
        else:
            elements[-1] += letter
    return [element.strip() for element in elements]
