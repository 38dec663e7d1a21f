"""The position in the data, saved with the state as an item of an Orbax checkpoint."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import orbax.checkpoint as ocp


@runtime_checkable
class DataPosition(Protocol):
    """The position in the data, saved with the state: `data.Batches` over text, or the number of prompts used."""

    def states(self) -> Mapping[int, str]:
        """The position in each data stream, by the stream's number, as JSON."""

    def restore(self, read: Callable[[int], str]) -> None:
        """Move to a saved position; `read` returns the position in a stream by its number."""


class FixedPosition:
    """A position that is not saved, and that restoring a checkpoint does not move."""

    def states(self) -> Mapping[int, str]:
        return {}

    def restore(self, read: Callable[[int], str]) -> None:
        pass


class StreamsHandler(ocp.CheckpointHandler):
    """Saves the data position: a file for each stream, with its checksum in the last line. Processes that share a
    stream write the same file."""

    def save(self, directory: Path, args: "StreamsArgs") -> None:
        for number, state in args.item.states().items():
            temporary = directory / f".stream_{number}.{jax.process_index()}"
            temporary.write_text(f"{state}\n{_crc(state)}")
            temporary.replace(directory / f"stream_{number}.json")

    def restore(self, directory: Path, args: "StreamsArgs") -> None:
        def read(number: int) -> str:
            state, _, crc = (directory / f"stream_{number}.json").read_text().partition("\n")
            if crc != _crc(state):
                raise ValueError(f"the position in data stream {number} does not match its checksum")
            return state

        args.item.restore(read)


def _crc(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


@ocp.args.register_with_handler(StreamsHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class StreamsArgs(ocp.args.CheckpointArgs):
    item: DataPosition
