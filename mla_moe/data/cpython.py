"""The quickstart's corpus, which needs no download: source code of the standard library and the language reference.

Both are part of the running Python, so the text differs slightly between Python versions.
"""

import ast
import functools
import hashlib
import os
import sysconfig
from pathlib import Path

NAMES = ("cpython:train", "cpython:heldout")

_HELDOUT_FRACTION = 0.025
_SMALLEST, _LARGEST = 200, 200_000  # bytes: smaller files are empty `__init__.py`s, a larger one would dominate
_SKIPPED_PARTS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
_GENERATED = ("encodings/", "pydoc_data/", "_sysconfigdata")  # generated tables, some with local paths


def documents(name: str) -> list[str]:
    """The documents of `cpython:train` or `cpython:heldout`, sorted by name.

    A hash of the document's name decides its split, so that it is the same on every machine.
    """
    heldout = name == "cpython:heldout"
    return [text for key, text in sorted(_corpus().items()) if _is_heldout(key) == heldout]


def _is_heldout(key: str) -> bool:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") < _HELDOUT_FRACTION * 2**32


@functools.cache
def _corpus() -> dict[str, str]:
    library = Path(sysconfig.get_path("stdlib"))
    found = {f"topics/{topic}": text for topic, text in _topics(library / "pydoc_data" / "topics.py").items()}
    for folder, inside, names in os.walk(library):
        inside[:] = set(inside) - _SKIPPED_PARTS  # so that os.walk does not enter them: `site-packages` may be large
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            key = path.relative_to(library).as_posix()
            if not key.startswith(_GENERATED):
                try:
                    found[key] = path.read_bytes().decode("utf-8")
                except UnicodeDecodeError:  # a few old modules are in Latin-1
                    continue
    return _deduplicate({key: text for key, text in found.items() if _SMALLEST <= len(text.encode()) <= _LARGEST})


def _topics(path: Path) -> dict[str, str]:
    """The language reference in pydoc's help, by topic; empty if the distribution lacks it."""
    if not path.is_file():
        return {}
    module = ast.parse(path.read_text(encoding="utf-8"))
    return next(ast.literal_eval(node.value) for node in module.body if isinstance(node, ast.Assign))


def _deduplicate(found: dict[str, str]) -> dict[str, str]:
    """Deduplicate: drop a document if more than half of its lines occur in longer ones, so that held-out text does not
    occur in training. A third of the topics are excerpts of longer ones (`with` of `compound`), and some modules are
    copies.
    """
    kept: dict[str, str] = {}
    seen: set[str] = set()
    for key, text in sorted(found.items(), key=lambda item: (-len(item[1]), item[0])):
        lines = {line.strip() for line in text.splitlines()}
        if len(lines & seen) <= len(lines) / 2:
            kept[key] = text
            seen |= lines
    return kept
