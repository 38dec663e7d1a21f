"""Read a Hugging Face directory: check tensors against config.json, dequantize FP8 blocks, and map to parameters."""

import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mla_moe.checkpoint import fp8 as fp8_blocks
from mla_moe.checkpoint.files import check, read_json
from mla_moe.checkpoint.hf_mapping import (
    ALL,
    Index,
    TensorMapping,
    by_tensor,
    is_router_bias,
    rows_per_read,
    tensor_mappings,
)
from mla_moe.checkpoint.remote import RemoteCheckpoint
from mla_moe.checkpoint.safetensors_reader import BFLOAT16, WEIGHT_DTYPES, SafetensorsReader
from mla_moe.checkpoint.safetensors_writer import TensorEntry, tensor_entries
from mla_moe.config import ModelConfig
from mla_moe.config.errors import visible
from mla_moe.nn.abstract_model import AbstractModel

logger = logging.getLogger(__name__)

_ROTARY = re.compile(r"\.rotary_emb\.inv_freq$")


class HFTensors(SafetensorsReader):
    """The tensors of a Hugging Face directory by name, FP8 blocks dequantized. Data are read when requested."""

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, Any],
        cfg: ModelConfig,
        remote: RemoteCheckpoint | None = None,
    ):
        super().__init__(directory, remote)
        self.block = fp8_blocks.block_shape(config)
        self.quantized = {name for name, tensor in self.stored.items() if tensor.dtype == fp8_blocks.E4M3}
        architecture = cfg.architecture
        self.unused = {name for name in self.stored if architecture.is_unused(cfg, name)}
        """What the architecture does not use."""
        rotary = {name for name, t in self.stored.items() if _ROTARY.search(name) and len(t.shape) == 1}
        self.ignored = self.unused | rotary
        """That, and rotary frequencies, which Moonlight's and Kimi's files repeat for each layer and all readers
        compute."""
        self.names = self.stored.keys() - self.ignored - {fp8_blocks.scale_name(name) for name in self.quantized}

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor: as stored, or bfloat16 for FP8 blocks."""
        return BFLOAT16 if name in self.quantized else self.stored[name].dtype

    def read(self, name: str, dtype: DTypeLike, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        """A submatrix, or a slice of a vector: a memory-mapped view if `dtype` is the stored one."""
        tensor = self._rows(name)
        part = tensor[rows, columns] if tensor.ndim == 2 else tensor[rows]
        if name not in self.quantized:
            return part.astype(dtype, copy=False)
        scale_name = fp8_blocks.scale_name(name)
        scale = self[scale_name]
        finite = bool(np.isfinite(scale.astype(np.float32)).all())
        check(finite, "checkpoint", scale_name, "is not finite; fetch the file again")
        return fp8_blocks.dequantize(part, scale, dtype, self.block, (rows.start or 0, columns.start or 0))

    def chunks(self, name: str, dtype: DTypeLike | None = None) -> Iterator[np.ndarray]:
        """All rows, in `dtype` or as stored, some at a time: complete FP8 blocks, see `rows_per_read`."""
        tensor = self._rows(name)
        count = rows_per_read(int(np.prod(tensor.shape[1:])), self.block[0])
        for start in range(0, len(tensor), count):
            rows = slice(start, min(start + count, len(tensor)))
            yield tensor[rows] if dtype is None else self.read(name, dtype, rows)

    def _rows(self, name: str) -> np.ndarray:
        """A tensor as a matrix or vector; the first axes of one with more are rows, and a number is a vector."""
        tensor = self[name]
        return tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 2 else np.atleast_1d(tensor)

    def same_bytes(self, a: str, b: str) -> bool:
        """Whether two tensors of one shape are stored as the same bytes."""
        chunks = zip(self.chunks(a), self.chunks(b), strict=True)
        equal = (np.array_equal(x.view(np.uint8), y.view(np.uint8)) for x, y in chunks)
        return self.stored[a].dtype == self.stored[b].dtype and all(equal)

    def validate(self, expected: Sequence[TensorMapping]) -> None:
        """Raise one `CheckpointError` that lists missing and unknown tensors, wrong shapes, dtypes and scales."""
        known = {mapping.name for mapping in expected}
        wrong = [f"{name} is missing" for name in sorted(known - self.names)]
        wrong += [f"{name} is unknown" for name in sorted(self.names - known)]
        for mapping, *_ in by_tensor(expected):
            if mapping.name in self.names:
                wrong += self._problems(mapping.name, mapping.stacked_shape or mapping.shape)
        more = f" and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        fix = f"does not fit its config.json: {'; '.join(wrong[:20])}{more}"
        check(not wrong, "checkpoint", str(self.directory), fix)

    def _problems(self, name: str, shape: tuple[int, ...]) -> Iterator[str]:
        stored, scale_name = self.stored, fp8_blocks.scale_name(name)
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
    """Parameters and router biases of a Hugging Face directory, by parameter path. Opening it reads only metadata."""

    full_state_run: Path | None = None

    def __init__(self, directory: Path, remote: RemoteCheckpoint | None = None):
        self.directory, self._config = directory, read_json(directory / "config.json")
        cfg = ModelConfig.from_hf(self._config)
        self.tensors = HFTensors(directory, self._config, cfg, remote)
        self.cfg = _check_model(cfg, self.tensors)
        if unused := self.tensors.unused:
            note = "%s: %d tensors are no part of the model and not used, %s among them"
            logger.warning(note, directory, len(unused), visible(min(unused)))
        self._shapes = {path: v.get_value().shape for path, v in AbstractModel(self.cfg).variables.items()}
        self._mappings: Mapping[str, list[TensorMapping]] = {path: [] for path in self._shapes}
        for mapping in tensor_mappings(self.cfg, copies=False):
            self._mappings[mapping.path].append(mapping)

    def dtype(self, path: str) -> np.dtype:
        """The dtype of an array as stored; bfloat16 for FP8 blocks."""
        return np.dtype(jnp.result_type(*{self.tensors.dtype(mapping.name) for mapping in self._mappings[path]}))

    def read(self, path: str, dtype: DTypeLike, index: tuple[slice, ...]) -> np.ndarray:
        """A shard of an array: `index` has a slice for each axis."""
        ranges = [range(*i.indices(n)) for i, n in zip(index, self._shapes[path], strict=True)]
        shard = np.empty([len(r) for r in ranges], dtype)
        for mapping in self._mappings[path]:
            if any(isinstance(i, int) and i not in r for i, r in zip(mapping.index, ranges, strict=True)):
                continue
            target = tuple(i - r.start if isinstance(i, int) else i for i, r in zip(mapping.index, ranges, strict=True))
            kept = tuple(s for i, s in zip(mapping.index, index, strict=True) if not isinstance(i, int))
            shard[target] = mapping.from_hf_tensor(self.tensors.read(mapping.name, dtype, *mapping.hf_slices(kept)))
        return shard

    def read_rows(self, mapping: TensorMapping, dtype: DTypeLike, rows: slice, _: Index) -> np.ndarray:
        """Some rows of a tensor in the Hugging Face layout; see `TensorMapping.row_slices`."""
        return self.tensors.read(mapping.name, dtype, rows)

    def hf_tensors(self, dtype: np.dtype | None, *, fp8: bool) -> list[TensorEntry]:
        """All tensors, cast to `dtype` except for router biases, in the names and the order of this directory. Raises
        `CheckpointError` for FP8 blocks of another shape."""
        tensors, block = self.tensors, self.tensors.block
        fix = f"{list(block)} cannot be mixed with {list(fp8_blocks.BLOCK)}; write bfloat16 first"
        check(not (fp8 and tensors.quantized and block != fp8_blocks.BLOCK), "checkpoint", "FP8 blocks", fix)
        entries: list[TensorEntry] = []
        for name, location in tensors.stored.items():
            stored, read = tensors.dtype(name), partial(tensors.chunks, name)
            if name in tensors.names and not is_router_bias(name) and not (fp8 and name in tensors.quantized):
                entries += tensor_entries(name, stored, dtype or stored, location.shape, read, fp8=fp8)
            elif fp8 or name in tensors.names or name in tensors.ignored:  # all but scales that are no longer needed
                entries.append(TensorEntry(name, location.dtype, location.shape, read))
        return entries

    def hf_config(self, dtype: np.dtype | None, *, fp8: bool) -> dict[str, Any]:
        """The `config.json` that goes with `hf_tensors`."""
        config, tensors = fp8_blocks.without_quantization(self._config), self.tensors
        given = fp8_blocks.quantization_config(self._config)
        if fp8:  # the given entry may exclude matrices that are newly quantized, or describe other scales
            added = any(fp8_blocks.is_quantized(name) for name in tensors.names - tensors.quantized)
            config["quantization_config"] = dict(fp8_blocks.QUANTIZATION_CONFIG) if added or not given else given
        if dtype is not None:
            config = {k: v for k, v in config.items() if k != "dtype"} | {"torch_dtype": dtype.name}
        return config


def _check_model(cfg: ModelConfig, tensors: HFTensors) -> ModelConfig:
    """The model that the tensors are, which differs from the config.json's in its MTP module only.

    transformers saves V3 without the MTP module that config.json names: it is dropped, with a warning. An MTP module
    whose embedding or head differ from the model's in any byte has its own.
    """
    mtp_prefix = cfg.architecture.tensor_name(f"model.layers.{cfg.num_hidden_layers}.")
    if cfg.num_nextn_predict_layers and not any(name.startswith(mtp_prefix) for name in tensors.names):
        logger.warning("%s has no MTP module, though its config.json names one; loading without it", tensors.directory)
        cfg = dataclasses.replace(cfg, num_nextn_predict_layers=0)
    no_bias = cfg.topk_method == "noaux_tc" and not any(map(is_router_bias, tensors.names))
    if no_bias and cfg.architecture.bias_may_be_missing:
        cfg = dataclasses.replace(cfg, topk_method="group_limited_top2")
    experts = 1 if cfg.architecture.stacked_experts else cfg.n_routed_experts
    fewest, stored = cfg.num_hidden_layers + 3 * cfg.num_moe_layers * experts, len(tensors.names)
    fix = f"names {fewest} tensors or more, and the files have {stored}; fetch them again"
    check(fewest <= 2 * stored + 100, "checkpoint", str(tensors.directory / "config.json"), fix)  # before it lists them
    mappings = list(tensor_mappings(cfg))
    head = cfg.architecture.tensor_name("lm_head.weight")
    if cfg.tie_word_embeddings and head in tensors.names:  # some writers repeat the embedding as the head
        mappings.append(mappings[0]._replace(name=head))
        tensors.validate(mappings)
        fix = f"differs from {mappings[0].name}, though config.json ties them; set tie_word_embeddings to false there"
        check(tensors.same_bytes(mappings[0].name, head), "checkpoint", head, fix)
    else:
        tensors.validate(mappings)
    if cfg.num_nextn_predict_layers and cfg.mtp_shares_embedding:
        copies = [mapping for mapping in mappings if mapping.path in ("embed", "head")]
        pairs = [(a.name, b.name) for a in copies for b in copies if a.path == b.path and a is not b]
        cfg = dataclasses.replace(cfg, mtp_shares_embedding=all(tensors.same_bytes(a, b) for a, b in pairs))
    return cfg
