"""Read a compiled program (XLA's text of it): what a device sends, how often, and what it moves through its memory.

XLA's own `cost_analysis` counts the body of a loop once. Here every computation counts as often as it runs: a loop
whose condition compares with a constant as often as that says, another as often as the caller expects.
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
_FREE = (  # what moves nothing by itself
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "partition-id", "replica-id",
    "while", "conditional", "call", "opt-barrier", "async-update",
)  # fmt: skip
_MESH_GROUP = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)

_BETWEEN_SLICES = re.compile(
    r'_xla_megascale_target="\{([\d,]+)\}x\{(\d+):(\d+)\}",_xla_megascale_transfer_type="(\w+)"'
)
"""Slices, and the first and last device of each, of what travels from host to host."""
_ONE_TO_ONE = {"ONE_TO_ONE": "collective-permute"}


@dataclass
class Instruction:
    name: str
    type: str
    op: str
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
        """JAX's name of what it came from."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1) if found else ""

    def called(self, attribute: str) -> list[str]:
        found = re.search(attribute + r"=\{?((?:%[\w.\-]+(?:, )?)+)", self.rest)
        return re.findall(r"%([\w.\-]+)", found.group(1)) if found else []


@dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: Instruction | None = None


@dataclass
class Collective:
    """One collective of the program, over all its runs."""

    kind: str
    group: tuple[int, ...]
    """The devices, by their number in the mesh, of the first group."""
    size: float
    """Bytes of the whole array on one device: gathered, before it is scattered, or exchanged."""
    times: float
    scope: str

    @property
    def sent(self) -> float:
        """Bytes that a device sends in one run by the usual algorithms (a ring, or directly)."""
        n = len(self.group)
        away = (n - 1) / n if n > 1 else 0.0
        twice = 2 if self.kind == "all-reduce" else 1
        return self.size if self.kind == "collective-permute" else self.size * away * twice


Trips = Callable[[str], float]
"""From the name of a loop without a known end to how often it is expected to run."""


