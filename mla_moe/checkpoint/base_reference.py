"""The base of a run's adapters: which checkpoint it is, and that it is still the same."""

import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from mla_moe.checkpoint.adapter import AdapterCheckpoint, fingerprint, open_base_of
from mla_moe.checkpoint.bucket_run import location
from mla_moe.checkpoint.files import check
from mla_moe.checkpoint.hub import parse_model
from mla_moe.checkpoint.orbax_checkpoint import array_checksums
from mla_moe.checkpoint.orbax_layout import read_json_item
from mla_moe.checkpoint.reader import load_arrays, open_checkpoint
from mla_moe.config.hub import is_hub, shown
from mla_moe.config.storage import is_bucket
from mla_moe.nn.abstract_model import AbstractModel, Arrays


class BaseReference(NamedTuple):
    """Stored in a checkpoint of adapters in place of the frozen parameters."""

    directory: str
    dtype: str
    """Dtype of the matrices on the devices when `checksum` was computed; another platform may have another, or the
    recipe other formats of a quantized base."""
    checksum: int
    fingerprint: int | None = None
    """`checkpoint.adapter.fingerprint`, which every command compares; None in checkpoints of before there was one."""

    @classmethod
    def create(cls, start: str | Path, frozen: Arrays) -> "BaseReference":
        """A reference to the frozen parameters that were loaded from the checkpoint `start`, or from the base of its
        adapters. Raises `CheckpointError` if that base has changed since they were trained."""
        source = open_checkpoint(start)
        if isinstance(source, AdapterCheckpoint):
            name = source.base_name
        elif is_hub(start):
            name = f"hf://{parse_model(start, 'init_from').id}@{source.directory.name}"  # the commit
        else:
            name = location(source.directory.resolve())
            if is_bucket(start) and not is_bucket(name):  # in Hugging Face's layout, of which this is a copy
                name = shown(start)
        base = source.base if isinstance(source, AdapterCheckpoint) else source
        reference = cls(name, _dtype(frozen), _checksum(frozen), fingerprint(base))
        if stored := read_json_item(source.directory, "adapter", required=False):
            reference._check(stored.get("dtype"), stored.get("checksum"), source.directory)
        return reference

    def load(self, run: Path, abstract_model: AbstractModel, mesh: Mesh) -> Arrays:
        """The frozen parameters. Raises `CheckpointError` if they cannot be read or have changed."""
        source = open_base_of(run, self.directory, open_checkpoint)
        frozen = load_arrays(source, abstract_model, mesh, paths=abstract_model.frozen_paths)
        self._check(_dtype(frozen), _checksum(frozen), run)
        return frozen

    def _check(self, dtype: Any, checksum: Any, adapters: Path) -> None:
        fix = f"has changed since the adapters in {adapters} were trained; restore it"
        check(dtype != self.dtype or checksum == self.checksum, "base", self.directory, fix)


def _dtype(frozen: Arrays) -> str:
    """The dtype of the embedding, and if matrices are quantized a checksum of all dtypes."""
    name, dtypes = frozen["embed"].dtype.name, {path: x.dtype.name for path, x in frozen.items()}
    quantized = any(dtype.removeprefix("u").startswith("int") for dtype in dtypes.values())
    return f"{name} {zlib.crc32(json.dumps(dtypes, sort_keys=True).encode()):08x}" if quantized else name


def _checksum(arrays: Arrays) -> int:
    return zlib.crc32(json.dumps(array_checksums(arrays), sort_keys=True).encode())
