"""The floors of the house: imports go down only."""

import ast
from pathlib import Path

import mla_moe

HOUSE = Path(mla_moe.__file__).parent
FLOORS = [
    ("config",),
    ("recipe",),
    ("sharding", "ops"),
    ("nn",),
    ("counting",),
    ("data", "inference", "interop"),
    ("training",),
    ("rl", "plan", "report"),
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