class Program:
    """`text` is what `compiled.as_text()` gives. `experts` is how many of a grouped product's matrices are read; None
    stands for all."""

    def __init__(self, text: str, trips: Trips = lambda scope: 1.0, experts: float | None = None):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        self._trips, self._experts = trips, experts
        self._read(text)

    def _read(self, text: str) -> None:
        now = None
        for line in text.splitlines():
            if line.endswith("{") and (line.startswith("%") or line.startswith("ENTRY")):
                name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)
                assert name is not None
                now = Computation(name.group(1))
                self.computations[now.name] = now
                self.entry = now.name if line.startswith("ENTRY") else self.entry
            elif now is not None and (found := _INSTRUCTION.match(line)):
                instruction = Instruction(*found.groups())
                for name in instruction.operands if "#" in instruction.rest else ():
                    _name_element(now, name)
                now.instructions[instruction.name] = instruction
                if line.lstrip().startswith("ROOT"):
                    now.root = instruction

    def runs(self) -> Iterator[tuple[Computation, float, bool]]:
        """Every computation that runs, how often, and whether as the inside of a fusion."""
        yield from self._walk(self.entry, 1.0, False)

    def _walk(self, name: str, times: float, fused: bool) -> Iterator[tuple[Computation, float, bool]]:
        computation = self.computations[name]
        yield computation, times, fused
        for instruction in computation.instructions.values():
            if instruction.op == "while":
                trips = self.trip_count(computation, instruction)
                yield from self._walk(instruction.called("body")[0], times * trips, fused)
            elif instruction.op == "conditional":
                branches = instruction.called("branch_computations")
                branches = branches or instruction.called("true_computation") + instruction.called("false_computation")
                longest = max(branches, key=lambda branch: len(self.computations[branch].instructions))
                yield from self._walk(longest, times, fused)
            elif instruction.op in ("fusion", "call", "async-start"):
                for called in instruction.called("calls") + instruction.called("to_apply")[: instruction.op == "call"]:
                    yield from self._walk(called, times, fused or instruction.op == "fusion")

    def trip_count(self, caller: Computation, loop: Instruction) -> float:
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return float(known.group(1))
        condition = self.computations[loop.called("condition")[0]]
        test = condition.root
        if test is not None and test.op == "fusion":  # the comparison's operands are the fusion's
            inner = self.computations[test.called("calls")[0]]
            limits = [_constant(condition.instructions.get(name)) for name in test.operands]
            test = inner.root
        else:
            limits = [_constant(condition.instructions.get(name)) for name in (test.operands if test else [])]
            limits += [self._carried(caller, loop, condition, name) for name in (test.operands if test else [])][1:]
        known_limits = [limit for limit in limits if limit is not None]
        if test is not None and test.op == "compare" and known_limits and "direction=LT" in test.rest:
            return float(max(known_limits))
        return self._trips(loop.scope)

    def _carried(self, caller: Computation, loop: Instruction, condition: Computation, name: str) -> int | None:
        """A limit that the loop carries from a constant outside."""
        element = condition.instructions.get(name)
        if element is None or element.op != "get-tuple-element":
            return None
        index = re.search(r"index=(\d+)", element.rest)
        start = caller.instructions.get(loop.operands[0])
        if index is None or start is None or start.op != "tuple":
            return None
        return _constant(caller.instructions.get(start.operands[int(index.group(1))]))

    def collectives(self) -> list[Collective]:
        found = []
        for computation, times, fused in self.runs():
            scatters = fused and any(i.op == "dynamic-slice" for i in computation.instructions.values())
            for instruction in computation.instructions.values():
                kind, made = instruction.op.removesuffix("-start"), _result(instruction)
                if kind == "recv" and (between := _BETWEEN_SLICES.search(instruction.rest)):
                    slices, first, last, kind = between.groups()
                    kind, made = _ONE_TO_ONE.get(kind, kind.lower().replace("_", "-")), _parts(made)[0]
                    devices = int(last) - int(first) + 1
                    group = tuple(devices * i for i in range(slices.count(",") + 1))
                elif kind in _COLLECTIVES:
                    group = first_group(instruction.rest)
                else:
                    continue
                size = sum(size_of(match) for match in _ARRAY.finditer(made))
                if kind == "reduce-scatter":
                    size *= len(group)
                if kind == "all-reduce" and scatters:
                    kind = "reduce-scatter"  # the TPU compiler's form of it
                found.append(Collective(kind, group, size, times, instruction.scope))
        return found

    def memory_traffic(self) -> float:
        """Bytes that pass between a device's memory and its cores: operands and results of every fusion, each once."""
        total = 0.0
        for computation, times, fused in self.runs():
            if not fused:
                total += times * sum(self._traffic(computation, i) for i in computation.instructions.values())
        return total

    def _taken(self, inner: Computation, name: str) -> float:
        """Bytes that a fusion, or one inside it, looks at of an operand: where it only cuts, the parts."""
        users = [i for i in inner.instructions.values() if name in i.operands]
        total = 0.0
        for user in users:
            if user.op in ("dynamic-slice", "gather", "slice") and user.operands[0] == name:
                total += hbm_bytes(user.type)
            elif user.op == "fusion":
                nested = self.computations[user.called("calls")[0]]
                parameters = {
                    int(i.rest.split(")")[0]): i.name for i in nested.instructions.values() if i.op == "parameter"
                }
                total += self._taken(nested, parameters[user.operands.index(name)])
            else:
                return math.inf
        return total if users else math.inf

    def _traffic(self, computation: Computation, instruction: Instruction) -> float:
        if instruction.op in _FREE or instruction.op.endswith("-done"):
            return 0.0
        inner = self.computations[called[0]] if (called := instruction.called("calls")) else None
        if inner is not None and instruction.op == "fusion":
            return self._fused_traffic(computation, instruction, inner)
        out = hbm_bytes(_result(instruction))
        operands = [computation.instructions.get(name) for name in instruction.operands]
        sizes = [hbm_bytes(operand.type) * self._share(instruction, operand) for operand in operands if operand]
        if instruction.op in ("dynamic-slice", "slice", "gather"):
            return 2 * out
        if instruction.op == "dynamic-update-slice":
            return 2 * sizes[1] if len(sizes) > 1 else 0.0
        if instruction.op == "copy-start":
            return sum(sizes) + sum(hbm_bytes(part) for part in _parts(instruction.type)[:1])
        return out + sum(sizes)

    def _share(self, instruction: Instruction, operand: Instruction) -> float:
        """Of a grouped product's stack of matrices, those that are read."""
        stack = re.match(r"\w+\[(\d+),\d+,\d+\]", operand.type)
        grouped = instruction.op == "custom-call" and "experts" in instruction.scope
        return min(self._experts / int(stack.group(1)), 1.0) if self._experts and grouped and stack else 1.0

    def _fused_traffic(self, computation: Computation, fusion: Instruction, inner: Computation) -> float:
        """Of an operand that is only sliced or looked up, what is taken; of one updated in place, what is written."""
        parameters = {i.name: int(i.rest.split(")")[0]) for i in inner.instructions.values() if i.op == "parameter"}
        total = 0.0
        if any(i.op == "scatter" for i in inner.instructions.values()):  # in place: the rows that it adds to
            sizes = [hbm_bytes(o.type) for n in fusion.operands if (o := computation.instructions.get(n)) is not None]
            return 3 * (sum(sizes) - max(sizes, default=0.0))
        in_place = inner.root is not None and inner.root.op in ("dynamic-update-slice", "bitcast", "tuple")
        updates = [i for i in inner.instructions.values() if i.op == "dynamic-update-slice"] if in_place else []
        updated = {_source(inner, update.operands[0]) for update in updates}
        for name, number in parameters.items():
            operand = computation.instructions.get(fusion.operands[number])
            if operand is None or name in updated:
                continue
            total += min(self._taken(inner, name), hbm_bytes(operand.type))
        written = sum(
            hbm_bytes(inner.instructions[update.operands[1]].type)
            for update in updates
            if update.operands[1] in inner.instructions
        )
        return total + (written if updates else hbm_bytes(fusion.type))


