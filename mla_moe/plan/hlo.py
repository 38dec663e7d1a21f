"""Read a compiled program (the text of XLA's HLO): what a device sends, how often, and its memory traffic.

XLA's own `cost_analysis` counts the body of a loop once. Here every computation counts as often as it runs: a loop
whose condition compares with a constant by that trip count, any other loop by what the caller expects.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from mla_moe.plan.source_lines import SourceLines

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][\w\-]*)\((.*)$")
_COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
)  # fmt: skip
_FREE = (  # instructions without memory traffic of their own
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "partition-id", "replica-id",
    "while", "conditional", "call", "opt-barrier", "async-start", "async-update",
)  # fmt: skip
_MESH_GROUP = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)

_BETWEEN_SLICES = re.compile(
    r'_xla_megascale_target="\{([\d,]+)\}x\{(\d+):(\d+)\}",_xla_megascale_transfer_type="(\w+)"'
)
"""A transfer between slices over the hosts' network: the slices, and the first and last device of each."""

_FUSIONS = "fusion", "fusion-start"  # the second is asynchronous: XLA:GPU copies slices so
_CONTINUATION = re.compile(r'"async_collective_fusion_config":\{"flag_start":"\d')
"""A collective that XLA:TPU started in another fusion, and repeats in every fusion that continues it."""


@dataclass
class HloInstruction:
    name: str
    type: str
    opcode: str
    rest: str
    """Operands and attributes."""

    @cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-#]+)", ",".join(_list_elements(self.rest)))

    @cached_property
    def scope(self) -> str:
        """JAX's name stack of the operation that it was compiled from."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1) if found else ""

    @cached_property
    def thread(self) -> str:
        """The engine that executes an asynchronous computation, empty for the device's own."""
        found = re.search(r'async_execution_thread="(\w+)"', self.rest)
        return found.group(1) if found else ""

    def called(self, attributes: str) -> list[str]:
        """The computations that some attributes (a regular expression) name."""
        found = re.findall(rf"(?:{attributes})=\{{?((?:%[\w.\-]+(?:, )?)+)", self.rest)
        return re.findall(r"%([\w.\-]+)", " ".join(found))


@dataclass
class HloComputation:
    name: str
    instructions: dict[str, HloInstruction] = field(default_factory=dict)
    root: HloInstruction = field(init=False)

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

    @property
    def sent(self) -> float:
        """Bytes that a device sends in one run by the usual algorithms (ring, or directly)."""
        if self.kind == "collective-permute":
            return self.size
        n = max(len(self.group), 1)
        return self.size * ((n - 1) / n) * (2 if self.kind == "all-reduce" else 1)


