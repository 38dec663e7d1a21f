"""Batches from several streams, the same for any number of processes.

A global batch is the next sequences of every stream, in order of the streams. A process runs the streams whose
sequences are on its devices. The position of each stream is saved separately, so that another number of processes
resumes with the same batches.

The documents that were trained on are counted by source and stream, and saved with the positions.
"""

import itertools
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import grain
import numpy as np

from mla_moe.config import ConfigError, require
from mla_moe.data.packing import Batch

logger = logging.getLogger(__name__)


def stream_count(streams: int | None, batch_size: int, documents: int) -> int:
    """Number of streams: `data.streams`, else 4, 2 or 1, the first that divides the batch and is at most the number of
    documents. Four processes can read, and each stream still mixes well. Raises `ConfigError` for more streams than
    documents."""
    if streams is None:
        streams = next((n for n in (4, 2) if batch_size % n == 0 and n <= documents), 1)
    require(streams <= documents, "data.streams", streams, f"there are only {documents} documents; set fewer streams")
    return streams


class Batches:
    """Iterator over this process's sequences of each global batch. Instead of those of the batch, `documents` has the
    documents of each source since the start of the stage, in this process's streams: int [sources]."""

    def __init__(
        self,
        make: Callable[[int], grain.DatasetIterator[Batch]],
        rows: slice,
        batch_size: int,
        streams: int,
        source: int = 0,
        field: str = "data.train",
        patterns: Sequence[str] = (),
    ):
        """`make(i)` opens stream i; `rows` are this process's sequences of each batch; `source` is the fingerprint of
        the files, which `patterns` of the recipe's `field` match."""
        per_stream = batch_size // streams
        if rows.start % per_stream or rows.stop % per_stream:
            local = rows.stop - rows.start
            fix = f"streams of {per_stream} sequences do not divide the {local} of a process; set more streams"
            raise ConfigError("data.streams", streams, fix)
        self._make, self._source, self._field, self._patterns = make, source, field, tuple(patterns)
        self._mine = range(rows.start // per_stream, rows.stop // per_stream)
        self._prefetched: Future[list[Batch]] | None = None
        self._documents: dict[int, list[int]] = {}
        self._count, self.fraction = streams, len(self._mine) / streams
        """The streams that this process reads, as a fraction of all."""

    @cached_property
    def _streams(self) -> Mapping[int, grain.DatasetIterator[Batch]]:
        return {number: self._make(number) for number in self._mine}

    def prepare(self) -> None:
        """Start to fill the shuffle buffers of the streams in the background."""
        self._prefetched = ThreadPoolExecutor(1).submit(self._next_of_each_stream)

    def __next__(self) -> Batch:
        prefetched, self._prefetched = self._prefetched, None
        parts = self._next_of_each_stream() if prefetched is None else prefetched.result()
        for number, part in zip(self._mine, parts, strict=True):
            new = part["documents"].sum(axis=0, dtype=int)
            self._documents[number] = (new + self._documents.get(number, 0)).tolist()
        batch = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        return batch | {"documents": np.sum(list(self._documents.values()), axis=0)}

    def _next_of_each_stream(self) -> list[Batch]:
        return [next(stream) for stream in self._streams.values()]

    def states(self) -> dict[int, str]:
        """The data position of each stream, as JSON."""
        return {
            number: json.dumps(
                {
                    "source": self._source,
                    "streams": self._count,
                    "documents": self._documents.get(number),
                    "stream": stream.get_state(),
                }
            )
            for number, stream in self._streams.items()
        }

    def restore(self, read: Callable[[int], str]) -> None:
        """Restore the positions that `states` returned; `read(i)` is that of stream i. Raises `ConfigError` for
        other files."""
        for number, stream in self._streams.items():
            position = json.loads(read(number))
            if position["source"] != self._source:
                different = "files differ from the checkpoint's in number, size or data.max_record_bytes"
                fix = f"{different}; restore them or start another run"
                raise ConfigError(self._field, self._patterns, fix)
            if (saved := position.get("streams", self._count)) != self._count:
                fix = f"the checkpoint's position is in {saved}; set that, and a batch size that it divides"
                raise ConfigError("data.streams", self._count, fix)
            if "documents" not in position:
                logger.warning("stream %d: the checkpoint is older than the count of epochs; it starts here", number)
            elif position["documents"]:
                self._documents[number] = position["documents"]
            stream.set_state(position["stream"])
            stream.start_prefetch()

    def close(self) -> None:
        if self._prefetched is not None:
            self._prefetched.exception()  # waits for the background thread
        if "_streams" in vars(self):
            for stream in self._streams.values():
                stream.close()


def process_rows(indices: Iterable[tuple[slice, ...] | None], batch_size: int) -> slice:
    """The sequences of a batch on a process's devices. Raises `ConfigError` if they are not contiguous."""
    spans = sorted({index[0].indices(batch_size)[:2] for index in indices if index is not None})
    for (_, stop), (start, _) in itertools.pairwise(spans):
        if start != stop:
            fix = "the sequences of a process are not contiguous; make data, fsdp and expert the outer mesh axes"
            raise ConfigError("mesh", spans, fix)
    return slice(spans[0][0], spans[-1][1])
