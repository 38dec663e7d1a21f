"""Requests, completions (the state of a request with its tokens so far), and incremental detokenization."""

import dataclasses
import logging
import operator
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from mla_moe.config import ConfigError, require
from mla_moe.config.post_training import MAX_TOP_K
from mla_moe.text.tokenizer import Decode

logger = logging.getLogger(__name__)

MAX_STOPS = 8
"""Most stop tokens, and most stop strings, of one request."""
MAX_STOP_LENGTH = 256
MAX_TEMPERATURE = 100
FinishReason = Literal["stop", "length", "abort", "error"]
"""`error`: the tokenizer failed to decode the tokens."""


def are_integers(values: Iterable[Any]) -> bool:
    """Whether all values are integers, of Python, NumPy or JAX."""
    try:
        return all(operator.index(value) is not None for value in values)
    except TypeError:
        return False


@dataclasses.dataclass(frozen=True)
class Request:
    """One completion of one prompt, with its sampling parameters. Raises `ConfigError` for a value out of range.

    The result depends on the request alone: not on its slot, on other requests in the batch, or on its arrival time.
    In bfloat16 rounding depends on these, so either of two almost equally likely tokens may be chosen.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    """0 is greedy decoding."""
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    sample_index: int = 0
    """Folded into the seed, so that several completions of one prompt differ."""
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    adapter: int = 0
    """Index of the adapter in an engine with several, from 1 on; 0 is the model without adapter."""
    prompt_logprobs: bool = False
    """Also compute the log-probability of each token of the prompt, which is then prefilled as a whole."""
    prompt_top_k: int = 0
    """With `prompt_logprobs`: number of most likely tokens at each position whose log-probabilities are computed
    too."""

    def __post_init__(self):
        require(are_integers(self.prompt), "prompt", self.prompt, "must be a list of token ids, which are integers")
        for field in ("max_new_tokens", "top_k", "seed", "sample_index", "adapter", "prompt_top_k"):
            require(are_integers([getattr(self, field)]), field, getattr(self, field), "must be an integer")
        require(len(self.prompt) > 0, "prompt", [], "needs at least one token; start with the tokenizer's bos_id")
        require(self.max_new_tokens > 0, "max_new_tokens", self.max_new_tokens, "must be at least 1")
        require(0 <= self.temperature <= MAX_TEMPERATURE, "temperature", self.temperature, "must be in [0, 100]")
        require(0 <= self.top_k < 1 << 31, "top_k", self.top_k, "must be in [0, 2**31); 0 keeps all tokens")
        fix = f"must be in [0, {MAX_TOP_K}]"
        require(0 <= self.prompt_top_k <= MAX_TOP_K, "prompt_logprobs", self.prompt_top_k, fix)
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must be in (0, 1]")
        require(0 <= self.min_p <= 1, "min_p", self.min_p, "must be in [0, 1]")
        require(0 <= self.seed < 1 << 32, "seed", self.seed, "must be in [0, 2**32)")
        valid = are_integers(self.stop_ids) and all(0 <= token < 1 << 31 for token in self.stop_ids)
        fix = f"must be at most {MAX_STOPS} token ids"
        require(valid and len(self.stop_ids) <= MAX_STOPS, "stop_ids", self.stop_ids, fix)
        require(all(self.stop), "stop", self.stop, "an empty string would stop at once; remove it")
        fits = len(self.stop) <= MAX_STOPS and all(len(text) <= MAX_STOP_LENGTH for text in self.stop)
        fix = f"give at most {MAX_STOPS}, of at most {MAX_STOP_LENGTH} characters: every token is searched for each"
        require(fits, "stop", self.stop, fix)


class Owner(NamedTuple):
    """Who asked for a completion: a client, and which of its groups of requests. Owners share an engine fairly."""

    client: str = ""
    group: str = ""


@dataclasses.dataclass(eq=False)
class Completion:
    """The state of a request: its tokens so far, and why it finished. Compared by identity."""

    request: Request
    tokens: list[int] = dataclasses.field(default_factory=list)
    """Generated token ids, including the stop token."""
    logprobs: list[float] = dataclasses.field(default_factory=list)
    """Log-probability of each generated token before top-k, top-p and min-p; see `sampling.sample`."""
    prompt_logprobs: np.ndarray | None = None
    """If requested: log-probability of each token of the prompt at temperature 1, NaN of the first, which has none."""
    prompt_top_ids: np.ndarray | None = None
    """If requested: the most likely tokens at each token's position, in order, `[n, k]`."""
    prompt_top_logprobs: np.ndarray | None = None
    finish_reason: FinishReason | None = None
    detokenizer: "IncrementalDetokenizer | None" = None
    experts_TlK: np.ndarray | None = None
    """When recorded: the routed experts of every input token, prompt first; the last generated token is no input."""
    owner: Owner = Owner()

    @property
    def text(self) -> str:
        """The generated text so far, without what could still become a stop string. Empty without a detokenizer."""
        return "" if self.detokenizer is None else self.detokenizer.text

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of the prompt were requested, and some are not computed yet."""
        return self.prompt_logprobs is not None and bool(np.isnan(self.prompt_logprobs[1:]).any())

    def set_prompt_logprobs(
        self, start: int, logprobs: np.ndarray, top_ids: np.ndarray, top_logprobs: np.ndarray
    ) -> None:
        """Store the log-probabilities of the tokens from position `start` on, without those behind the prompt, and
        without the most likely tokens that were not requested."""
        arrays = self.prompt_logprobs, self.prompt_top_ids, self.prompt_top_logprobs
        for ours, new in zip(arrays, (logprobs, top_ids, top_logprobs), strict=True):
            if ours is not None:
                rows = new[: max(len(ours) - start, 0)]
                ours[start : start + len(rows)] = rows[:, : ours.shape[1]] if ours.ndim == 2 else rows

    def append_tokens(self, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """Append generated tokens, up to the one that finishes the request; those after it are dropped."""
        for token, logprob in zip(tokens, logprobs, strict=True):
            self.tokens.append(token)
            self.logprobs.append(logprob)
            if token in self.request.stop_ids:
                self.finish_reason = "stop"
            elif len(self.tokens) == self.request.max_new_tokens:
                self.finish_reason = "length"
            if self.detokenizer is not None:
                end = self.finish_reason is not None
                try:
                    if self.detokenizer.add([] if token in self.request.stop_ids else [token], end=end):
                        self.finish_reason = "stop"
                except ConfigError as error:
                    logger.warning("a completion ends early: %s", error)
                    self.finish_reason = "error"
            if self.finish_reason:
                return


CONTEXT_TOKENS = 6
"""Last tokens of a prompt that are decoded with a completion: more than a character has bytes."""
MAX_TEXT = 1 << 22
"""Characters of a completion: a token may have thousands of them, and each extends a copy of the text."""
_MAX_UNDECIDED = 1 << 17  # characters whose last may change; they are decoded again with each token


class IncrementalDetokenizer:
    """Decodes tokens to text as they are generated.

    An incomplete UTF-8 character is withheld, and so is a suffix that may be the start of a stop string. `context` is
    the end of the prompt: after it, the space before a word is kept by tokenizers that strip it from the first word.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = (), context: Sequence[int] = ()):
        self.text = ""
        """The text that later tokens cannot change."""
        self._decode, self._stop = decode, stop
        self._tokens = [] if decode(context).endswith("\ufffd") else list(context)
        self._num_decoded = len(self._tokens)  # tokens whose text is in the prompt, `text` or `_withheld`
        self._context_start = 0  # decoding starts here: some tokenizers join a token to the one before
        self._withheld = ""

    def add(self, tokens: Sequence[int], *, end: bool = False) -> bool:
        """Returns whether a stop string was found: `text` then ends before it. With `end` no text is withheld. Raises
        `ConfigError` for a text of more than `MAX_TEXT` characters."""
        self._tokens += tokens
        before = self._decode(self._tokens[self._context_start : self._num_decoded])
        after = self._decode(self._tokens[self._context_start :])
        length = len(self.text) + len(after)
        require(length <= MAX_TEXT, "tokens", len(self._tokens), f"have more than {MAX_TEXT:,} characters")
        if end or not after.endswith("\ufffd") or len(after) > _MAX_UNDECIDED:
            self._withheld += after[len(before) :]
            self._context_start, self._num_decoded = self._num_decoded, len(self._tokens)
        cut = min((i for i in map(self._withheld.find, self._stop) if i >= 0), default=None)
        if cut is not None:
            self.text, self._withheld = self.text + self._withheld[:cut], ""
            return True
        overlap = 0 if end else max((_overlap(self._withheld, stop) for stop in self._stop), default=0)
        final = len(self._withheld) - overlap
        self.text, self._withheld = self.text + self._withheld[:final], self._withheld[final:]
        return False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
