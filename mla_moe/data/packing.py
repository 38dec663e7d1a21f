"""Documents to batches: tokens, the next tokens, and which document each belongs to.

Training goes

    documents, shuffled anew each epoch → a stream's share → token ids → windows → packed sequences
    → moved about within a window → batches, prepared ahead by a thread

in a few streams side by side (`data/streams.py`),

and each step is Grain's, whose iterator saves and restores its place exactly: its state is a few counters, and a
restored one rereads only the documents of the packed sequences that were in flight.
"""

import gzip
from collections.abc import Iterable, Sequence
from typing import TypeVar

import grain
import numpy as np

from mla_moe.config import ConfigError, DataConfig
from mla_moe.text.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]
"""`tokens`, `targets`, `segment_ids`, `positions`, each int32 [batch_size, sequence_length].

Segments count from 1 in each row; 0 is padding, where the other three are 0 too. Attention stays within a segment.
"""

Item = TypeVar("Item")

READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # each stream has a thread; more of them cost more
_BINS = 128  # sequences packed at one time: 1-2 % stays empty; more would be more to repack when restoring


def train_batches(
    data: DataConfig,
    source: Sequence[str],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    shard: int = 0,
    shards: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Endless training batches of one of `shards` streams, `batch_size` sequences each.

    In every epoch the streams' shares of the documents are disjoint and cover all of them. A stream starts its next
    epoch when its share is used up, so none waits for another. Its saved state resumes with the very next batch;
    `close()` ends its threads.
    """
    if len(source) < shards:
        raise ConfigError("data.train", data.train, f"{len(source)} documents cannot feed {shards} streams")
    documents, window_seed = shuffled(source, seed, shard, shards)
    packed = _pack(documents, tokenizer, sequence_length)
    return batched(packed, data, window_seed, batch_size=batch_size, shards=shards)


def shuffled(source: Sequence[Item], seed: int, shard: int, shards: int) -> tuple[grain.MapDataset[Item], int]:
    """A stream's share of the items, anew in each of endless epochs, and a seed for what moves about sequences."""
    # Epoch e shuffles with `documents_seed + e`: spread the seeds, or seed 1 would start with seed 0's second epoch.
    documents_seed, window_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(2) >> 1)
    return grain.MapDataset.source(source).shuffle(seed=documents_seed)[shard::shards].repeat(), window_seed


def batched(
    packed: grain.IterDataset[Batch], data: DataConfig, seed: int, *, batch_size: int, shards: int
) -> grain.DatasetIterator[Batch]:
    """Packed sequences moved about within a window, in batches that a thread prepares ahead."""
    window = -(-data.shuffle_buffer_size // shards)
    mixed = grain.experimental.WindowShuffleIterDataset(packed, window_size=window, seed=seed)
    batches = mixed.batch(batch_size, drop_remainder=True)
    return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=data.prefetch))


def heldout_batches(
    source: Sequence[str], tokenizer: Tokenizer, *, batch_size: int, sequence_length: int
) -> tuple[list[Batch], int]:
    """All of `source` once, and its size in UTF-8 bytes; every process gets the same batches in the same order.

    Rows that fill up the last batch are padding alone. The sum of −log p over all targets that are not padding, divided
    by ln 2 and the bytes, is bits per byte: a figure that models with different tokenizers share.
    """
    rows = list(_pack(grain.MapDataset.source(source), tokenizer, sequence_length))
    blank = {key: np.zeros_like(value) for key, value in rows[0].items()}
    rows += [blank] * (-len(rows) % batch_size)
    groups = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    batches = [{key: np.stack([row[key] for row in group]) for key in blank} for group in groups]
    return batches, sum(len(text.encode("utf-8")) for text in source)


def gzip_bits_per_byte(documents: Iterable[str]) -> float:
    """What `gzip -9` needs for `documents` one by one, in bits per byte: the mark that a model has to beat."""
    texts = [text.encode("utf-8") for text in documents]
    return 8 * sum(len(gzip.compress(text, 9)) for text in texts) / sum(map(len, texts))


def _pack(documents: grain.MapDataset[str], tokenizer: Tokenizer, sequence_length: int) -> grain.IterDataset[Batch]:
    """Tokenize, cut into windows and fill sequences with them, first fit."""
    windows = grain.experimental.FlatMapIterDataset(
        documents.map(lambda text: _frame(text, tokenizer)).to_iter_dataset(READ), _Windows(sequence_length)
    )
    return pack_pieces(windows, sequence_length, ("tokens", "targets"))


def pack_pieces(
    pieces: grain.IterDataset[Batch], sequence_length: int, features: Sequence[str]
) -> grain.IterDataset[Batch]:
    """Sequences filled with pieces, each a segment of its own, first fit. `tokens` is among the features, which are
    equally long within a piece."""
    packed = grain.experimental.FirstFitPackIterDataset(
        pieces,
        length_struct=dict.fromkeys(features, sequence_length),
        num_packing_bins=_BINS,
        shuffle_bins=False,  # the caller decides about order
    )
    # Grain numbers segments and positions for each feature; equal lengths have equal numbers.
    names = {name: name for name in features} | {"segment_ids": "tokens_segment_ids", "positions": "tokens_positions"}
    return packed.map(lambda sequence: {name: sequence[key] for name, key in names.items()})


def _frame(text: str, tokenizer: Tokenizer) -> np.ndarray:
    return np.concatenate([[tokenizer.bos_id], tokenizer.encode(text), [tokenizer.eos_id]], dtype=np.int32)


class _Windows(grain.experimental.FlatMapTransform):
    """A framed document as consecutive windows of inputs and their next tokens, each a segment of its own."""

    def __init__(self, length: int):
        self._length = length

    def flat_map(self, element: np.ndarray) -> list[Batch]:
        tokens, targets = element[:-1], element[1:]
        starts = range(0, len(tokens), self._length)
        return [{"tokens": tokens[s : s + self._length], "targets": targets[s : s + self._length]} for s in starts]
