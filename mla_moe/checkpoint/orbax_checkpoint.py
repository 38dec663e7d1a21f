"""Read parameters and router biases of an Orbax checkpoint array by array, and verify them by checksums."""

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from mla_moe.checkpoint.files import CheckpointError, check
from mla_moe.checkpoint.hf_mapping import Index, TensorMapping, by_tensor, is_router_bias, tensor_mappings
from mla_moe.checkpoint.orbax_layout import StateArrays, read_json_item, require_known_format, run_directory
from mla_moe.checkpoint.quantization import Scheme
from mla_moe.checkpoint.safetensors_writer import TensorEntry, tensor_entries, with_quantization
from mla_moe.checkpoint.tokenizer_files import hf_config
from mla_moe.checkpoint.unused_tensors import unused_tensors
from mla_moe.config import LoRAConfig, ModelConfig, structure
from mla_moe.nn.abstract_model import AbstractModel, Arrays
from mla_moe.ops.checksum import checksum, checksum_of_shard


def array_checksums(tree: Any) -> dict[str, int]:
    """The checksum of each array by its keys, joined with ".". It does not depend on mesh and process."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {jax.tree_util.keystr(keys, simple=True, separator="."): x for keys, x in leaves}
    if not arrays:
        return {}
    mesh = next(iter(arrays.values())).sharding.mesh
    return dict(zip(arrays, np.asarray(_checksum_program(mesh)(list(arrays.values()))).tolist(), strict=True))


@cache
def _checksum_program(mesh: Mesh) -> Callable[[list[jax.Array]], jax.Array]:
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda arrays: jnp.stack([checksum(x) for x in arrays]), out_shardings=replicated)


def config_checksum(config: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(config, sort_keys=True).encode())


def base_directory(step: Path, adapter: Mapping[str, Any]) -> str:
    """Where the base of adapters is: at its relative path from the step's directory, if both were moved together."""
    base, relative = str(adapter.get("directory", "")), adapter.get("relative_directory")
    moved = None if relative is None or Path(base).exists() else (step / str(relative)).resolve()
    return str(moved) if moved is not None and moved.exists() else base


