"""Verifiers, and the main loop of the worker process that runs them.

`pool.py` runs this file by its path in fresh interpreters, which must start quickly and not use accelerators: it
imports nothing from the package.
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
    """A question with its reference answer."""

    question: str
    answer: str
    """A correct answer; empty if the task's verifier needs none."""
    record: Mapping[str, Any]
    """The full record: the object of a JSON line, or reasoning-gym's entry with its `metadata`."""


VerifierSpec = tuple[Any, ...]
"""A verifier in picklable form: its kind and the arguments of its loader, the last of which is a name."""


def load(kind: str, *arguments: Any) -> Callable[..., Any]:
    """The verifier of a `VerifierSpec`. Raises what its imports raise.

    `("math",)` and `("reasoning_gym", options, name)` take (answer, example); `("function", path)` takes (prompt,
    completion, example).
    """
    return {"math": _math, "reasoning_gym": _reasoning_gym, "function": _function}[kind](*arguments)


def _math() -> Callable[[str, Example], float]:
    import math_verify

    # It warns that its time limits are off: they use signals, and the pool has a timeout of its own.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    parse = functools.partial(math_verify.parse, parsing_timeout=0)

    def verify(answer: str, example: Example) -> float:
        if answer.strip() == example.answer.strip():
            return 1.0
        gold, predicted = parse(_as_math(example.answer)), parse(_as_math(answer))
        return float(math_verify.verify(gold, predicted, timeout_seconds=0))

    return verify


_DELIMITED = re.compile(r"\$|\\\(|\\\[|\\boxed")
_WORD = re.compile(r"[^\W\d_]{2}")
_EXPONENT = re.compile(r"(?<=\d)[eE]([+-]?\d+)(?!\w)")


def _as_math(text: str) -> str:
    """The text in LaTeX delimiters, unless it has them already or contains words: math-verify would read words as
    products of letters (Paris = Pairs). 1e-5 becomes a power of ten, as math-verify would read e as a factor."""
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
        sys.path.insert(0, str(file.parent))  # modules next to it can be imported, as for a script
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
    with contextlib.suppress(ValueError):  # a function in C has no signature
        inspect.signature(function).bind("prompt", "completion", "example")
    return function


def _call(function: Callable[..., Any], texts: tuple[str, ...], example: Example) -> tuple[str, Any]:
    """`("value", float)`, or the kind of a failure and a message."""
    try:
        value = function(*texts, example)
        number = float(value) if hasattr(value, "__float__") else math.nan  # a string is not a number
    except BaseException as error:  # including SystemExit
        return "raised", f"{type(error).__name__}: {error}"
    return ("value", number) if math.isfinite(number) else ("not_finite", f"returned {value!r:.200}")


def serve(channel: Connection) -> None:
    """Load the verifiers, reply that they are ready or why one is not, then serve calls until the parent ends.

    Replies are pairs: `("ready", None)`, `("unable", (field, why))`, or what `_call` returns. The parent enforces the
    timeout of a call. If the parent was killed meanwhile, an alarm a second later ends this process: the operating
    system delivers it even if no Python code runs.
    """
    sys.path[:], specs = channel.recv()
    verifiers, field = {}, ""
    try:
        for field, spec in specs.items():
            verifiers[field] = load(*spec)
    except BaseException as error:
        channel.send(("unable", (field, f"{type(error).__name__}: {error}")))
        return
    channel.send(("ready", None))
    while True:
        try:
            timeout, field, texts, example = channel.recv()
        except (EOFError, ConnectionError):
            return
        signal.setitimer(signal.ITIMER_REAL, timeout + 1)
        reply = _call(verifiers[field], texts, Example(*example))
        signal.setitimer(signal.ITIMER_REAL, 0)
        channel.send(reply)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles interrupts and ends its workers
    serve(Connection(int(sys.argv[1])))
    os.killpg(0, signal.SIGKILL)  # with threads and processes that verifiers left running