def _result(instruction: Instruction) -> str:
    """The type of what it makes. That of a collective that is started names operands, results and more."""
    kind = instruction.op.removesuffix("-start")
    started = kind != instruction.op and kind in _COLLECTIVES and kind != "all-reduce"
    return _parts(instruction.type)[1] if started else instruction.type


def size_of(array: re.Match[str]) -> float:
    return float(math.prod(int(n) for n in array.group(2).split(",") if n) * _BYTES[array.group(1)])


def hbm_bytes(type_: str) -> float:
    """Bytes of the arrays of a type that lie in a device's main memory; S(n) marks another."""
    return sum(size_of(array) for array in _ARRAY.finditer(type_) if "S(" not in (array.group(3) or ""))


def first_group(rest: str) -> tuple[int, ...]:
    """The first group of devices, in whichever of XLA's notations it is written."""
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


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.op != "constant" or instruction.type[:3] not in ("s32", "u32", "s64"):
        return None
    found = re.match(r"(\d+)\)", instruction.rest)
    return int(found.group(1)) if found else None


def _source(inner: Computation, name: str) -> str:
    """Through bitcasts to where an array comes from."""
    instruction = inner.instructions.get(name)
    while instruction is not None and instruction.op in ("bitcast", "copy", "convert") and instruction.operands:
        name = instruction.operands[0]
        instruction = inner.instructions.get(name)
    return name


def _name_element(computation: Computation, name: str) -> None:
    """`%tuple#1`, as newer compilers write an element in place, is an instruction that takes it out here."""
    whole, _, index = name.rpartition("#")
    if whole and name not in computation.instructions:
        _name_element(computation, whole)
        kind = _parts(computation.instructions[whole].type)[int(index)]
        rest = f"%{whole}), index={index}"
        computation.instructions[name] = Instruction(name, kind, "get-tuple-element", rest)


def _parts(type_: str) -> list[str]:
    """Of a tuple's type."""
    parts, depth = [""], 0
    for letter in re.sub(r"/\*.*?\*/", "", type_)[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]
