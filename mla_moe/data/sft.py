"""Questions with completions to batches in which the completions alone are learned."""

import array
import dataclasses
import json
from collections.abc import Callable, Sequence

import grain
import numpy as np

from mla_moe.config import ConfigError, DataConfig
from mla_moe.data.frozen_files import fingerprint
from mla_moe.data.packing import READ, Batch, batched, pack_pieces, shuffled
from mla_moe.data.sources import Lines, find_files, has_lone_surrogate

SFT_FEATURES = ("tokens", "targets", "loss_mask", "segment_ids", "positions")
"""Arrays of a batch of pairs: those of text, and `loss_mask`, 1 where a target is the completion's and 0 elsewhere."""


@dataclasses.dataclass(frozen=True)
class PromptCompletionEncoding:
    """How a pair becomes tokens."""

    prompt: Callable[[str], Sequence[int]]
    """What puts a question to the model, bos in front."""
    completion: Callable[[str], Sequence[int]]
    end: int
    """The token that ends a completion."""
    length: int
    """Places in a sequence."""


class PromptCompletionDataset(Sequence[Batch]):
    """The usable pairs of JSON lines, as pieces of sequences: `tokens`, `targets` and `loss_mask`, int32 [≤ length].

    Reading all lines once finds the broken ones. Raises `ConfigError` on `field` where no file matches, where more than
    a share of `malformed` lines is broken, which it names, and where nothing is left.
    """

    def __init__(self, patterns: Sequence[str], field: str, coding: PromptCompletionEncoding, malformed: float):
        paths = (path for pattern in patterns for path in find_files(pattern, field))
        self._lines, self._coding = Lines(list(dict.fromkeys(paths)), field), coding
        self._usable = array.array("q")
        self.malformed: list[str] = []
        """Broken lines, each with its place and what is wrong."""
        self.too_long = 0
        """Pairs left out, because their prompt leaves no room for an answer."""
        self.cut = 0
        """Pairs whose completion reaches beyond a sequence, and is cut there."""
        for index, line in enumerate(self._lines):
            try:
                question, completion = _read(line)
            except (ValueError, RecursionError) as error:
                self.malformed.append(f"{self._lines.where(index)}: {error}")
                continue
            if not self._has_room(question, completion):
                self.too_long += 1
                continue
            self._usable.append(index)
        if len(self.malformed) > malformed * len(self._lines):
            fix = f"{len(self.malformed)} of {len(self._lines)} lines are broken, the first at {self.malformed[0]}"
            raise ConfigError(field, tuple(patterns), fix)
        if not self._usable:
            fix = f"has no pair to learn from; {self.too_long} prompts are too long for {coding.length} tokens"
            raise ConfigError(field, tuple(patterns), fix)

    @property
    def fingerprint(self) -> int:
        """Tells these files from others."""
        return fingerprint([self._lines])

    def __len__(self) -> int:
        return len(self._usable)

    def __getitem__(self, index: int) -> Batch:
        question, completion = _read(self._lines[self._usable[index]])
        coding = self._coding
        prompt, end = coding.prompt(question), coding.length + 1
        whole = np.array([*prompt, *coding.completion(completion), coding.end], np.int32)[:end]
        learned = np.arange(1, len(whole)) >= len(prompt)
        return {"tokens": whole[:-1], "targets": whole[1:], "loss_mask": learned.astype(np.int32)}

    def _has_room(self, question: str, completion: str) -> bool:
        """Whether a token of the completion fits behind the prompt. Counts completions that are cut."""
        prompt = len(self._coding.prompt(question))
        room = self._coding.length + 1 - prompt
        if room < 1:
            return False
        # A token is a byte or more, so most completions need not be read for this.
        if len(completion.encode()) >= room and len(self._coding.completion(completion)) >= room:
            self.cut += 1
        return True


def sft_batches(
    data: DataConfig,
    pairs: PromptCompletionDataset,
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    shard: int = 0,
    shards: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Endless batches of one of `shards` streams, as `train_batches` makes them of text; a pair stays whole. There
    are as many pairs as streams or more."""
    mine, window_seed = shuffled(pairs, seed, shard, shards)
    packed = pack_pieces(mine.to_iter_dataset(READ), sequence_length, SFT_FEATURES[:3])
    return batched(packed, data, window_seed, batch_size=batch_size, shards=shards)


def _read(line: bytes) -> tuple[str, str]:
    """A line's question and completion. Raises `ValueError`, which says what is wrong."""
    value = json.loads(line)
    pair = [value.get(key) if isinstance(value, dict) else None for key in ("question", "completion")]
    question, completion = pair
    if not isinstance(question, str) or not isinstance(completion, str) or not completion:
        raise ValueError("needs an object with text under 'question' and 'completion'")
    if has_lone_surrogate(question + completion):
        raise ValueError("has half of a surrogate pair, which is no character")
    return question, completion
