"""Mutation testing: change one expression at a time, and check whether a test fails.

    python -m pytest --cov=mla_moe --cov-context=test --durations=0 > tests.log  # must pass; pip install pytest-cov
    python benchmarks/mutants.py [--mutants 150] [--seed 0] [--log mutants.jsonl] [--workers 2]

Mutants are sampled from all expressions of `ops/`, `nn/` and `rl/` in which an operator, a comparison, a condition, a
number or a reduction can be replaced by a similar one. Each is written into a copy of the repository, and the tests
that cover its line run until one fails: fast ones first, those of its own file before others. A line that runs only at
import has the tests of its package and of the packages above it. A mutant whose tests exceed the time limit counts as
not detected. An existing log is continued. Prints how many mutants of each kind were detected, and every survivor.
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
from typing import Any

from coverage import CoverageData

ROOT = Path(__file__).parents[1]
PACKAGE_TESTS = {
    "ops": ["tests/ops", "tests/nn", "tests/inference", "tests/parallel"],
    "nn": ["tests/nn", "tests/checkpoint/test_golden.py", "tests/inference", "tests/training", "tests/parallel"],
    "rl": ["tests/rl", "tests/test_train.py"],
}  # fmt: skip
FAST = ["tests/ops/test_cross_entropy.py", "tests/nn/test_rope.py", "tests/rl/test_objectives.py"]
SLOW = 60.0
"""Seconds of a slow test, measured with coverage."""
OPERATORS: dict[type, Any] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
REDUCTIONS = {"maximum": "minimum", "minimum": "maximum", "max": "min", "min": "max", "sum": "mean", "mean": "sum",
              "zeros": "ones", "ones": "zeros", "zeros_like": "ones_like", "any": "all", "all": "any",
              "floor": "ceil", "argmax": "argmin"}  # fmt: skip


def expressions(tree: ast.Module) -> Iterator[tuple[str, ast.expr, ast.expr]]:
    """Kind, expression and its replacement, except in annotations and in texts of errors."""
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
            case ast.BinOp(left, op, right) if type(op) in OPERATORS:
                yield "operator", node, ast.BinOp(left, OPERATORS[type(op)](), right)
            case ast.Compare(left, [op], comparators) if type(op) in OPERATORS:
                yield "comparison", node, ast.Compare(left, [OPERATORS[type(op)]()], comparators)
            case ast.BoolOp(op, values):
                yield "condition", node, ast.BoolOp(OPERATORS[type(op)](), values)
            case ast.UnaryOp(ast.Not() | ast.USub(), operand):
                yield "sign", node, operand
            case ast.IfExp(test, body, orelse):
                yield "condition", node, ast.IfExp(test, orelse, body)
            case ast.Constant(bool(value)):
                yield "number", node, ast.Constant(not value)
            case ast.Constant(int(value) | float(value)):
                yield "number", node, ast.Constant(value + 1)
            case ast.Call(ast.Attribute(value, name), arguments, keywords) if name in REDUCTIONS:
                yield (
                    "reduction",
                    node,
                    ast.Call(ast.Attribute(value, REDUCTIONS[name], ast.Load()), arguments, keywords),
                )
            case ast.Call(ast.Name("min" | "max" | "any" | "all" as name), arguments, keywords):
                yield "reduction", node, ast.Call(ast.Name(REDUCTIONS[name], ast.Load()), arguments, keywords)


def mutants() -> Iterator[dict]:
    for package in PACKAGE_TESTS:
        for path in sorted((ROOT / "mla_moe" / package).rglob("*.py")):
            source = path.read_text("utf-8")
            lines = source.encode().splitlines(keepends=True)
            starts = [0]
            for line in lines:
                starts.append(starts[-1] + len(line))
            for kind, node, changed in expressions(ast.parse(source)):
                begin = starts[node.lineno - 1] + node.col_offset
                assert node.end_lineno is not None
                assert node.end_col_offset is not None
                end = starts[node.end_lineno - 1] + node.end_col_offset
                position = {"file": str(path.relative_to(ROOT)), "line": node.lineno, "begin": begin, "end": end}
                replacement = f"({ast.unparse(ast.fix_missing_locations(changed))})"
                yield position | {"kind": kind, "was": source.encode()[begin:end].decode(), "is": replacement}


def package_of(mutant: dict) -> str:
    return Path(mutant["file"]).parts[1]


def tests_of(mutant: dict, coverage: CoverageData, slow: set[str]) -> list[str]:
    """The tests that cover its line: fast ones first, then those of its file, then those of its package."""
    file, package = Path(mutant["file"]), f"tests/{package_of(mutant)}/"
    contexts = (coverage.contexts_by_lineno(mutant["file"]) or {}).get(mutant["line"], [])
    covering = sorted({c.partition("|")[0] for c in contexts if c})
    last = {test for test in covering if test in slow or "tests/docs/" in test}  # commands of the docs are full runs
    covering.sort(key=lambda test: (test in last, f"{package}test_{file.name}::" not in test, package not in test))
    return covering or PACKAGE_TESTS[package_of(mutant)]


def slow_tests(log: Path) -> set[str]:
    """Slow tests in pytest's list of durations."""
    found = re.findall(r"^([\d.]+)s (?:call|setup) +(\S.*)$", log.read_text(), re.MULTILINE)
    return {test for seconds, test in found if float(seconds) > SLOW}


