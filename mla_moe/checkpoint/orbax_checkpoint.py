"""Read parameters and router biases of an Orbax checkpoint array by array, and verify them by checksums."""

import functools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from mla_moe.checkpoint import fp8 as fp8_blocks
from mla_moe.checkpoint.files import CheckpointError
from mla_moe.checkpoint.hf_mapping import Index, RowSlice, Slices, TensorMapping, is_router_bias, tensor_mappings
from mla_moe.checkpoint.orbax_layout import StateArrays, read_json_item, require_known_format, run_directory
from mla_moe.checkpoint.safetensors_writer import TensorEntry, tensor_entries
from mla_moe.checkpoint.tokenizer_files import hf_config
from mla_moe.config import ModelConfig, structure
from mla_moe.nn.abstract_model import AbstractModel, Arrays
from mla_moe.ops.checksum import checksum, checksum_of_shard


def array_checksums(tree: Any) -> dict[str, int]:
    """The checksum of each array by its keys, joined with ".". It does not depend on mesh and process."""
    arrays = {
        jax.tree_util.keystr(k, simple=True, separator="."): x for k, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    if not arrays:
        return {}
    mesh = next(iter(arrays.values())).sharding.mesh
    return dict(zip(arrays, np.asarray(_checksum_program(mesh)(list(arrays.values()))).tolist(), strict=True))


@functools.cache
def _checksum_program(mesh: Mesh) -> Callable[[list[jax.Array]], jax.Array]:
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda arrays: jnp.stack([checksum(x) for x in arrays]), out_shardings=replicated)


def config_checksum(config: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(config, sort_keys=True).encode())


class OrbaxCheckpoint:
    """A `reader.Checkpoint` from a step's directory."""

    def __init__(self, step: Path):
        self.directory = step
        require_known_format(step)
        config = read_json_item(step, "model")
        self._checksums = read_json_item(step, "digests", required=False)  # a converted checkpoint has none
        if self._checksums and self._checksums.get("model") != config_checksum(config):
            raise CheckpointError("checkpoint", str(step), "is damaged: its model does not match its checksum")
        self.cfg: ModelConfig = structure(ModelConfig, config, "model")
        self._arrays = StateArrays(step)
        self._keys = {key[1]: key for key in self._arrays.keys if len(key) == 2 and key[0] in ("params", "biases")}
        self._unverified: dict[str, tuple[int, int]] = {}
        """For arrays that are read by rows: elements not read yet, and the checksum of those that were."""
        self._shard_checksums: dict[str, dict[str, int]] = {}
        """For arrays that were cast: the checksum of each shard by its index."""
        variables = AbstractModel(self.cfg).variables
        wrong = [f"{path} is missing" for path in sorted(variables.keys() - self._keys)]
        wrong += [f"{path} is unknown" for path in sorted(self._keys.keys() - variables)]
        for path in variables.keys() & self._keys:
            shape, expected = self._store(path).shape, variables[path].get_value().shape
            wrong += [f"{path} has shape {list(shape)}, not {list(expected)}"] if shape != expected else []
        if wrong:
            raise CheckpointError("checkpoint", str(self.directory), f"does not fit its model: {'; '.join(wrong[:20])}")

    def _store(self, path: str) -> ts.TensorStore:
        return self._arrays[self._keys[path]]

    @property
    def full_state_run(self) -> Path | None:
        return run_directory(self.directory) if any(key[0] == "optimizer" for key in self._arrays.keys) else None

    def dtype(self, path: str) -> np.dtype:
        return self._store(path).dtype.numpy_dtype

    def nbytes(self, path: str) -> int:
        return self._store(path).size * self.dtype(path).itemsize

    def read(self, path: str, dtype: DTypeLike, index: Slices) -> np.ndarray:
        """A shard of an array. Raises `CheckpointError` for a truncated or corrupted file.

        The checksum is of the stored dtype, so that of a shard that is cast is computed here and kept for `verify`.
        """
        shard = self._read(path, index)
        if self._checksums and shard.dtype != dtype:
            shape = self._store(path).shape
            self._shard_checksums.setdefault(path, {})[str(index)] = checksum_of_shard(shard, index, shape)
        return shard.astype(dtype, copy=False)

    def read_rows(self, mapping: TensorMapping, dtype: DTypeLike, rows: RowSlice) -> np.ndarray:
        """Some rows of a tensor. The last rows of an array complete its checksum, which is then compared."""
        part, path = self._read(mapping.path, rows.index), mapping.path
        if self._checksums:
            store = self._store(path)
            left, number = self._unverified.pop(path, (store.size, 0))
            left, number = left - part.size, (number + checksum_of_shard(part, rows.index, store.shape)) % 2**32
            if left:
                self._unverified[path] = left, number
            else:
                self._compare(path, number)
        return mapping.to_hf_tensor(part.astype(dtype, copy=False))

    def _read(self, path: str, index: Index) -> np.ndarray:
        try:
            return self._store(path)[index].read().result()
        except ValueError as error:
            raise CheckpointError("checkpoint", path, f"cannot be read: {str(error)[:200]}") from None

    def verify(self, arrays: Arrays) -> None:
        """Raise `CheckpointError` if an array that was read, sharded over a mesh, does not match its checksum."""
        if not self._checksums:
            return
        found = array_checksums({path: x for path, x in arrays.items() if x.dtype == self.dtype(path)})
        cast = [path for path in arrays if path not in found]
        shards = [[self._shard_checksums[path][str(s.index)] for s in _unique_shards(arrays[path])] for path in cast]
        local = np.array([sum(numbers) % 2**32 for numbers in shards], np.uint32)
        gathered = np.reshape(multihost_utils.process_allgather(local), (jax.process_count(), len(cast)))
        found |= dict(zip(cast, gathered.sum(0, np.uint32).tolist(), strict=True))
        for path, number in found.items():
            self._compare(path, number)

    def _compare(self, path: str, number: int) -> None:
        if self._checksums and number != self._checksums["arrays"].get(".".join(self._keys[path])):
            fix = f"is damaged: {path} does not match its checksum"
            raise CheckpointError("checkpoint", str(self.directory), fix)

    def hf_tensors(self, dtype: np.dtype | None, *, fp8: bool) -> list[TensorEntry]:
        mappings = tensor_mappings(AbstractModel(self.cfg))
        return [entry for mapping in mappings for entry in self._hf_tensor(mapping, dtype, fp8)]

    def _hf_tensor(self, mapping: TensorMapping, dtype: np.dtype | None, fp8: bool) -> list[TensorEntry]:
        stored = self.dtype(mapping.path)
        target = stored if dtype is None or is_router_bias(mapping.name) else dtype
        # Quantize the stored values, not values that were rounded to `dtype` before.
        read_as = stored if fp8 and fp8_blocks.is_quantized(mapping.name) else target

        def chunks() -> Iterator[np.ndarray]:
            return (self.read_rows(mapping, read_as, rows) for rows in mapping.row_slices())

        return tensor_entries(mapping.name, target, mapping.shape, chunks, fp8=fp8)

    def hf_config(self, dtype: np.dtype | None, *, fp8: bool) -> dict[str, Any]:
        return hf_config(self.cfg, dtype or self.dtype("embed"), fp8=fp8, beside=self.directory)


def _unique_shards(array: jax.Array) -> list[jax.Shard]:
    """This process's shards without replicas; over all processes, each shard once."""
    return [shard for shard in array.addressable_shards if shard.replica_id == 0]
