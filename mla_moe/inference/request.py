"""What a client asks of the engine, and what it gets."""

import dataclasses
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from mla_moe.config import require

MAX_STOPS = 8
MAX_STOP_LENGTH = 256
MAX_TEMPERATURE = 100
FinishReason = Literal["stop", "length", "cancelled"]
Decode = Callable[[Iterable[int]], str]


def are_integers(values: Iterable[Any]) -> bool:
    """Whether they are whole numbers, be it Python's, NumPy's or JAX's."""
    try:
        return all(operator.index(value) is not None for value in values)
    except TypeError:
        return False


@dataclasses.dataclass(frozen=True)
class Request:
    """One completion of one prompt. Raises `ConfigError` for what cannot be meant.

    The result follows from the request alone: not from its slot, from others in the batch, or from when it comes. In
    bfloat16 rounding depends on these, so that of two tokens almost as likely either may come.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    number: int = 0
    """Tells the completions of one prompt and seed apart."""
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        require(
            are_integers(self.prompt), "prompt", self.prompt, "must be a list of token ids, which are whole numbers"
        )
        for field in ("max_new_tokens", "top_k", "seed", "number"):
            require(are_integers([getattr(self, field)]), field, getattr(self, field), "must be a whole number")
        require(len(self.prompt) > 0, "prompt", [], "needs at least one token; begin with the tokenizer's bos_id")
        require(self.max_new_tokens > 0, "max_new_tokens", self.max_new_tokens, "must be at least 1")
        require(0 <= self.temperature <= MAX_TEMPERATURE, "temperature", self.temperature, "must be in [0, 100]")
        require(0 <= self.top_k < 1 << 31, "top_k", self.top_k, "must be in [0, 2**31); 0 keeps all tokens")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must be in (0, 1]")
        require(0 <= self.min_p <= 1, "min_p", self.min_p, "must be in [0, 1]")
        require(0 <= self.seed < 1 << 32, "seed", self.seed, "must be in [0, 2**32)")
        require(len(self.stop_ids) <= MAX_STOPS, "stop_ids", self.stop_ids, f"give at most {MAX_STOPS}")
        require(all(self.stop), "stop", self.stop, "an empty string would stop at once")
        fits = len(self.stop) <= MAX_STOPS and all(len(text) <= MAX_STOP_LENGTH for text in self.stop)
        fix = f"give at most {MAX_STOPS}, of at most {MAX_STOP_LENGTH} characters: each is looked for at every token"
        require(fits, "stop", self.stop, fix)


@dataclasses.dataclass(eq=False)
class Completion:
    """A request's tokens so far; `finish` says why there are no more."""

    request: Request
    tokens: list[int] = dataclasses.field(default_factory=list)
    """New tokens, with the stop token that ended them."""
    logprobs: list[float] = dataclasses.field(default_factory=list)
    """Of each new token under the model, before any filter; at temperature 1 unless the engine is `tempered`."""
    finish: FinishReason | None = None
    text: "IncrementalDetokenizer | None" = None
    experts_TlK: np.ndarray | None = None
    """When recorded: the experts of every token that was read, prompt first; all but the last new one."""

    def take(self, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """More tokens. With stop strings, those behind the one that completes a stop string are dropped."""
        for token, logprob in zip(tokens, logprobs, strict=True):
            self.tokens.append(token)
            self.logprobs.append(logprob)
            if token in self.request.stop_ids:
                self.finish = "stop"
            elif len(self.tokens) == self.request.max_new_tokens:
                self.finish = "length"
            if self.text is not None:
                end = self.finish is not None
                if self.text.add([] if token in self.request.stop_ids else [token], end=end):
                    self.finish = "stop"
            if self.finish:
                return


class IncrementalDetokenizer:
    """Tokens to text as they come. Withheld until it is sure: half a character, and what may begin a stop string."""

    def __init__(self, decode: Decode, stop: Sequence[str] = ()):
        self.text = ""
        """All text that is sure."""
        self._decode, self._stop = decode, stop
        self._tokens: list[int] = []
        self._known = 0  # tokens whose text is in `text` or `_held`
        self._context = 0  # where decoding starts: some tokenizers join a token to the one before
        self._held = ""

    def add(self, tokens: Sequence[int], *, end: bool = False) -> bool:
        """Whether a stop string is complete: `text` then ends before it."""
        self._tokens += tokens
        before = self._decode(self._tokens[self._context : self._known])
        now = self._decode(self._tokens[self._context :])
        if end or not now.endswith("\ufffd"):
            self._held += now[len(before) :]
            self._context, self._known = self._known, len(self._tokens)
        cut = min((i for i in map(self._held.find, self._stop) if i >= 0), default=None)
        if cut is not None:
            self.text, self._held = self.text + self._held[:cut], ""
            return True
        keep = 0 if end else max((_overlap(self._held, stop) for stop in self._stop), default=0)
        sure = len(self._held) - keep
        self.text, self._held = self.text + self._held[:sure], self._held[sure:]
        return False


def _overlap(text: str, stop: str) -> int:
    """How much of the end of `text` begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
