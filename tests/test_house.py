"""The floors of the house: imports go down only."""

import ast
from pathlib import Path

import mla_moe

HOUSE = Path(mla_moe.__file__).parent
FLOORS = [
    ("config",),
    ("recipe", "special_tokens"),
    ("sharding", "ops"),
    ("nn",),
    ("counting",),
    ("data", "inference", "interop"),
    ("training",),
    ("rl", "report"),
    ("plan",),
    ("cli",),
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def rooms_imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mla_moe"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]


def test_imports_go_down_only():
    wrong = []
    for path in HOUSE.rglob("*.py"):
        room = path.relative_to(HOUSE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        assert room in FLOOR, f"give the room {room} a floor"
        wrong += [
            f"{path.relative_to(HOUSE)} imports {other}"
            for other in rooms_imported(path)
            if other != room and other in FLOOR and FLOOR[other] >= FLOOR[room]
        ]
    assert not wrong


def test_nothing_that_is_read_is_run():
    """No pickle and no evaluation. A recipe in Python and a reward function are code that a person names."""
    forbidden = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "torch", "eval", "exec", "compile"}
    wrong = []
    for path in HOUSE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [node.func.id] if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else []
            wrong += [f"{path.relative_to(HOUSE)}: {name}" for name in names if name.split(".")[0] in forbidden]
            allowed = isinstance(node, ast.keyword) and node.arg == "allow_pickle"
            wrong += [f"{path.relative_to(HOUSE)}: allow_pickle"] if allowed else []
    assert not wrong
