"""Change the mathematics in one place at a time, and see whether a test notices.

    python -m pytest --cov=mla_moe --cov-context=test --durations=0 > tests.log  # must pass; pip install pytest-cov
    python benchmarks/mutants.py [--mutants 150] [--seed 0] [--log mutants.jsonl] [--workers 2]

Mutants are drawn from all places of `ops/`, `nn/` and `rl/` where an operator, a comparison, a condition, a number or a
reduction can be exchanged for its neighbour. Each is put into a copy of the repository, and the tests that went through
its line when coverage was measured run until one fails: quick ones first, those of its own file before others. A line
that runs when its file is imported alone has the tests of its room, and of what stands on it. Tests that do not end in
time have noticed nothing. A log is gone on with. Prints how many of each kind were noticed, and every survivor.
"""

import argparse
import ast
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from coverage import CoverageData

ROOT = Path(__file__).parents[1]
ROOMS = {
    "ops": ["tests/ops", "tests/nn", "tests/training/test_loss.py", "tests/inference", "tests/test_meshes.py"],
    "nn": ["tests/nn", "tests/interop/test_golden.py", "tests/inference", "tests/training", "tests/test_meshes.py"],
    "rl": ["tests/rl", "tests/test_train.py"],
}  # fmt: skip
QUICK = ["tests/ops/test_cross_entropy.py", "tests/nn/test_rope.py", "tests/rl/test_objective.py"]
SLOW = 60.0
"""Seconds, with coverage."""
SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
NAMES = {"maximum": "minimum", "minimum": "maximum", "max": "min", "min": "max", "sum": "mean", "mean": "sum",
         "zeros": "ones", "ones": "zeros", "zeros_like": "ones_like", "any": "all", "all": "any",
         "floor": "ceil", "argmax": "argmin"}  # fmt: skip


def places(tree: ast.Module) -> Iterator[tuple[str, ast.expr, ast.expr]]:
    """Kind, an expression, and what it becomes. Types are no place, nor what only words an error."""
    skip: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            skip |= {id(n) for n in ast.walk(node.annotation)}
        elif isinstance(node, ast.FunctionDef) and node.returns is not None:
            skip |= {id(n) for n in ast.walk(node.returns)}
        elif isinstance(node, ast.Raise | ast.JoinedStr):
            skip |= {id(n) for n in ast.walk(node)}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("jaxtyped", "require", "TypeVar"):
            skip |= {id(n) for argument in node.args[1:] for n in ast.walk(argument)}
    for node in ast.walk(tree):
        if id(node) in skip:
            continue
        match node:
            case ast.BinOp(ast.JoinedStr() | ast.List() | ast.Constant(str())):
                pass
            case ast.BinOp(left, op, right) if type(op) in SWAPS:
                yield "operator", node, ast.BinOp(left, SWAPS[type(op)](), right)
            case ast.Compare(left, [op], comparators) if type(op) in SWAPS:
                yield "comparison", node, ast.Compare(left, [SWAPS[type(op)]()], comparators)
            case ast.BoolOp(op, values):
                yield "condition", node, ast.BoolOp(SWAPS[type(op)](), values)
            case ast.UnaryOp(ast.Not() | ast.USub(), operand):
                yield "sign", node, operand
            case ast.IfExp(test, body, orelse):
                yield "condition", node, ast.IfExp(test, orelse, body)
            case ast.Constant(bool(value)):
                yield "number", node, ast.Constant(not value)
            case ast.Constant(int(value) | float(value)):
                yield "number", node, ast.Constant(value + 1)
            case ast.Call(ast.Attribute(value, name), arguments, keywords) if name in NAMES:
                yield "reduction", node, ast.Call(ast.Attribute(value, NAMES[name], ast.Load()), arguments, keywords)
            case ast.Call(ast.Name("min" | "max" | "any" | "all" as name), arguments, keywords):
                yield "reduction", node, ast.Call(ast.Name(NAMES[name], ast.Load()), arguments, keywords)


def mutants() -> Iterator[dict]:
    for room in ROOMS:
        for path in sorted((ROOT / "mla_moe" / room).glob("*.py")):
            source = path.read_text("utf-8")
            lines = source.encode().splitlines(keepends=True)
            starts = [0]
            for line in lines:
                starts.append(starts[-1] + len(line))
            for kind, node, changed in places(ast.parse(source)):
                begin = starts[node.lineno - 1] + node.col_offset
                end = starts[node.end_lineno - 1] + node.end_col_offset
                place = {"file": str(path.relative_to(ROOT)), "line": node.lineno, "begin": begin, "end": end}
                becomes = f"({ast.unparse(ast.fix_missing_locations(changed))})"
                yield place | {"kind": kind, "was": source.encode()[begin:end].decode(), "is": becomes}


