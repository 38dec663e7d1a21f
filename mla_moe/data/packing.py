"""Packing: documents to batches of packed sequences, with targets, segment ids and positions.

The training pipeline, in several streams (`data/streams.py`):

    documents, shuffled in each epoch → shard of the stream → token ids → windows → packed sequences
    → shuffle buffer → batches, prefetched by a thread

Each stage is Grain's. Its iterator saves and restores its position exactly: the state is a few counters, and restoring
rereads only the documents of the packed sequences that were in progress.
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

Segments are numbered from 1 in each packed sequence; 0 is padding, where the other arrays are 0 too. Attention is
masked between segments.
"""

Item = TypeVar("Item")

READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # each stream has one thread; more are slower
_BINS = 128  # sequences packed at one time: 1-2 % is padding; more bins would make restoring slower


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
    """Endless training batches of one of `shards` streams, `batch_size` packed sequences each.

    In every epoch the shards of the streams are disjoint and cover all documents. A stream starts its next epoch when
    its shard is exhausted, without waiting for other streams. Its saved state resumes with the very next batch;
    `close()` ends its threads. Raises `ConfigError` for fewer documents than streams.
    """
    if len(source) < shards:
        raise ConfigError("data.train", data.train, f"{len(source)} documents cannot feed {shards} streams")
    documents, buffer_seed = shuffled(source, seed, shard, shards)
    packed = _pack(documents, tokenizer, sequence_length)
    return batched(packed, data, buffer_seed, batch_size=batch_size, shards=shards)


def shuffled(source: Sequence[Item], seed: int, shard: int, shards: int) -> tuple[grain.MapDataset[Item], int]:
    """One stream's shard of the items, shuffled in each of endless epochs; and the seed of its shuffle buffer."""
    # Epoch e shuffles with `documents_seed + e`: spread the seeds, or seed 1 would start with seed 0's second epoch.
    documents_seed, buffer_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(2) >> 1)
    return grain.MapDataset.source(source).shuffle(seed=documents_seed)[shard::shards].repeat(), buffer_seed


def batched(
    packed: grain.IterDataset[Batch], data: DataConfig, seed: int, *, batch_size: int, shards: int
) -> grain.DatasetIterator[Batch]:
    """Packed sequences, shuffled within a buffer, in batches that a thread prefetches."""
    buffer_size = -(-data.shuffle_buffer_size // shards)
    mixed = grain.experimental.WindowShuffleIterDataset(packed, window_size=buffer_size, seed=seed)
    batches = mixed.batch(batch_size, drop_remainder=True)
    return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=data.prefetch))


def heldout_batches(
    source: Sequence[str], tokenizer: Tokenizer, *, batch_size: int, sequence_length: int
) -> tuple[list[Batch], int]:
    """All of `source` once, and its size in UTF-8 bytes. Every process gets the same batches in the same order.

    The last batch is filled up with padding. The sum of −log p over all targets that are not padding, divided by ln 2
    and the bytes, is bits per byte, which is comparable between tokenizers.
    """
    sequences = list(_pack(grain.MapDataset.source(source), tokenizer, sequence_length))
    blank = {key: np.zeros_like(value) for key, value in sequences[0].items()}
    sequences += [blank] * (-len(sequences) % batch_size)
    groups = [sequences[start : start + batch_size] for start in range(0, len(sequences), batch_size)]
    batches = [{key: np.stack([sequence[key] for sequence in group]) for key in blank} for group in groups]
    return batches, sum(len(text.encode("utf-8")) for text in source)


def gzip_bits_per_byte(documents: Iterable[str]) -> float:
    """Bits per byte of `gzip -9` on `documents`, one by one: a baseline for `eval/bits_per_byte`."""
    texts = [text.encode("utf-8") for text in documents]
    return 8 * sum(len(gzip.compress(text, 9)) for text in texts) / sum(map(len, texts))


def _pack(documents: grain.MapDataset[str], tokenizer: Tokenizer, sequence_length: int) -> grain.IterDataset[Batch]:
    """Tokenize, split into windows, and pack the windows into sequences (first fit)."""
    windows = grain.experimental.FlatMapIterDataset(
        documents.map(lambda text: _with_bos_eos(text, tokenizer)).to_iter_dataset(READ), _Windows(sequence_length)
    )
    return pack_pieces(windows, sequence_length, ("tokens", "targets"))


def pack_pieces(
    pieces: grain.IterDataset[Batch], sequence_length: int, features: Sequence[str]
) -> grain.IterDataset[Batch]:
    """Pack pieces into sequences, first fit; each piece is its own segment. `tokens` is one of the features, and the
    features of a piece have equal lengths."""
    packed = grain.experimental.FirstFitPackIterDataset(
        pieces,
        length_struct=dict.fromkeys(features, sequence_length),
        num_packing_bins=_BINS,
        shuffle_bins=False,  # `batched` shuffles
    )
    # Grain numbers segments and positions per feature; they are equal for features of equal length.
    names = {name: name for name in features} | {"segment_ids": "tokens_segment_ids", "positions": "tokens_positions"}
    return packed.map(lambda sequence: {name: sequence[key] for name, key in names.items()})


def _with_bos_eos(text: str, tokenizer: Tokenizer) -> np.ndarray:
    return np.concatenate([[tokenizer.bos_id], tokenizer.encode(text), [tokenizer.eos_id]], dtype=np.int32)


class _Windows(grain.experimental.FlatMapTransform):
    """Split a document with bos and eos into consecutive windows of inputs and next tokens, each its own segment."""

    def __init__(self, length: int):
        self._length = length

    def flat_map(self, element: np.ndarray) -> list[Batch]:
        tokens, targets = element[:-1], element[1:]
        starts = range(0, len(tokens), self._length)
        return [{"tokens": tokens[s : s + self._length], "targets": targets[s : s + self._length]} for s in starts]