def detected(mutant: dict, tests: list[str], seconds: float, scratch: Path) -> str | None:
    """The first test that fails with the mutant within the time limit. `scratch` keeps the compilation cache."""
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
    parser.add_argument("--seconds", type=float, default=900, help="time limit for the tests of one mutant")
    parser.add_argument("--coverage", type=Path, default=Path(".coverage"))
    parser.add_argument("--durations", type=Path, default=Path("tests.log"))
    parser.add_argument("--log", type=Path, default=Path("mutants.jsonl"))
    arguments = parser.parse_args()
    sampled = random.Random(arguments.seed).sample(list(mutants()), arguments.mutants)
    for number, mutant in enumerate(sampled):
        mutant["number"] = number
    coverage = CoverageData(str(arguments.coverage))
    coverage.read()
    slow = slow_tests(arguments.durations)
    results = [json.loads(line) for line in arguments.log.read_text().splitlines()] if arguments.log.exists() else []
    remaining = [m for m in sampled if m["number"] not in {r["number"] for r in results}]
    with tempfile.TemporaryDirectory() as folder, arguments.log.open("a") as log:
        scratch: SimpleQueue[Path] = SimpleQueue()
        for worker in range(arguments.workers):
            scratch.put(Path(folder) / str(worker))
            (Path(folder) / str(worker)).mkdir()

        def test(mutant: dict) -> None:
            own, start = scratch.get(), time.monotonic()
            by = detected(mutant, tests_of(mutant, coverage, slow), arguments.seconds, own)
            scratch.put(own)
            results.append(mutant | {"by": by, "seconds": round(time.monotonic() - start, 1)})
            print(json.dumps(results[-1]), file=log, flush=True)
            outcome = "detected" if by else "SURVIVED"
            print(f"{mutant['number']:4} {mutant['file']}:{mutant['line']} {outcome}", file=sys.stderr)

        unchanged = {"file": "mla_moe/ops/__init__.py", "begin": 0, "end": 0, "is": ""}
        if by := detected(unchanged, FAST, arguments.seconds, Path(folder) / "0"):  # every mutant would be detected
            sys.exit(f"a test fails without a mutant: {by}")
        with ThreadPoolExecutor(arguments.workers) as pool:
            list(pool.map(test, remaining))
    print(f"{'':12}{'mutants':>9}{'detected':>9}{'ratio':>8}")
    for group in (*sorted({m["kind"] for m in results}), *PACKAGE_TESTS, "all"):
        members = [m for m in results if group in (m["kind"], package_of(m)) or group == "all"]
        if members:
            count = sum(m["by"] is not None for m in members)
            print(f"{group:12}{len(members):>9}{count:>9}{count / len(members):>8.0%}")
    for m in results:
        if m["by"] is None:
            print(f"{m['file']}:{m['line']}: {m['was']} -> {m['is']}")


if __name__ == "__main__":
    main()