def tests_of(mutant: dict, coverage: CoverageData, slow: set[str]) -> list[str]:
    """Those through its line: quick ones first, of its own file first, then of its room."""
    file = Path(mutant["file"])
    room = f"tests/{file.parent.name}/"
    contexts = (coverage.contexts_by_lineno(mutant["file"]) or {}).get(mutant["line"], [])
    through = sorted({c.partition("|")[0] for c in contexts if c})
    late = {test for test in through if test in slow or "tests/docs/" in test}  # commands of the docs are whole runs
    through.sort(key=lambda test: (test in late, f"{room}test_{file.name}::" not in test, room not in test))
    return through or ROOMS[file.parent.name]


def slow_tests(log: Path) -> set[str]:
    """Those in pytest's list of durations that are better met last."""
    found = re.findall(r"^([\d.]+)s (?:call|setup) +(\S.*)$", log.read_text(), re.MULTILINE)
    return {test for seconds, test in found if float(seconds) > SLOW}


def noticed(mutant: dict, tests: list[str], seconds: float, scratch: Path) -> str | None:
    """The test that fails with it, if one does in time. What was compiled is kept in `scratch`."""
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "main"
        shutil.copytree(ROOT, repository, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__"))
        path = repository / mutant["file"]
        source = path.read_bytes()
        path.write_bytes(source[: mutant["begin"]] + mutant["is"].encode() + source[mutant["end"] :])
        command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", "-p", "no:cov"]
        try:
            done = subprocess.run(
                [*command, f"--basetemp={scratch / 'tests'}", *tests],
                cwd=repository, capture_output=True, text=True, timeout=seconds, check=False,
                env=os.environ | {"PYTHONPATH": str(repository), "PYTHONDONTWRITEBYTECODE": "1"},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return None
    if done.returncode == 0:
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0][:160] if failed else f"exit {done.returncode}: {done.stdout[-200:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mutants", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=900, help="for the tests of one mutant")
    parser.add_argument("--coverage", type=Path, default=Path(".coverage"))
    parser.add_argument("--durations", type=Path, default=Path("tests.log"))
    parser.add_argument("--log", type=Path, default=Path("mutants.jsonl"))
    arguments = parser.parse_args()
    drawn = random.Random(arguments.seed).sample(list(mutants()), arguments.mutants)
    for number, mutant in enumerate(drawn):
        mutant["number"] = number
    coverage = CoverageData(str(arguments.coverage))
    coverage.read()
    slow = slow_tests(arguments.durations)
    seen = [json.loads(line) for line in arguments.log.read_text().splitlines()] if arguments.log.exists() else []
    left = [m for m in drawn if m["number"] not in {s["number"] for s in seen}]
    with tempfile.TemporaryDirectory() as folder, arguments.log.open("a") as log:
        scratch: SimpleQueue[Path] = SimpleQueue()
        for worker in range(arguments.workers):
            scratch.put(Path(folder) / str(worker))
            (Path(folder) / str(worker)).mkdir()

        def meet(mutant: dict) -> None:
            mine, began = scratch.get(), time.monotonic()
            by = noticed(mutant, tests_of(mutant, coverage, slow), arguments.seconds, mine)
            scratch.put(mine)
            seen.append(mutant | {"by": by, "seconds": round(time.monotonic() - began, 1)})
            print(json.dumps(seen[-1]), file=log, flush=True)
            told = "noticed" if by else "SURVIVED"
            print(f"{mutant['number']:4} {mutant['file']}:{mutant['line']} {told}", file=sys.stderr)

        nothing = {"file": "mla_moe/ops/__init__.py", "begin": 0, "end": 0, "is": ""}
        if by := noticed(nothing, QUICK, arguments.seconds, Path(folder) / "0"):  # it would notice everything
            sys.exit(f"a test fails without a mutant: {by}")
        with ThreadPoolExecutor(arguments.workers) as pool:
            list(pool.map(meet, left))
    print(f"{'':12}{'mutants':>9}{'noticed':>9}{'share':>8}")
    for group in (*sorted({m["kind"] for m in seen}), *ROOMS, "all"):
        some = [m for m in seen if group in (m["kind"], Path(m["file"]).parent.name) or group == "all"]
        if some:
            count = sum(m["by"] is not None for m in some)
            print(f"{group:12}{len(some):>9}{count:>9}{count / len(some):>8.0%}")
    for m in seen:
        if m["by"] is None:
            print(f"{m['file']}:{m['line']}: {m['was']} -> {m['is']}")


if __name__ == "__main__":
    main()
