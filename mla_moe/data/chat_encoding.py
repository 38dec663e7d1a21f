"""Records of chat data to token ids, with what of them is trained on."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mla_moe.config import ConfigError, DataConfig
from mla_moe.data.chat_formats import Pair, Preference, read_example, recognised
from mla_moe.data.frozen_files import FrozenFiles
from mla_moe.data.records import read_records, texts_of
from mla_moe.data.sources import files_by_pattern
from mla_moe.text.chat_tokenizer import Conversation
from mla_moe.text.conversation import TrainingSequence

_BATCH = 256  # records that are encoded at a time
_SAMPLES, _SAMPLE_CHARACTERS = 1000, 10_000


@dataclass(frozen=True)
class ChatEncoding:
    """How examples are tokenized."""

    prompt: Callable[[str], Sequence[int]]
    """Renders a question as prompt tokens, with bos in front."""
    completion: Callable[[str], Sequence[int]]
    end: int
    """Token that ends a completion."""
    conversations: Callable[[Sequence[Conversation]], list[list[TrainingSequence] | str]]
    """`ChatTokenizer.encode_training`."""
    chat: bool
    """Whether prompts are rendered with the chat template."""

    def pair(self, pair: Pair) -> list[TrainingSequence]:
        prompt = self.prompt(pair.question)
        ids = [*prompt, *self.completion(pair.completion), self.end]
        return [(ids, [(len(prompt), len(ids))])]


@dataclass
class ChatRecords:
    """The records of all files that match `patterns`, encoded one after the other: iterate over it once.

    Raises `ConfigError` on `field` if no file matches, and at the end if more than `max_malformed_fraction` of the
    records are malformed.
    """

    patterns: Sequence[str]
    field: str
    encoding: ChatEncoding
    max_malformed_fraction: float
    format: str = "auto"
    max_record_bytes: int = DataConfig.max_record_bytes
    malformed: list[str] = field(default_factory=list)
    """Malformed records, each with its file, line number and error."""
    formats: Counter[str] = field(default_factory=Counter)
    """Usable records of each format."""
    sample: list[str] = field(default_factory=list)
    """Texts of a sample of the usable records."""

    def __post_init__(self) -> None:
        paths = [path for files in files_by_pattern(self.patterns, self.field).values() for path in files.values()]
        self.files, self._random = FrozenFiles(paths, self.field), random.Random(0)

    def __iter__(self) -> Iterator[list[list[TrainingSequence]]]:
        """The training sequences of the sides of each usable record: a preference has two, chosen and rejected, any
        other record one."""
        count, waiting = 0, []
        for record in read_records(self.files, self.field, self.max_record_bytes):
            count += 1
            try:
                if record.value is None:
                    raise ValueError(record.error)
                name = recognised(record.value, self.format)
                example = read_example(record.value, name, chat=self.encoding.chat)
            except (ValueError, RecursionError) as error:
                self.malformed.append(f"{record.where}: {error}")
                continue
            sides = example if isinstance(example, Preference) else [example]
            waiting.append((record.where, name, sides, record.value))
            if len(waiting) == _BATCH:
                yield from self._encode(waiting)
                waiting = []
        yield from self._encode(waiting)
        if len(self.malformed) > self.max_malformed_fraction * count:
            stage = "dpo" if self.field.startswith("dpo.") else "sft"
            wrong = f"{len(self.malformed)} of {count} lines are malformed, the first at {self.malformed[0]}"
            fix = f"{wrong}; raise {stage}.max_malformed_fraction to skip more"
            raise ConfigError(self.field, tuple(self.patterns), fix)

    def _encode(self, waiting: Sequence[tuple[str, str, Sequence[Any], Any]]) -> Iterator[list[list[TrainingSequence]]]:
        conversations = [side for _, _, sides, _ in waiting for side in sides if isinstance(side, Conversation)]
        results = iter(self.encoding.conversations(conversations) if conversations else [])
        for where, name, sides, value in waiting:
            found = [next(results) if isinstance(side, Conversation) else self.encoding.pair(side) for side in sides]
            wrong = next((side for side in found if isinstance(side, str)), None)
            if len(found) == 2 and found[0] == found[1]:  # they differ in what the tokens do not show
                wrong = wrong or "'chosen' and 'rejected' are the same tokens"
            if wrong:
                self.malformed.append(f"{where}: {wrong}")
                continue
            self.formats[name] += 1
            number = self.formats.total() - 1
            if (place := number if number < _SAMPLES else self._random.randrange(number + 1)) < _SAMPLES:
                text = "\n".join(texts_of(value))[:_SAMPLE_CHARACTERS]
                self.sample[place : place + 1] = [text]
            yield [side for side in found if not isinstance(side, str)]
