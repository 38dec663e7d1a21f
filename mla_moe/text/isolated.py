"""Foreign tokenizers and chat templates run in a worker process, with a time and a memory limit.

A chat template is a program, and a `tokenizer.json` has regular expressions and rules that can expand a text. Both come
with a checkpoint and are not trusted: what loops, crashes or takes all memory fails one call, as a `ConfigError`.
"""

import threading
from functools import cache
from pathlib import Path
from typing import Any

from mla_moe.config import ConfigError
from mla_moe.text import worker
from mla_moe.workers.process import ENDED, WorkerProcess, printable

SECONDS = 6.0
"""Limit for encoding a prompt, or for rendering and encoding a conversation."""
OPEN_SECONDS = 60.0
"""Limit for opening a tokenizer. The largest, of 262,144 tokens, take 3.5 s on a slow CPU, and more if it is busy."""
MEMORY_BYTES = 768 << 20
"""More than twice the memory of such a tokenizer."""
_MAX_REPLY_BYTES = 32 << 20  # 4 million token ids


class TextWorker:
    """A worker process for tokenizers and chat templates, started at the first call. Any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process: WorkerProcess | None = None

    def open(self, path: Path) -> dict[str, int]:
        """`special_tokens.special_ids` of a `tokenizer.json`. Raises `ConfigError` on `data.tokenizer` if it cannot be
        opened within the limits."""
        return self._call("data.tokenizer", str(path), OPEN_SECONDS, "open", str(path.absolute()))

    def __call__(self, field: str, value: str, function: str, path: str, *arguments: Any) -> Any:
        """What a function of `worker.open_service` returns for the tokenizer `path`. Raises its `ConfigError`, or one
        on `field` if it fails in another way or goes over a limit; the next call then has a new process."""
        with self._lock:
            self._call(field, value, OPEN_SECONDS, "prepare", path, function)  # a new process has to open it again
            return self._call(field, value, SECONDS, function, path, *arguments)

    def _call(self, field: str, value: str, seconds: float, *call: Any) -> Any:
        with self._lock:
            kind, content = self._started(field, value).call(seconds, *call)
            if kind in ENDED:
                self.end()
        match kind, content:
            case "value", _:
                return content
            case "refused", [str(refused), str(what), str(why)]:
                raise ConfigError(refused, what, why)
        if kind in ENDED:
            limits = f"the limits are {seconds:g} s and {MEMORY_BYTES >> 20} MB"
            content = f"its process {kind}: {content}; {limits}, and a crash ends it too"
        raise ConfigError(field, value, f"the tokenizer or its chat template failed: {printable(str(content))}")

    def _started(self, field: str, value: str) -> WorkerProcess:
        if self._process is not None and self._process.busy:  # an exception, such as an interrupt, has ended a call
            self.end()
        if self._process is None:
            options: dict[str, Any] = {"max_reply_bytes": _MAX_REPLY_BYTES, "memory_bytes": MEMORY_BYTES}
            self._process = WorkerProcess(Path(worker.__file__), [], **options)
            kind, why = self._process.wait()
            if kind != "ready":
                self.end()
                fix = f"the process for tokenizers and chat templates cannot start: {printable(str(why))}"
                raise ConfigError(field, value, fix)
        return self._process

    def end(self) -> None:
        """End the process, and free its tokenizers; the next call starts another."""
        with self._lock:
            if self._process is not None:
                self._process.end()
                self._process = None


@cache
def text_worker() -> TextWorker:
    """The text worker of this process."""
    return TextWorker()
