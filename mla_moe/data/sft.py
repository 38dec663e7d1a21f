"""SFT data: completions of prompts and conversations, to batches whose loss mask selects what the assistant writes."""

from typing import Literal

import grain
import numpy as np
from jaxtyping import Int

from mla_moe.config import ConfigError, DataConfig
from mla_moe.data.chat_dataset import ChatDataset
from mla_moe.data.chat_encoding import ChatRecords
from mla_moe.data.evaluation import filled_batches
from mla_moe.data.packing import READ, Batch, batched, of_one_source, pack_pieces, shuffled

SFT_FEATURES = ("tokens", "targets", "loss_mask", "segment_ids", "positions")
"""Arrays of an SFT batch: those of a pretraining batch, and `loss_mask`, 1 where the target is trained on."""


class SFTDataset(ChatDataset):
    """The usable examples of `records`: `tokens`, `targets` and `loss_mask`, each int32 [≤ length]. A conversation
    whose template changes earlier turns has several (`text.conversation`).

    Raises `ConfigError` as `ChatRecords` does, and if no example is left.
    """

    def __init__(self, records: ChatRecords, length: int, truncation: Literal["cut", "skip"] = "cut"):
        super().__init__(records)
        for sides in records:
            if len(sides) > 1:
                raise ConfigError(records.field, tuple(records.patterns), "has preferences; name them as dpo.data")
            for ids, trained in sides[0]:
                if min(start for start, _ in trained) > length:
                    self.prompts_too_long += 1
                    continue
                self.truncated += len(ids) > length + 1
                if len(ids) > length + 1 and truncation == "skip":
                    continue
                self._tokens.append(ids[: length + 1], trained)
        self._require_examples(records, length)

    @property
    def lengths(self) -> Int[np.ndarray, "N"]:
        return self._tokens.lengths - 1

    @property
    def total_tokens(self) -> int:
        return int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> Batch:
        ids, trained = self._tokens[index]
        return {"tokens": ids[:-1], "targets": ids[1:], "loss_mask": trained[1:].astype(np.int32)}

    def prompt_and_completion(self, index: int) -> tuple[list[int], list[int]]:
        """The tokens before the first that is trained on, and those that are."""
        ids, trained = self._tokens[index]
        return ids[: int(trained.argmax())].tolist(), ids[trained].tolist()


def sft_batches(
    data: DataConfig,
    examples: SFTDataset,
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
    packed = pack_pieces(shard_items.map(of_one_source).to_iter_dataset(READ), sequence_length, SFT_FEATURES[:3], 1)
    return batched(packed, data, buffer_seed, batch_size=batch_size, shards=shards)


def sft_eval_batches(examples: SFTDataset, *, batch_size: int, sequence_length: int) -> list[Batch]:
    """All examples once, packed. Every process gets the same batches in the same order."""
    packed = pack_pieces(grain.MapDataset.source(examples).to_iter_dataset(READ), sequence_length, SFT_FEATURES[:3])
    return filled_batches(list(packed), batch_size)
