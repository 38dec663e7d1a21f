"""Packing: documents to batches of packed sequences, with targets, segment ids and positions.

The training pipeline, in several streams (`data/streams.py`):

    documents, shuffled in each epoch → shard of the stream → token ids → windows → packed sequences
    → shuffle buffer → batches, prefetched by a thread

Each stage is Grain's. Its iterator saves and restores its position exactly: the state is a few counters, and restoring
rereads only the documents of the packed sequences that were in progress.
"""

import array
import bisect
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import grain
import numpy as np

from mla_moe.config import ConfigError, DataConfig, require
from mla_moe.data.malformed_records import Document, TokenIds
from mla_moe.text.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]
"""`tokens`, `targets`, `segment_ids`, `positions`, each int32 [batch_size, sequence_length].

Segments are numbered from 1 in each packed sequence; 0 is padding, where the other arrays are 0 too. Attention is
masked between segments. Training batches also have `documents`, int32 [batch_size, sources]: how many documents, or
examples, of each source begin in a sequence.
"""

Item = TypeVar("Item")

READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # each stream has one thread; more are slower
_PIECE = 1 << 20  # characters
_BINS = 128  # sequences packed at one time: 1-2 % is padding; more bins would make restoring slower


def train_batches(
    data: DataConfig,
    source: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    shard: int = 0,
    shards: int = 1,
    ranges: Mapping[str, range] | None = None,
) -> grain.DatasetIterator[Batch]:
    """Endless training batches of one of `shards` streams, `batch_size` packed sequences each. `ranges` has the
    documents of each source; by default there is one. With `data.weights` each source is shuffled and packed alone, and
    packed sequences are drawn by weight.

    In every epoch the shards of the streams are disjoint and cover all documents. A stream starts its next epoch when
    its shard is exhausted, without waiting for other streams. Its saved state resumes with the very next batch;
    `close()` ends its threads. Raises `ConfigError` for fewer documents than streams.
    """
    if len(source) < shards:
        raise ConfigError("data.train", data.train, f"{len(source)} documents cannot feed {shards} streams")
    parts = [range(len(source))]
    ends = [found.stop for found in ranges.values()] if ranges else [len(source)]
    if data.weights:
        parts = [(ranges or {}).get(pattern, range(0)) for pattern in data.train]
        for pattern, part in zip(data.train, parts, strict=True):
            fix = f"has {len(part)} documents of its own, too few for {shards} streams; set fewer data.streams"
            require(len(part) >= shards, "data.weights", pattern, fix)
    packed, buffer_seed = [], 0
    for part in parts:
        documents, buffer_seed = shuffled(_Numbered(source, ends), seed, shard, shards, part)
        encoded = documents.map(lambda found: (found[0], document_ids(found[1], tokenizer)))
        packed.append(_pack_encoded(encoded, sequence_length, len(ends)))
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
    documents: grain.MapDataset[Document], tokenizer: Tokenizer, sequence_length: int
) -> grain.IterDataset[Batch]:
    """Tokenize, split into windows, and pack the windows into sequences (first fit)."""
    return _pack_encoded(documents.map(lambda text: (0, document_ids(text, tokenizer))), sequence_length)


def _pack_encoded(
    documents: grain.MapDataset[tuple[int, np.ndarray]], sequence_length: int, sources: int = 0
) -> grain.IterDataset[Batch]:
    """The documents, each after the number of its source."""
    windows = grain.experimental.FlatMapIterDataset(documents.to_iter_dataset(READ), _Windows(sequence_length))
    return pack_pieces(windows, sequence_length, ("tokens", "targets"), sources)


def pack_pieces(
    pieces: grain.IterDataset[Batch], sequence_length: int, features: Sequence[str], sources: int = 0
) -> grain.IterDataset[Batch]:
    """Pack pieces into sequences, first fit; each piece is its own segment. `tokens` is one of the features, and the
    features of a piece have equal lengths. With `sources` each piece has `source`, the number of its source, or −1 for
    one that does not begin a document, and each sequence gets `documents`."""
    packed = grain.experimental.FirstFitPackIterDataset(
        pieces,
        length_struct=dict.fromkeys(features, sequence_length),
        num_packing_bins=_BINS,
        shuffle_bins=False,  # `batched` shuffles
        meta_features=("source",) if sources else (),
    )
    # Grain numbers segments and positions per feature; they are equal for features of equal length.
    names = {name: name for name in features} | {"segment_ids": "tokens_segment_ids", "positions": "tokens_positions"}

    def renamed(sequence: Batch) -> Batch:
        found = {name: sequence[key] for name, key in names.items()}
        if sources:
            counts = np.bincount(np.add(sequence["source"], 1), minlength=sources + 1)
            found["documents"] = counts[1:].astype(np.int32)
        return found

    return packed.map(renamed)


def of_one_source(example: Batch) -> Batch:
    """An example as `pack_pieces` needs it to count examples."""
    return example | {"source": np.array(0)}


def window_lengths(documents: Sequence[Document], tokenizer: Tokenizer, sequence_length: int) -> "array.array[int]":
    """The lengths of the windows of all documents, which takes as long as tokenizing them."""
    windows, found = _Windows(sequence_length), array.array("i")
    for text in documents:
        found.extend(len(window["tokens"]) for window in windows.flat_map((0, document_ids(text, tokenizer))))
    return found


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


def document_ids(document: Document, tokenizer: Tokenizer) -> TokenIds:
    """The token ids of a text between bos and eos; token ids as they are, with eos at the end. An empty document has
    none: with bos and eos alone a model would learn that documents are empty."""
    if isinstance(document, str):
        begin, ids = [tokenizer.bos_id], map(tokenizer.encode, pieces(document))
    else:
        ends = len(document) > 0 and document[-1] == tokenizer.eos_id
        begin, ids = [], [document[:-1] if ends else document]
    found = np.concatenate([begin, *ids, [tokenizer.eos_id]]).astype(np.int32)
    return found if len(found) > len(begin) + 1 else found[:0]


def pieces(text: str) -> Iterator[str]:
    """A text in the pieces that are tokenized at a time: a tokenizer takes up to 250 times their size in memory."""
    return (text[start : start + _PIECE] for start in range(0, len(text), _PIECE))


class _Windows(grain.experimental.FlatMapTransform):
    """Split a document with bos and eos into consecutive windows of inputs and next tokens, each its own segment.
    An empty document has none."""

    def __init__(self, length: int):
        self._length = length

    def flat_map(self, element: tuple[int, np.ndarray]) -> list[Batch]:
        source, ids = element
        return [
            {"tokens": ids[s:stop], "targets": ids[s + 1 : stop + 1], "source": np.array(-1 if s else source)}
            for s, stop in ((s, min(s + self._length, len(ids) - 1)) for s in range(0, len(ids) - 1, self._length))
        ]


class _Numbered(Sequence[tuple[int, Item]]):
    """The documents of several sources, each after the number of its source."""

    def __init__(self, documents: Sequence[Item], ends: Sequence[int]):
        """`ends` are where the documents of each source end."""
        self._documents, self._ends = documents, ends

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> tuple[int, Item]:
        return bisect.bisect_right(self._ends, index), self._documents[index]
