"""Packing: documents to batches of packed sequences, with targets, segment ids and positions.

The training pipeline, in several streams (`data/streams.py`):

    documents, shuffled in each epoch → shard of the stream → token ids → windows → packed sequences
    → shuffle buffer → batches, prefetched by a thread

Each stage is Grain's. Its iterator saves and restores its position exactly: the state is a few counters, and restoring
rereads only the documents of the packed sequences that were in progress.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import grain
import numpy as np

from mla_moe.config import ConfigError, DataConfig, require
from mla_moe.text.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]
"""`tokens`, `targets`, `segment_ids`, `positions`, each int32 [batch_size, sequence_length].

Segments are numbered from 1 in each packed sequence; 0 is padding, where the other arrays are 0 too. Attention is
masked between segments.
"""

Item = TypeVar("Item")

READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # each stream has one thread; more are slower
_PIECE = 1 << 20  # characters
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
    ranges: Mapping[str, range] | None = None,
) -> grain.DatasetIterator[Batch]:
    """Endless training batches of one of `shards` streams, `batch_size` packed sequences each. With `data.weights` each
    source, whose documents `ranges` has, is shuffled and packed alone, and packed sequences are drawn by weight.

    In every epoch the shards of the streams are disjoint and cover all documents. A stream starts its next epoch when
    its shard is exhausted, without waiting for other streams. Its saved state resumes with the very next batch;
    `close()` ends its threads. Raises `ConfigError` for fewer documents than streams.
    """
    if len(source) < shards:
        raise ConfigError("data.train", data.train, f"{len(source)} documents cannot feed {shards} streams")
    parts = [range(len(source))]
    if data.weights:
        parts = [(ranges or {}).get(pattern, range(0)) for pattern in data.train]
        for pattern, part in zip(data.train, parts, strict=True):
            fix = f"has {len(part)} documents of its own, too few for {shards} streams; set fewer data.streams"
            require(len(part) >= shards, "data.weights", pattern, fix)
    packed, buffer_seed = [], 0
    for part in parts:
        documents, buffer_seed = shuffled(source, seed, shard, shards, part)
        packed.append(pack_documents(documents, tokenizer, sequence_length))
    mixed = grain.IterDataset.mix(packed, data.weights) if data.weights else packed[0]
    return batched(mixed, data, buffer_seed, batch_size=batch_size, shards=shards)


def shuffled(
    source: Sequence[Item], seed: int, shard: int, shards: int, part: range | None = None
) -> tuple[grain.MapDataset[Item], int]:
    """One stream's shard of the items, or of a `part` of them, shuffled in each of endless epochs; and the seed of its
    shuffle buffer."""
    # Epoch e shuffles with `documents_seed + e`: spread the seeds, or seed 1 would start with seed 0's second epoch.
    documents_seed, buffer_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(2) >> 1)
    items = grain.MapDataset.source(source)
    items = items if part is None or len(part) == len(source) else items[part.start : part.stop]
    return items.shuffle(seed=documents_seed)[shard::shards].repeat(), buffer_seed


def batched(
    packed: grain.IterDataset[Batch], data: DataConfig, seed: int, *, batch_size: int, shards: int
) -> grain.DatasetIterator[Batch]:
    """Packed sequences, shuffled within a buffer, in batches that a thread prefetches."""
    buffer_size = -(-data.shuffle_buffer_size // shards)
    mixed = grain.experimental.WindowShuffleIterDataset(packed, window_size=buffer_size, seed=seed)
    batches = mixed.batch(batch_size, drop_remainder=True)
    return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=data.prefetch))


def pack_documents(
    documents: grain.MapDataset[str], tokenizer: Tokenizer, sequence_length: int
) -> grain.IterDataset[Batch]:
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


def packed_sequences_per_epoch(lengths: Sequence[int], sequence_length: int) -> float:
    """Packed sequences that `pack_pieces` makes of pieces of these lengths per epoch, in a random order."""
    order, bins, full, packed = np.random.default_rng(0), np.zeros(_BINS, np.int64), 0, 0
    while not full:  # a small data set fills the bins with several epochs
        for size in order.permutation(np.asarray(lengths)).tolist():
            fits = bins + size <= sequence_length
            if not fits.any():
                full, packed = full + _BINS, packed + int(bins.sum())
                bins[:], fits[:] = 0, True
            bins[fits.argmax()] += size
    return sum(lengths) * full / packed


def _with_bos_eos(text: str, tokenizer: Tokenizer) -> np.ndarray:
    ids = map(tokenizer.encode, pieces(text))
    return np.concatenate([[tokenizer.bos_id], *ids, [tokenizer.eos_id]], dtype=np.int32)


def pieces(text: str) -> Iterator[str]:
    """A text in the pieces that are tokenized at a time: a tokenizer takes up to 250 times their size in memory."""
    return (text[start : start + _PIECE] for start in range(0, len(text), _PIECE))


class _Windows(grain.experimental.FlatMapTransform):
    """Split a document with bos and eos into consecutive windows of inputs and next tokens, each its own segment.
    An empty document has none."""

    def __init__(self, length: int):
        self._length = length

    def flat_map(self, element: np.ndarray) -> list[Batch]:
        if len(element) == 2:  # bos and eos alone would teach that documents are empty
            return []
        tokens, targets = element[:-1], element[1:]
        starts = range(0, len(tokens), self._length)
        return [{"tokens": tokens[s : s + self._length], "targets": targets[s : s + self._length]} for s in starts]