class OrbaxCheckpoint:
    """Parameters and router biases in a step's directory, by parameter path. Opening it reads only metadata."""

    def __init__(self, step: Path):
        self.directory = step
        require_known_format(step)
        config = read_json_item(step, "model")
        self._checksums = read_json_item(step, "digests", required=False)  # a converted checkpoint has none
        intact = not self._checksums or self._checksums.get("model") == config_checksum(config)
        check(intact, "checkpoint", str(step), "is damaged: its model does not match its checksum")
        self.cfg: ModelConfig = structure(ModelConfig, config, "model")
        adapter = read_json_item(step, "adapter", required=False)
        self.lora = structure(LoRAConfig, adapter.get("lora", {}), "lora")
        """The adapters that this is a checkpoint of (`checkpoint.adapter`); of rank 0 for a complete model."""
        self.base = base_directory(step, adapter)
        """The checkpoint that they are adapters of."""
        self.base_fingerprint: int | None = adapter.get("fingerprint")
        self._arrays = StateArrays(step)
        self._keys = {key[1]: key for key in self._arrays.keys if len(key) == 2 and key[0] in ("params", "biases")}
        self._unverified: dict[str, tuple[int, int]] = {}
        """For arrays that are read by rows: elements not read yet, and the checksum of those that were."""
        self._shard_checksums: dict[str, dict[str, int]] = {}
        """For arrays that were cast: the checksum of each shard by its index."""
        model = AbstractModel(self.cfg, lora=self.lora)
        variables = {path: v for path, v in model.variables.items() if path not in model.frozen_paths}
        wrong = [f"{path} is missing" for path in sorted(variables.keys() - self._keys)]
        wrong += [f"{path} is unknown" for path in sorted(self._keys.keys() - variables)]
        for path in variables.keys() & self._keys:
            shape, expected = self._store(path).shape, variables[path].get_value().shape
            wrong += [f"{path} has shape {list(shape)}, not {list(expected)}"] if shape != expected else []
        check(not wrong, "checkpoint", str(step), f"does not fit its model: {'; '.join(wrong[:20])}")

    @property
    def paths(self) -> Sequence[str]:
        return tuple(self._keys)

    def _store(self, path: str) -> ts.TensorStore:
        return self._arrays[self._keys[path]]

    @property
    def full_state_run(self) -> Path | None:
        """The directory of the run whose full training state this is; None if there are parameters only."""
        return run_directory(self.directory) if any(key[0] == "optimizer" for key in self._arrays.keys) else None

    def dtype(self, path: str) -> np.dtype:
        """The dtype of an array as stored."""
        return self._store(path).dtype.numpy_dtype

    def array(self, path: str) -> np.ndarray:
        """An array as stored. Raises `CheckpointError` if it does not match its checksum."""
        shape = self._store(path).shape
        index = tuple(slice(0, n) for n in shape)
        array = self._read(path, index)
        if self._checksums:
            self._compare(path, checksum_of_shard(array, index, shape))
        return array

    def read(self, path: str, dtype: DTypeLike, index: tuple[slice, ...]) -> np.ndarray:
        """A shard of an array: `index` has a slice for each axis. Raises `CheckpointError` for a truncated or corrupted
        file. Checksums are of the stored dtype: that of a shard that is cast is computed here and kept for `verify`."""
        shard = self._read(path, index)
        if self._checksums and shard.dtype != dtype:
            shape = self._store(path).shape
            self._shard_checksums.setdefault(path, {})[str(index)] = checksum_of_shard(shard, index, shape)
        return shard.astype(dtype, copy=False)

    def stored_matrix(self, path: str, matrix_index: tuple[int, ...]) -> None:
        """No matrix is stored quantized; see `HFCheckpoint.stored_matrix`."""

    def read_rows(self, mapping: TensorMapping, dtype: DTypeLike, _: slice, index: Index) -> np.ndarray:
        """Some rows of a tensor in the Hugging Face layout; see `TensorMapping.row_slices`. The last rows of an array
        complete its checksum, which is then compared."""
        part, path = self._read(mapping.path, index), mapping.path
        if self._checksums:
            store = self._store(path)
            left, number = self._unverified.pop(path, (store.size, 0))
            left, number = left - part.size, (number + checksum_of_shard(part, index, store.shape)) % 2**32
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

        def sum_of_shards(path: str) -> int:
            """Checksum of this process's shards without replicas: over all processes, each shard once."""
            shards = (shard for shard in arrays[path].addressable_shards if shard.replica_id == 0)
            return sum(self._shard_checksums[path][str(shard.index)] for shard in shards) % 2**32

        found = array_checksums({path: x for path, x in arrays.items() if x.dtype == self.dtype(path)})
        cast = [path for path in arrays if path not in found]
        local = np.array([sum_of_shards(path) for path in cast], np.uint32)
        gathered = np.reshape(multihost_utils.process_allgather(local), (jax.process_count(), len(cast)))
        found |= dict(zip(cast, gathered.sum(0, np.uint32).tolist(), strict=True))
        for path, number in found.items():
            self._compare(path, number)

    def _compare(self, path: str, number: int) -> None:
        expected = self._checksums["arrays"].get(".".join(self._keys[path]))
        fix = f"is damaged: {path} does not match its checksum"
        check(number == expected, "checkpoint", str(self.directory), fix)

    def unused_tensors(self) -> list[TensorEntry]:
        """The tensors beside it that are no part of the model."""
        return unused_tensors(self.directory, self.cfg)

    def hf_checkpoint(
        self, dtype: np.dtype | None, quantize: Scheme | None = None
    ) -> tuple[list[TensorEntry], dict[str, Any]]:
        """All tensors of a Hugging Face checkpoint, cast to `dtype` except for router biases, and its config.json."""
        return mapped_checkpoint(self, self.directory, dtype, quantize)


class RowReader(Protocol):
    """What `mapped_checkpoint` needs of a checkpoint."""

    cfg: ModelConfig

    def dtype(self, path: str) -> np.dtype: ...

    def read_rows(self, mapping: TensorMapping, dtype: DTypeLike, rows: slice, index: Index, /) -> np.ndarray: ...


def mapped_checkpoint(
    checkpoint: RowReader, directory: Path, dtype: np.dtype | None, quantize: Scheme | None
) -> tuple[list[TensorEntry], dict[str, Any]]:
    """All tensors of a checkpoint's model for a Hugging Face directory, cast to `dtype` except for router biases, and
    those that `directory` has beside them; and the `config.json` that goes with them."""

    def rows(parts: list[TensorMapping], dtype: DTypeLike) -> Iterator[np.ndarray]:
        return (checkpoint.read_rows(part, dtype, *rows) for part in parts for rows in part.row_slices())

    entries: list[TensorEntry] = []
    for parts in by_tensor(tensor_mappings(checkpoint.cfg)):
        name, stored = parts[0].name, checkpoint.dtype(parts[0].path)
        target = stored if dtype is None or is_router_bias(name) else dtype
        shape = parts[0].stacked_shape or parts[0].shape
        entries += tensor_entries(name, stored, target, shape, partial(rows, parts), quantize)
    entries += unused_tensors(directory, checkpoint.cfg)
    config = hf_config(checkpoint.cfg, dtype or checkpoint.dtype("embed"), beside=directory)
    return entries, with_quantization(config, quantize, entries, checkpoint.cfg)
