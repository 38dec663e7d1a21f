"""The teacher behind an endpoint with OpenAI's API: log-probabilities of sampled tokens, by `echo` with `logprobs` and
`max_tokens: 0`, as `mla-moe serve` and vLLM have it."""

import http.client
import json
import math
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from mla_moe.config import ConfigError, require
from mla_moe.config.errors import without_secrets

FIELD = "rl.teacher"
API_KEY = "MLA_MOE_TEACHER_API_KEY"
"""The environment variable with the endpoint's key, if it needs one."""
TIMEOUT = 300.0
"""Seconds for one request."""
ATTEMPTS = 5
"""Attempts of a request that times out, cannot connect or gets status 408, 429 or 5xx; pauses of 1, 2, 4 and 8 s."""
CONNECTIONS = 32
"""Requests at the same time."""
SERVERS = "; serve it with mla-moe serve or vLLM"


_NOT_FINITE = "gives log-probabilities that are no finite numbers; check its weights"


class TopTokens(NamedTuple):
    """The most likely tokens at n positions of a text."""

    ids: list[list[int]]
    """`[n, k]`"""
    logprobs: list[list[float]]
    """`[n, k]`"""


class TeacherEndpoint:
    """Scores tokens of the student. `retries` counts requests that were sent again."""

    def __init__(self, url: str, model: str, vocab_size: int, token_bytes: Callable[[int], bytes], *, top_k: int = 0):
        """`vocab_size` and `token_bytes` are those of the student's tokenizer. `top_k`: how many of the most likely
        tokens `score_top` gives."""
        self._top_k = top_k
        self._url, self._model = url.rstrip("/"), model
        self._name = without_secrets(self._url)
        self._vocab_size, self._token_bytes = vocab_size, token_bytes
        self.retries, self._lock = 0, threading.Lock()

    def check(self) -> None:
        """Score a few tokens of the vocabulary, and compare their texts. Raises `ConfigError` on `rl.teacher` if the
        endpoint cannot be reached, has no such model, no log-probabilities of prompts, or other tokens."""
        size = self._vocab_size
        sample = sorted({*range(0, size, max(size // 64, 1)), size - 1})
        choice = self._choice(sample)
        self._scores(sample, choice)
        if self._top_k:
            self._top(sample, choice)
        theirs = choice["logprobs"].get("tokens")
        require(
            isinstance(theirs, list) and len(theirs) >= len(sample),
            FIELD,
            self._name,
            f"names no tokens beside their log-probabilities{SERVERS}",
        )
        for token, text in zip(sample, theirs, strict=False):
            ours = self._token_bytes(token).decode(errors="replace")
            same = not ours or "\ufffd" in ours or str(text).strip() == ours.strip()  # special, or part of a character
            fix = f"its token {token} is {text!r}, and the student's {ours!r}; distillation needs the same tokens"
            require(same, FIELD, self._name, fix)

    def score(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """The teacher's log-probability, at temperature 1, of each token of each prompt after its first. Raises
        `ConfigError` as `check` does."""
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            return list(pool.map(lambda tokens: self._scores(tokens, self._choice(tokens)), prompts))

    def score_top(self, prompts: Sequence[Sequence[int]]) -> list[TopTokens]:
        """The `top_k` most likely tokens at the position of each token of each prompt after its first, with the
        teacher's log-probabilities. Raises `ConfigError` as `check` does."""
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            return list(pool.map(lambda tokens: self._top(tokens, self._choice(tokens)), prompts))

    def _top(self, tokens: Sequence[int], choice: dict[str, Any]) -> TopTokens:
        """The most likely tokens in `prompt_logprobs`: a dictionary by token id for each position, where the text's own
        token may be one more."""
        positions, ids, logprobs = choice.get("prompt_logprobs"), [], []
        try:
            for found in positions[1:] if isinstance(positions, list) else ():
                pairs = sorted((-float(entry["logprob"]), int(token)) for token, entry in found.items())[: self._top_k]
                ids.append([token for _, token in pairs])
                logprobs.append([-x for x, _ in pairs])
        except (TypeError, ValueError, KeyError, AttributeError):
            ids = []
        ok = len(ids) == len(tokens) - 1 and all(
            len(row) == self._top_k and all(0 <= token < self._vocab_size for token in row) for row in ids
        )
        fix = f"{self._name} gives no {self._top_k} log-probabilities at each position (prompt_logprobs); set 0"
        require(ok, "rl.teacher_top_k", self._top_k, fix)
        require(all(math.isfinite(x) for row in logprobs for x in row), FIELD, self._name, _NOT_FINITE)
        return TopTokens(ids, logprobs)

    def _scores(self, tokens: Sequence[int], choice: dict[str, Any]) -> list[float]:
        logprobs = choice.get("logprobs")
        found = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
        if not isinstance(found, list) or not found:
            fix = f"gives no log-probabilities of a prompt{SERVERS}"
            raise ConfigError(FIELD, self._name, fix)
        fix = f"has {len(found)} tokens where the student has {len(tokens)}; distillation needs the same tokens"
        require(len(found) == len(tokens), FIELD, self._name, fix)
        scores = found[1:]
        finite = all(isinstance(x, int | float) and math.isfinite(x) for x in scores)
        require(finite, FIELD, self._name, _NOT_FINITE)
        return scores

    def _choice(self, tokens: Sequence[int]) -> dict[str, Any]:
        body = {"model": self._model, "prompt": [int(token) for token in tokens], "max_tokens": 0, "temperature": 1.0}
        body |= {"prompt_logprobs": self._top_k} if self._top_k else {}
        response = self._post(json.dumps(body | {"echo": True, "logprobs": 0}).encode())
        try:
            choice = json.loads(response)["choices"][0]
        except (ValueError, LookupError, TypeError):
            choice = None
        if not isinstance(choice, dict):
            raise ConfigError(FIELD, self._name, f"gives no completion of OpenAI's API{SERVERS}")
        return choice

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(API_KEY, "").strip():
            headers["Authorization"] = f"Bearer {key}"
        request, reason = urllib.request.Request(f"{self._url}/completions", body, headers), ""
        for attempt in range(ATTEMPTS):
            if attempt:
                with self._lock:
                    self.retries += 1
                time.sleep(2.0 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                    return response.read()
            except urllib.error.HTTPError as error:
                with error:
                    reason = f"responded with status {error.code}: {error.read(500).decode(errors='replace')}"
                if error.code not in (408, 429) and error.code < 500:
                    break
            except (OSError, http.client.HTTPException) as error:  # of the connection, and timeouts
                reason = f"cannot be reached: {error}"
        raise ConfigError(FIELD, self._name, f"{without_secrets(reason)}; check the URL and rl.teacher_model")
