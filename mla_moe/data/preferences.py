"""Preference data for DPO: pairs of a chosen and a rejected completion of one prompt, packed side by side."""

import grain
import numpy as np
from jaxtyping import Int

from mla_moe.config import ConfigError, DataConfig
from mla_moe.data.chat_dataset import ChatDataset
from mla_moe.data.chat_encoding import ChatRecords
from mla_moe.data.evaluation import filled_batches
from mla_moe.data.packing import READ, Batch, batched, of_one_source, pack_pieces, shuffled
from mla_moe.data.sft import SFT_FEATURES

_FEATURES = ("tokens", "targets", "loss_mask", "side", "position")


class PreferenceDataset(ChatDataset):
    """The usable pairs of `records`: both sides one after the other in `tokens`, `targets`, `loss_mask`, `side` (1
    chosen, 2 rejected) and `position`, each int32 [≤ length]. Each side may take half of `length`; longer ones are cut.

    Raises `ConfigError` as `ChatRecords` does, and if no pair is left.
    """

    def __init__(self, records: ChatRecords, length: int):
        super().__init__(records)
        most = length // 2
        for sides in records:
            if len(sides) != 2:
                fix = "has records without preferences; each needs prompt, chosen and rejected"
                raise ConfigError(records.field, tuple(records.patterns), fix)
            if any(len(sequences) != 1 for sequences in sides):
                fix = (
                    "has pairs that differ in several turns, which the chat template renders apart; leave the last one"
                )
                raise ConfigError(records.field, tuple(records.patterns), fix)
            pair = [sequences[0] for sequences in sides]
            if any(trained[0][0] > most for _, trained in pair):
                self.prompts_too_long += 1
                continue
            self.truncated += any(len(ids) > most + 1 for ids, _ in pair)
            for ids, trained in pair:
                self._tokens.append(ids[: most + 1], trained)
        self._require_examples(records, most)

    @property
    def lengths(self) -> Int[np.ndarray, "N"]:
        return (self._tokens.lengths - 1).reshape(-1, 2).sum(axis=1)

    def __len__(self) -> int:
        return len(self._tokens) // 2

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        parts = []
        for side in (1, 2):
            ids, trained = self._tokens[2 * index + side - 1]
            size = len(ids) - 1
            columns = ids[:-1], ids[1:], trained[1:], np.full(size, side), np.arange(size)
            parts.append(np.stack(columns).astype(np.int32))
        return dict(zip(_FEATURES, np.concatenate(parts, axis=1), strict=True))


def preference_batches(
    data: DataConfig,
    pairs: PreferenceDataset,
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    shard: int = 0,
    shards: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Endless batches with `SFT_FEATURES` of one of `shards` streams, like `train_batches`. A pair is never split; its
    chosen and rejected sides are segments 2 k − 1 and 2 k of a packed sequence, k = 1, 2, …"""
    shard_items, buffer_seed = shuffled(pairs, seed, shard, shards)
    packed = pack_pieces(shard_items.map(of_one_source).to_iter_dataset(READ), sequence_length, _FEATURES, 1)
    return batched(packed.map(_as_segments), data, buffer_seed, batch_size=batch_size, shards=shards)


def preference_eval_batches(pairs: PreferenceDataset, *, batch_size: int, sequence_length: int) -> list[Batch]:
    """All pairs once, packed. Every process gets the same batches in the same order."""
    packed = pack_pieces(grain.MapDataset.source(pairs).to_iter_dataset(READ), sequence_length, _FEATURES)
    return filled_batches(list(packed.map(_as_segments)), batch_size)


def _as_segments(sequence: Batch) -> Batch:
    pair, side = sequence["segment_ids"], sequence["side"]
    segments = np.where(pair > 0, 2 * (pair - 1) + side, 0).astype(np.int32)
    kept = {name: sequence[name] for name in (*SFT_FEATURES[:3], "documents") if name in sequence}
    return kept | {"segment_ids": segments, "positions": sequence["position"]}
