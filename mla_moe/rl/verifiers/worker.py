"""Verifiers, and the loop of a process that runs them.

`judge.py` runs this file by its path in fresh interpreters, which must start quickly and leave accelerators alone: it
imports nothing of the package.
"""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple


class Example(NamedTuple):
    """A question, and what is known of its answer."""

    question: str
    answer: str
    """The right answer, or one of them; empty where the task's own check needs none."""
    record: Mapping[str, Any]
    """All that the source says of it: the object of a JSON line, or reasoning-gym's entry with its `metadata`."""


VerifierSpec = tuple[Any, ...]
"""What to judge with, in a form that can be sent: a kind, and the arguments of its loader, a name last."""


def load(kind: str, *arguments: Any) -> Callable[..., Any]:
    """The judge of a `Spec`. Whatever its imports raise comes through.

    `("math",)` and `("reasoning_gym", options, name)` are called with (answer, example), and `("function", path)` with
    (prompt, completion, example).
    """
    return {"math": _math, "reasoning_gym": _reasoning_gym, "function": _function}[kind](*arguments)


def _math() -> Callable[[str, Example], float]:
    import math_verify

    # It warns that its time limits are off: they rest on signals, and this process has a limit already.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    parse = functools.partial(math_verify.parse, parsing_timeout=0)

    def verify(answer: str, example: Example) -> float:
        if answer.strip() == example.answer.strip():
            return 1.0
        gold, given = parse(_as_math(example.answer)), parse(_as_math(answer))
        return float(math_verify.verify(gold, given, timeout_seconds=0))

    return verify


_DELIMITED = re.compile(r"\$|\\\(|\\\[|\\boxed")
_WORD = re.compile(r"[^\W\d_]{2}")
_EXPONENT = re.compile(r"(?<=\d)[eE]([+-]?\d+)(?!\w)")


def _as_math(text: str) -> str:
    """Marked as LaTeX unless it is marked, or has words: math-verify would multiply their letters, Paris = Pairs. The e
    of 1e-5 is no factor."""
    text = text.strip()
    if "\\" not in text and _WORD.search(text):
        return text
    text = _EXPONENT.sub(r" \\times 10^{\1}", text)
    return text if _DELIMITED.search(text) else f"${text}$"


def _reasoning_gym(options: Mapping[str, Any], name: str) -> Callable[[str, Example], float]:
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(name, **options)

    def verify(answer: str, example: Example) -> float:
        return min(max(float(dataset.score_answer(answer, dict(example.record))), 0.0), 1.0)

    return verify


def _function(path: str) -> Callable[..., Any]:
    source, _, name = path.rpartition(":")
    if source.endswith(".py"):
        file = Path(source).resolve(strict=True)
        sys.path.insert(0, str(file.parent))  # what lies beside it can be imported, as beside any script
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(source)
    function = getattr(module, name)
    if not callable(function):
        raise TypeError(f"{name} is not callable")
    if inspect.iscoroutinefunction(function):
        raise TypeError(f"{name} is a coroutine; write a plain function")
    with contextlib.suppress(ValueError):  # written in C, of which Python cannot tell
        inspect.signature(function).bind("prompt", "completion", "example")
    return function


def _judged(function: Callable[..., Any], texts: tuple[str, ...], example: Example) -> tuple[str, Any]:
    """`("value", float)`, or the kind of a failure and what happened."""
    try:
        value = function(*texts, example)
        number = float(value) if hasattr(value, "__float__") else math.nan  # a string is no number
    except BaseException as error:  # a verifier may even ask to exit
        return "raised", f"{type(error).__name__}: {error}"
    return ("value", number) if math.isfinite(number) else ("not_finite", f"returned {value!r:.200}")


def serve(channel: Connection) -> None:
    """Load judges, say that they are ready, or which is not and why, then answer calls until the parent is gone.

    Messages to the parent are pairs: `("ready", None)`, `("unable", (field, why))`, or what `_judged` returns. A call
    has a limit in seconds, which the parent enforces. The alarm, a little later, is for a process whose parent was
    killed meanwhile: the system delivers it even where no Python code runs.
    """
    sys.path[:], specs = channel.recv()
    judges, field = {}, ""
    try:
        for field, spec in specs.items():
            judges[field] = load(*spec)
    except BaseException as error:
        channel.send(("unable", (field, f"{type(error).__name__}: {error}")))
        return
    channel.send(("ready", None))
    while True:
        try:
            limit, field, texts, example = channel.recv()
        except (EOFError, ConnectionError):
            return
        signal.setitimer(signal.ITIMER_REAL, limit + 1)
        reply = _judged(judges[field], texts, Example(*example))
        signal.setitimer(signal.ITIMER_REAL, 0)
        channel.send(reply)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to end
    serve(Connection(int(sys.argv[1])))
    os.killpg(0, signal.SIGKILL)  # with what verifiers left running: threads, and processes
