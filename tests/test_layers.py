"""The layers of the package: imports go down only."""

import ast
from pathlib import Path

import mla_moe

PACKAGE = Path(mla_moe.__file__).parent
LAYERS = [
    ("config", "workers"),
    ("ops", "text"),
    ("parallel",),
    ("nn",),
    ("data", "checkpoint", "inference"),
    ("training",),
    ("rl", "report"),
    ("plan", "launch"),
    ("cli",),
]
LAYER = {package: number for number, packages in enumerate(LAYERS) for package in packages}


def packages_imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mla_moe"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]


def test_imports_go_down_only():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        package = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if package in ("__init__", "__main__"):
            continue
        assert package in LAYER, f"put the package {package} in a layer"
        wrong += [
            f"{path.relative_to(PACKAGE)} imports {other}"
            for other in packages_imported(path)
            if other != package and other in LAYER and LAYER[other] >= LAYER[package]
        ]
    assert not wrong


def test_nothing_that_is_read_is_run():
    """No pickle and no evaluation. A recipe in Python and a reward function are code that a person names."""
    forbidden = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "torch", "eval", "exec", "compile"}
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [node.func.id] if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else []
            wrong += [f"{path.relative_to(PACKAGE)}: {name}" for name in names if name.split(".")[0] in forbidden]
            allowed = isinstance(node, ast.keyword) and node.arg == "allow_pickle"
            wrong += [f"{path.relative_to(PACKAGE)}: allow_pickle"] if allowed else []
    assert not wrong