class HloModule:
    """Parses the text that `compiled.as_text()` returns. `loop_trips` gives the expected trip count of a loop without a
    known one, from its scope. `active_experts` is the number of matrices that a grouped matmul over experts reads; None
    stands for all."""

    def __init__(
        self, text: str, loop_trips: Callable[[str], float] = lambda scope: 1.0, active_experts: float | None = None
    ):
        self.computations: dict[str, HloComputation] = {}
        self.entry = ""
        self._lines = SourceLines(text)
        self._loop_trips, self._active_experts = loop_trips, active_experts
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

    def executions(
        self, name: str | None = None, runs: float = 1.0, fused: bool = False
    ) -> Iterator[tuple[HloComputation, float, bool]]:
        """Every computation that runs, by default from the entry on, how often, and whether inside a fusion."""
        computation = self.computations[name or self.entry]
        yield computation, runs, fused
        for instruction in computation.instructions.values():
            if instruction.opcode == "while":
                trips = self.trip_count(computation, instruction)
                yield from self.executions(instruction.called("body")[0], runs * trips, fused)
            elif instruction.opcode in ("conditional", "call", *_FUSIONS, "async-start"):
                yield from self.executions(self.callee(instruction), runs, fused or instruction.opcode in _FUSIONS)

    def callee(self, instruction: HloInstruction) -> str:
        """The computation that an instruction runs; of a conditional's branches the longest."""
        if instruction.opcode != "conditional":
            return instruction.called("calls|to_apply" if instruction.opcode == "call" else "calls")[0]
        branches = instruction.called("branch_computations|true_computation|false_computation")
        return max(branches, key=lambda branch: len(self.computations[branch].instructions))

    def trip_count(self, caller: HloComputation, loop: HloInstruction) -> float:
        """How often a while loop runs."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return float(known.group(1))
        condition = self.computations[loop.called("condition")[0]]
        test = condition.root
        operands = [condition.instructions.get(name) for name in test.operands]
        limits = [_constant(operand) for operand in operands]
        if test.opcode == "fusion":  # the operands of the comparison are those of the fusion
            test = self.computations[test.called("calls")[0]].root
        else:
            limits += [_loop_carried(caller, loop, operand) for operand in operands[1:]]
        known_limits = [limit for limit in limits if limit is not None]
        if test.opcode == "compare" and known_limits and "direction=LT" in test.rest:
            return float(max(known_limits))
        return self._loop_trips(loop.scope)

    def source(self, instruction: HloInstruction) -> str:
        """`file.py:line` of the innermost line outside of installed packages that an instruction was compiled from, or
        of its computation's first one that has a line; empty if unknown."""
        pending, seen = [instruction], 0
        while pending and seen < 50:
            found, seen = pending.pop(0), seen + 1
            if line := self._lines.line(found.rest):
                return line
            for callee in found.called("calls"):
                pending += self.computations[callee].instructions.values()
        return ""

    def collectives(self) -> list[Collective]:
        return [
            replace(collective, runs=runs)
            for computation, runs, fused in self.executions()
            for instruction in computation.instructions.values()
            if (collective := self.collective(computation, instruction, fused)) is not None
        ]

    def collective(
        self, computation: HloComputation, instruction: HloInstruction, fused: bool = False
    ) -> Collective | None:
        """One run of a collective, if the instruction is one or starts one."""
        kind, result = instruction.opcode.removesuffix("-start"), _result_type(instruction)
        if kind == "recv" and (between := _BETWEEN_SLICES.search(instruction.rest)):
            slices, first, last, kind = between.groups()
            kind = "collective-permute" if kind == "ONE_TO_ONE" else kind.lower().replace("_", "-")
            result = _tuple_types(result)[0]
            devices = int(last) - int(first) + 1
            group = tuple(devices * i for i in range(slices.count(",") + 1))
        elif kind in _COLLECTIVES and not _CONTINUATION.search(instruction.rest):
            group = first_group(instruction.rest)
        else:
            return None
        size = sum(array_bytes(match) for match in _ARRAY.finditer(result))
        if kind == "reduce-scatter":
            size *= len(group)
        if kind == "all-reduce" and fused:
            # XLA:TPU writes a reduce-scatter as an all-reduce fused with a dynamic-slice.
            scatters = any(i.opcode == "dynamic-slice" for i in computation.instructions.values())
            kind = "reduce-scatter" if scatters else kind
        return Collective(kind, group, size, 1.0)

    def memory_traffic(self) -> float:
        """Bytes between a device's HBM and its cores: operands and results of every fusion, each once."""
        return sum(
            runs * sum(self.traffic(computation, i) for i in computation.instructions.values())
            for computation, runs, fused in self.executions()
            if not fused
        )

    def _bytes_read(self, inner: HloComputation, name: str) -> float:
        """Bytes of a parameter that a fusion reads: only the slices, if it is only sliced (in nested fusions too)."""
        users = [i for i in inner.instructions.values() if name in i.operands]
        total = 0.0
        for user in users:
            if user.opcode in ("dynamic-slice", "gather", "slice") and user.operands[0] == name:
                total += hbm_bytes(user.type)
            elif user.opcode == "bitcast" or _is_copy(user):
                total += self._bytes_read(inner, user.name)
            elif user.opcode == "fusion":
                nested = self.computations[user.called("calls")[0]]
                total += self._bytes_read(nested, nested.parameters[user.operands.index(name)])
            else:
                return math.inf
        return total if users else math.inf

    def traffic(self, computation: HloComputation, instruction: HloInstruction) -> float:
        """Bytes between HBM and the cores for one run of an instruction, without those of computations it calls."""
        if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
            return 0.0
        operands = [computation.instructions.get(name) for name in instruction.operands]
        if instruction.opcode in _FUSIONS:
            return self._fusion_traffic(instruction, operands)
        out = hbm_bytes(_result_type(instruction))
        sizes = [hbm_bytes(o.type) * self._active_fraction(instruction, o) for o in operands if o]
        if instruction.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * out
        if instruction.opcode == "dynamic-update-slice":
            return 2 * sizes[1] if len(sizes) > 1 else 0.0
        if instruction.opcode == "copy-start":
            return sum(sizes) + hbm_bytes(_tuple_types(instruction.type)[0])
        return out + sum(sizes)

    def _active_fraction(self, instruction: HloInstruction, operand: HloInstruction) -> float:
        """The fraction that is read of a grouped matmul's stacked matrices, and of a KV cache: one layer of it."""
        if instruction.opcode == "custom-call" and "_latent_attention" in instruction.scope:
            cache = re.match(r"\w+\[(\d+),\d+,\d+,\d+\]", operand.type)
            return 1 / int(cache.group(1)) if cache else 1
        stack = re.match(r"\w+\[(\d+),\d+,\d+\]", operand.type)
        grouped = instruction.opcode == "custom-call" and "experts" in instruction.scope
        return min(self._active_experts / int(stack.group(1)), 1.0) if self._active_experts and grouped and stack else 1

    def _fusion_traffic(self, fusion: HloInstruction, operands: list[HloInstruction | None]) -> float:
        """Operands and result, but only the slices of an operand that is sliced or updated in place."""
        inner = self.computations[fusion.called("calls")[0]]
        sizes = [hbm_bytes(o.type) if o else 0.0 for o in operands]
        if any(i.opcode == "scatter" for i in inner.instructions.values()):  # in place: the rows that it adds to
            return 3 * (sum(sizes) - max(sizes, default=0.0))
        in_place = inner.root.opcode in ("dynamic-update-slice", "bitcast", "tuple")
        updates = [i for i in inner.instructions.values() if i.opcode == "dynamic-update-slice"] if in_place else []
        updated = {_source(inner, update.operands[0]) for update in updates} | (passed := _passed_on(inner))
        read = ((name, sizes[number]) for number, name in inner.parameters.items() if name not in updated)
        total = sum(min(self._bytes_read(inner, name), size) for name, size in read)
        written = [inner.instructions[update.operands[1]] for update in updates] or [inner.root]
        if passed:
            results = inner.root.operands if inner.root.opcode == "tuple" else [inner.root.name]
            written = [inner.instructions[name] for name in results if name not in passed]
        return total + sum(hbm_bytes(i.type) for i in written)


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
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", rest):
        found = [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs.group(1))]
        return next((pair for pair in found if pair[0] != pair[1]), found[0])  # some devices may keep what they have
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return tuple(int(n) for n in listed.group(1).split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return tuple(_iota(iota.group(2), iota.group(3))[: int(iota.group(1))].tolist())
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


def _loop_carried(caller: HloComputation, loop: HloInstruction, element: HloInstruction | None) -> int | None:
    """A limit, an element of the loop's state, that is a constant outside of it."""
    start = caller.instructions.get(loop.operands[0])
    if element is None or element.opcode != "get-tuple-element" or start is None or start.opcode != "tuple":
        return None
    index = int(re.findall(r"index=(\d+)", element.rest)[0])
    return _constant(caller.instructions.get(start.operands[index]))


def _passed_on(inner: HloComputation) -> set[str]:
    """Values of a collective that a fusion continues: their traffic counts where it is started."""
    found = [i for i in inner.instructions.values() if _CONTINUATION.search(i.rest) or "AsyncCollectiveDone" in i.rest]
    names = {i.name for i in found} | {name for i in found for name in i.operands}
    if found and inner.root.opcode == "tuple":  # the array that it fills
        names |= {name for name in inner.root.operands if inner.instructions[name].opcode == "parameter"}
    users = (i for i in inner.instructions.values() if i.opcode == "get-tuple-element" and i.operands[0] in names)
    return names | {i.name for i in users}


def _source(inner: HloComputation, name: str) -> str:
    """The array that a chain of bitcasts, copies and converts starts from."""
    instruction = inner.instructions.get(name)
    while instruction is not None and (instruction.opcode in ("bitcast", "copy", "convert") or _is_copy(instruction)):
        name = instruction.operands[0]
        instruction = inner.instructions.get(name)
    return name


def _is_copy(nested: HloInstruction) -> bool:
    """Whether a fusion inside of a fusion only gives its operand another layout: the elements that are used are read
    from where they are. TPU7x's compiler writes this around slices of what the layers save."""
    return nested.opcode == "fusion" and "output_to_operand_aliasing={{}: (0, {})}" in nested.rest


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
    return _list_elements(re.sub(r"/\*.*?\*/", "", type_)[1:])


def _list_elements(text: str) -> list[str]:
    """The elements of a list whose opening bracket stands before `text`."""
    elements, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if depth < 0:
            break
        if letter == "," and depth == 0:
            elements.append("")
        else:
            elements[-1] += letter
    return [element.strip() for element in elements]
