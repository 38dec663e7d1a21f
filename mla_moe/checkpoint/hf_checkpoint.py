"""Read a Hugging Face directory: check tensors against config.json, dequantize FP8 blocks, and map to parameters."""

import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mla_moe.checkpoint import fp8 as fp8_blocks
from mla_moe.checkpoint.files import CheckpointError, read_json
from mla_moe.checkpoint.hf_mapping import (
    ALL,
    RowSlice,
    Slices,
    TensorMapping,
    is_router_bias,
    rows_per_read,
    tensor_mappings,
    unique_tensor_mappings,
)
from mla_moe.checkpoint.safetensors_reader import BFLOAT16, WEIGHT_DTYPES, SafetensorsReader
from mla_moe.checkpoint.safetensors_writer import TensorEntry, tensor_entries
from mla_moe.config import ModelConfig
from mla_moe.nn.abstract_model import AbstractModel, Arrays

logger = logging.getLogger(__name__)

_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")


class HFTensors:
    """The tensors of a Hugging Face directory by name, FP8 blocks dequantized. Data are read when requested."""

    def __init__(self, directory: Path, config: Mapping[str, Any]):
        self.reader = SafetensorsReader(directory)
        self.block = fp8_blocks.block_shape(config)
        stored = self.reader.stored
        self.quantized = {name for name, tensor in stored.items() if tensor.dtype == fp8_blocks.E4M3}
        self.ignored = {name for name, t in stored.items() if _IGNORED.search(name) and len(t.shape) == 1}
        """Rotary frequencies, which Moonlight's and Kimi's files repeat for each layer and all readers compute."""
        self.names = stored.keys() - self.ignored - {fp8_blocks.scale_name(name) for name in self.quantized}

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor: as stored, or bfloat16 for FP8 blocks."""
        return BFLOAT16 if name in self.quantized else self.reader.stored[name].dtype

    def read(self, name: str, dtype: DTypeLike, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        """A submatrix, or a slice of a vector: a memory-mapped view if `dtype` is the stored one."""
        tensor = self.reader[name]
        part = tensor[rows, columns] if tensor.ndim == 2 else tensor[rows]
        if name not in self.quantized:
            return part.astype(dtype, copy=False)
        scale = self.reader[fp8_blocks.scale_name(name)]
        if not np.isfinite(scale.astype(np.float32)).all():
            raise CheckpointError("checkpoint", fp8_blocks.scale_name(name), "is not finite; fetch the file again")
        return fp8_blocks.dequantize(part, scale, dtype, self.block, (rows.start or 0, columns.start or 0))

    def row_slices(self, name: str) -> Iterator[slice]:
        """Slices of rows to read one at a time: complete FP8 blocks, see `rows_per_read`."""
        shape = self.reader.stored[name].shape
        rows = rows_per_read(int(np.prod(shape[1:])), self.block[0])
        return (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))

    def same_bytes(self, a: str, b: str) -> bool:
        """Whether two tensors are stored as the same bytes."""
        first, second = self.reader.stored[a], self.reader.stored[b]
        return (first.dtype, first.shape) == (second.dtype, second.shape) and all(
            np.array_equal(self.reader[a][rows].view(np.uint8), self.reader[b][rows].view(np.uint8))
            for rows in self.row_slices(a)
        )

    def check(self, expected: Sequence[TensorMapping]) -> None:
        """Raise one `CheckpointError` that lists missing and unknown tensors, wrong shapes, dtypes and scales."""
        known = {mapping.name for mapping in expected}
        wrong = [f"{name} is missing" for name in sorted(known - self.names)]
        wrong += [f"{name} is unknown" for name in sorted(self.names - known)]
        for mapping in expected:
            if mapping.name in self.names:
                wrong += self._problems(mapping.name, mapping.shape)
        if wrong:
            more = f" and {len(wrong) - 20} more" if len(wrong) > 20 else ""
            fix = f"does not fit its config.json: {'; '.join(wrong[:20])}{more}"
            raise CheckpointError("checkpoint", str(self.reader.directory), fix)

    def _problems(self, name: str, shape: tuple[int, ...]) -> Iterator[str]:
        stored, scale_name = self.reader.stored, fp8_blocks.scale_name(name)
        if stored[name].shape != shape:
            yield f"{name} has shape {list(stored[name].shape)}, not {list(shape)}"
        elif name not in self.quantized:
            if stored[name].dtype not in WEIGHT_DTYPES:
                yield f"{name} has type {stored[name].dtype}, not {', '.join(map(str, WEIGHT_DTYPES))} or FP8 blocks"
        elif len(shape) != 2:
            yield f"{name} is in FP8, which only matrices can be"
        elif (scale := stored.get(scale_name)) is None:
            yield f"{scale_name} is missing"
        elif scale.shape != (blocks := fp8_blocks.scale_shape(shape, self.block)):
            yield f"{scale_name} has shape {list(scale.shape)}, not {list(blocks)}"
        elif scale.dtype.kind == "i" or scale.dtype == fp8_blocks.E4M3:
            yield f"{scale_name} has type {scale.dtype}, not float32 or float8_e8m0fnu"


class HFCheckpoint:
    """A `reader.Checkpoint` from a Hugging Face directory."""

    full_state_run: Path | None = None

    def __init__(self, directory: Path):
        self.directory, self._config = directory, read_json(directory / "config.json")
        cfg = ModelConfig.from_hf(self._config)
        self.tensors = HFTensors(directory, self._config)
        self.cfg = _check_model(cfg, self.tensors, directory)
        abstract_model = AbstractModel(self.cfg)
        self._shapes = {path: variable.get_value().shape for path, variable in abstract_model.variables.items()}
        self._mappings: Mapping[str, list[TensorMapping]] = {path: [] for path in self._shapes}
        for mapping in unique_tensor_mappings(abstract_model):
            self._mappings[mapping.path].append(mapping)

    def dtype(self, path: str) -> np.dtype:
        return np.dtype(jnp.result_type(*{self.tensors.dtype(mapping.name) for mapping in self._mappings[path]}))

    def nbytes(self, path: str) -> int:
        return sum(self.tensors.reader.stored[mapping.name].nbytes for mapping in self._mappings[path])

    def read(self, path: str, dtype: DTypeLike, index: Slices) -> np.ndarray:
        ranges = [range(*i.indices(n)) for i, n in zip(index, self._shapes[path], strict=True)]
        shard = np.empty([len(r) for r in ranges], dtype)
        for mapping in self._mappings[path]:
            if any(isinstance(i, int) and i not in r for i, r in zip(mapping.index, ranges, strict=True)):
                continue
            target = tuple(i - r.start if isinstance(i, int) else i for i, r in zip(mapping.index, ranges, strict=True))
            kept = tuple(s for i, s in zip(mapping.index, index, strict=True) if not isinstance(i, int))
            shard[target] = mapping.from_hf_tensor(self.tensors.read(mapping.name, dtype, *mapping.hf_slices(kept)))
        return shard

    def read_rows(self, mapping: TensorMapping, dtype: DTypeLike, rows: RowSlice) -> np.ndarray:
        return self.tensors.read(mapping.name, dtype, rows.rows)

    def verify(self, arrays: Arrays) -> None:
        pass

    def hf_tensors(self, dtype: np.dtype | None, *, fp8: bool) -> list[TensorEntry]:
        """In the names and the order of this directory. Raises `CheckpointError` for FP8 blocks of another shape."""
        if fp8 and self.tensors.quantized and self.tensors.block != fp8_blocks.BLOCK:
            fix = f"{list(self.tensors.block)} cannot be mixed with {list(fp8_blocks.BLOCK)}; write bfloat16 first"
            raise CheckpointError("checkpoint", "FP8 blocks", fix)
        return [entry for name in self.tensors.reader.stored for entry in self._hf_tensor(name, dtype, fp8)]

    def _hf_tensor(self, name: str, dtype: np.dtype | None, fp8: bool) -> list[TensorEntry]:
        tensors, stored = self.tensors, self.tensors.reader.stored[name]
        unchanged = TensorEntry(
            name, stored.dtype, stored.shape, lambda: (tensors.reader[name][rows] for rows in tensors.row_slices(name))
        )
        if name not in tensors.names:  # a scale, or rotary frequencies
            return [unchanged] if fp8 or name in tensors.ignored else []
        if is_router_bias(name) or (fp8 and name in tensors.quantized):
            return [unchanged]
        target = tensors.dtype(name) if dtype is None else dtype
        # Quantize the stored values, not values that were rounded to `dtype` before.
        read_as = tensors.dtype(name) if fp8 and fp8_blocks.is_quantized(name) else target

        def chunks() -> Iterator[np.ndarray]:
            return (tensors.read(name, read_as, rows) for rows in tensors.row_slices(name))

        return tensor_entries(name, target, stored.shape, chunks, fp8=fp8)

    def hf_config(self, dtype: np.dtype | None, *, fp8: bool) -> dict[str, Any]:
        config, tensors = dict(self._config), self.tensors
        given = config.pop("quantization_config", None)
        if fp8:  # the given entry may exclude matrices that are newly quantized, or describe other scales
            added = any(fp8_blocks.is_quantized(name) for name in tensors.names - tensors.quantized)
            config["quantization_config"] = dict(fp8_blocks.QUANTIZATION_CONFIG) if added or not given else given
        if dtype is not None:
            config = {k: v for k, v in config.items() if k != "dtype"} | {"torch_dtype": dtype.name}
        return config


def _check_model(cfg: ModelConfig, tensors: HFTensors, directory: Path) -> ModelConfig:
    """The model that the tensors are, which differs from the config.json's in its MTP module only.

    transformers saves V3 without the MTP module that config.json names: it is dropped, with a warning. An MTP module
    whose embedding or head differ from the model's in any byte has its own.
    """
    mtp_prefix = f"model.layers.{cfg.num_hidden_layers}."
    if cfg.num_nextn_predict_layers and not any(name.startswith(mtp_prefix) for name in tensors.names):
        logger.warning("%s has no MTP module, though its config.json names one; loading without it", directory)
        cfg = dataclasses.replace(cfg, num_nextn_predict_layers=0)
    mappings = list(tensor_mappings(AbstractModel(cfg)))
    tensors.check(mappings)
    if cfg.num_nextn_predict_layers and cfg.mtp_shares_embedding:
        copies = [mapping for mapping in mappings if mapping.path in ("embed", "head")]
        pairs = [(a.name, b.name) for a in copies for b in copies if a.path == b.path and a is not b]
        cfg = dataclasses.replace(cfg, mtp_shares_embedding=all(tensors.same_bytes(a, b) for a, b in pairs))
    return cfg
