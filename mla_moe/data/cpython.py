"""The quickstart's corpus, which needs no download: sources of the standard library and the language reference.

Both come with the running Python, so the text differs a little from one version to the next.
"""

import ast
import functools
import hashlib
import os
import sysconfig
from pathlib import Path

NAMES = ("cpython:train", "cpython:heldout")

_HELDOUT_SHARE = 0.025
_SMALLEST, _LARGEST = 200, 200_000  # bytes: below are empty `__init__.py`s, above one file would outweigh the rest
_SKIPPED_PARTS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
_GENERATED = ("encodings/", "pydoc_data/", "_sysconfigdata")  # tables written by machines, some with local paths


def documents(name: str) -> list[str]:
    """The documents of `cpython:train` or `cpython:heldout`, sorted by name.

    A hash of a document's name puts it into one or the other: the split is the same everywhere and for ever.
    """
    heldout = name == "cpython:heldout"
    return [text for key, text in sorted(_corpus().items()) if _is_heldout(key) == heldout]


def _is_heldout(key: str) -> bool:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") < _HELDOUT_SHARE * 2**32


@functools.cache
def _corpus() -> dict[str, str]:
    library = Path(sysconfig.get_path("stdlib"))
    found = {f"topics/{topic}": text for topic, text in _topics(library / "pydoc_data" / "topics.py").items()}
    for folder, inside, names in os.walk(library):
        inside[:] = set(inside) - _SKIPPED_PARTS  # and so never enters them: `site-packages` may be large
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            key = path.relative_to(library).as_posix()
            if not key.startswith(_GENERATED):
                try:
                    found[key] = path.read_bytes().decode("utf-8")
                except UnicodeDecodeError:  # old modules in Latin-1
                    continue
    return _without_repeats({key: text for key, text in found.items() if _SMALLEST <= len(text.encode()) <= _LARGEST})


def _topics(path: Path) -> dict[str, str]:
    """The language reference as pydoc's help holds it, by topic; empty where a distribution left it out."""
    if not path.is_file():
        return {}
    module = ast.parse(path.read_text(encoding="utf-8"))
    return next(ast.literal_eval(node.value) for node in module.body if isinstance(node, ast.Assign))


def _without_repeats(found: dict[str, str]) -> dict[str, str]:
    """Drop what repeats a longer document in more than half of its lines, lest held-out text is trained on.

    A third of the topics are excerpts of longer ones (`with` of `compound`), and some modules are copies.
    """
    kept: dict[str, str] = {}
    seen: set[str] = set()
    for key, text in sorted(found.items(), key=lambda item: (-len(item[1]), item[0])):
        lines = {line.strip() for line in text.splitlines()}
        if len(lines & seen) <= len(lines) / 2:
            kept[key] = text
            seen |= lines
    return kept
