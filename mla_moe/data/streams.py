"""Batches out of several streams side by side, the same whatever number of processes shares them.

A global batch is the next rows of every stream, one stream after the other. A process runs the streams whose rows its
devices hold, and each stream's place is saved on its own: another number of processes goes on with the same batches.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import grain
import numpy as np

from mla_moe.config import ConfigError, require
from mla_moe.data.packing import Batch


def stream_count(streams: int | None, batch_size: int, documents: int) -> int:
    """How many streams feed a batch: those of `data.streams`, or 4 or 2 that divide it and have a document each, or 1:
    enough for four processes, few enough that each mixes well. Raises `ConfigError` for more streams than documents."""
    if streams is None:
        streams = next((n for n in (4, 2) if batch_size % n == 0 and n <= documents), 1)
    require(streams <= documents, "data.streams", streams, f"{documents} documents cannot feed as many; set fewer")
    return streams


class Batches:
    """This process's rows of batch after batch."""

    def __init__(
        self,
        make: Callable[[int], grain.DatasetIterator[Batch]],
        rows: slice,
        batch_size: int,
        streams: int,
        source: int = 0,
    ):
        """`make(i)` opens stream i; `rows` of each batch are this process's; `source` is the fingerprint of what is
        read."""
        share = batch_size // streams
        if rows.start % share or rows.stop % share:
            fix = (
                f"{streams} streams of {share} rows do not fit processes of {rows.stop - rows.start}; give more streams"
            )
            raise ConfigError("data.streams", streams, fix)
        self.rows, self._source = rows, source
        self._make, self._mine = make, range(rows.start // share, rows.stop // share)
        self._first: Future[list[Batch]] | None = None

    @cached_property
    def _streams(self) -> Mapping[int, grain.DatasetIterator[Batch]]:
        return {number: self._make(number) for number in self._mine}

    def prepare(self) -> None:
        """Begin to fill the streams' windows, one after the other, while something else is done."""
        self._first = ThreadPoolExecutor(1).submit(self._parts)

    def __next__(self) -> Batch:
        first, self._first = self._first, None
        parts = self._parts() if first is None else first.result()
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def _parts(self) -> list[Batch]:
        return [next(stream) for stream in self._streams.values()]

    def states(self) -> dict[int, str]:
        """The place of each stream, as JSON."""
        return {
            number: json.dumps({"source": self._source, "stream": stream.get_state()})
            for number, stream in self._streams.items()
        }

    def restore(self, read: Callable[[int], str]) -> None:
        """Go to where `states` was called, given how to read a stream's place. Raises `ConfigError` if it was called
        over other files."""
        for number, stream in self._streams.items():
            place = json.loads(read(number))
            if place["source"] != self._source:
                fix = (
                    "number or sizes of the files are not those of the checkpoint; put them back, or begin another run"
                )
                raise ConfigError("data", "other files", fix)
            stream.set_state(place["stream"])
            stream.start_prefetch()

    def close(self) -> None:
        if self._first is not None:
            self._first.exception()  # waits for it
        if "_streams" in vars(self):
            for stream in self._streams.values():
                stream.close()


def process_rows(indices: Iterable[tuple[slice, ...] | None], batch_size: int) -> slice:
    """The rows of a batch that are held by devices with these parts of it. Raises `ConfigError` for rows apart."""
    spans = sorted({index[0].indices(batch_size)[:2] for index in indices if index is not None})
    for (_, stop), (start, _) in itertools.pairwise(spans):
        if start != stop:
            fix = "lays the rows of a process apart from each other; let data, fsdp and expert be the outer axes"
            raise ConfigError("mesh", spans, fix)
    return slice(spans[0][0], spans[-1][1])
