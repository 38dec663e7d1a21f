"""SFT data: prompts with completions, to batches whose loss mask selects the completions."""

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
"""Arrays of an SFT batch: those of a pretraining batch, and `loss_mask`, 1 where the target belongs to a completion."""


@dataclasses.dataclass(frozen=True)
class PromptCompletionEncoding:
    """How an example, a prompt with its completion, is tokenized."""

    prompt: Callable[[str], Sequence[int]]
    """Renders a question as prompt tokens, with bos in front."""
    completion: Callable[[str], Sequence[int]]
    end: int
    """Token that ends a completion."""
    length: int
    """Sequence length."""


class PromptCompletionDataset(Sequence[Batch]):
    """The usable examples of JSON lines: `tokens`, `targets` and `loss_mask`, each int32 [≤ length].

    All lines are read once at the start to find malformed ones. Raises `ConfigError` on `field` if no file matches, if
    more than `max_malformed_fraction` of the lines are malformed, or if no example is left.
    """

    def __init__(
        self, patterns: Sequence[str], field: str, encoding: PromptCompletionEncoding, max_malformed_fraction: float
    ):
        paths = (path for pattern in patterns for path in find_files(pattern, field))
        self._lines, self._encoding = Lines(list(dict.fromkeys(paths)), field), encoding
        self._usable = array.array("q")
        self.malformed: list[str] = []
        """Malformed lines, each with its file, line number and error."""
        self.prompts_too_long = 0
        """Examples skipped because their prompt fills the whole sequence."""
        self.truncated = 0
        """Examples whose completion is truncated at the end of the sequence."""
        for index, line in enumerate(self._lines):
            try:
                question, completion = _read(line)
            except (ValueError, RecursionError) as error:
                self.malformed.append(f"{self._lines.where(index)}: {error}")
                continue
            if not self._has_room(question, completion):
                self.prompts_too_long += 1
                continue
            self._usable.append(index)
        if len(self.malformed) > max_malformed_fraction * len(self._lines):
            fix = f"{len(self.malformed)} of {len(self._lines)} lines are malformed, the first at {self.malformed[0]}"
            raise ConfigError(field, tuple(patterns), fix)
        if not self._usable:
            fix = f"has no usable example; {self.prompts_too_long} prompts are too long for {encoding.length} tokens"
            raise ConfigError(field, tuple(patterns), fix)

    @property
    def fingerprint(self) -> int:
        """Identifies the files, to detect other data on resume."""
        return fingerprint([self._lines])

    def __len__(self) -> int:
        return len(self._usable)

    def __getitem__(self, index: int) -> Batch:
        question, completion = _read(self._lines[self._usable[index]])
        encoding = self._encoding
        prompt, end = encoding.prompt(question), encoding.length + 1
        ids = np.array([*prompt, *encoding.completion(completion), encoding.end], np.int32)[:end]
        loss_mask = np.arange(1, len(ids)) >= len(prompt)
        return {"tokens": ids[:-1], "targets": ids[1:], "loss_mask": loss_mask.astype(np.int32)}

    def _has_room(self, question: str, completion: str) -> bool:
        """Whether at least one token of the completion fits after the prompt. Counts truncated completions."""
        prompt = len(self._encoding.prompt(question))
        room = self._encoding.length + 1 - prompt
        if room < 1:
            return False
        # A token has at least one byte, so most completions need not be tokenized for this check.
        if len(completion.encode()) >= room and len(self._encoding.completion(completion)) >= room:
            self.truncated += 1
        return True


def sft_batches(
    data: DataConfig,
    examples: PromptCompletionDataset,
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    shard: int = 0,
    shards: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Endless batches of one of `shards` streams, like `train_batches`; an example is never split. Needs at least as
    many examples as streams."""
    shard_items, buffer_seed = shuffled(examples, seed, shard, shards)
    packed = pack_pieces(shard_items.to_iter_dataset(READ), sequence_length, SFT_FEATURES[:3])
    return batched(packed, data, buffer_seed, batch_size=batch_size, shards=shards)


def _read(line: bytes) -> tuple[str, str]:
    """Question and completion of a line. Raises `ValueError` with what is wrong."""
    value = json.loads(line)
    pair = [value.get(key) if isinstance(value, dict) else None for key in ("question", "completion")]
    question, completion = pair
    if not isinstance(question, str) or not isinstance(completion, str) or not completion:
        raise ValueError("needs an object with text under 'question' and 'completion'")
    if has_lone_surrogate(question + completion):
        raise ValueError("contains a lone surrogate (half of a character)")
    return question, completion
