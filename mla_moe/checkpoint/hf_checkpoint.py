"""A checkpoint's tensors as numbers: checked against what its config.json asks for, FP8 multiplied by its scales."""

import contextlib
import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from mla_moe.checkpoint import fp8
from mla_moe.checkpoint.hf_mapping import WHOLE, TensorMapping, tensor_mappings
from mla_moe.checkpoint.safetensors_reader import CheckpointError, SafetensorsReader, read_json
from mla_moe.config import ConfigError, ModelConfig
from mla_moe.nn.abstract_model import AbstractModel

logger = logging.getLogger(__name__)

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
PART_BYTES = 16 << 20
_COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")


def weight_dtype(dtype: DTypeLike) -> np.dtype:
    """A type that weights can have. Raises `ConfigError` for any other, and for what names none."""
    with contextlib.suppress(TypeError):
        if (kind := np.dtype(dtype)) in FLOATS:
            return kind
    raise ConfigError("dtype", str(dtype), f"one of {', '.join(map(str, FLOATS))}")


def open_hf_weights(directory: Path) -> tuple[dict[str, Any], ModelConfig, "HFWeights"]:
    """A directory's config.json, the model that it describes, and the tensors, which are exactly the model's.

    A prediction module that is named but not there is left out, aloud: transformers saves V3 so. One whose embedding or
    head are not the model's own byte for byte keeps them.
    """
    config = read_json(directory / "config.json")
    cfg, weights = ModelConfig.from_hf(config), HFWeights(directory, config)
    last = f"model.layers.{cfg.num_hidden_layers}."
    if cfg.num_nextn_predict_layers and not any(name.startswith(last) for name in weights.names):
        logger.warning("%s has no prediction module, though its config.json names one; read without", directory)
        cfg = dataclasses.replace(cfg, num_nextn_predict_layers=0)
    wanted = list(tensor_mappings(AbstractModel(cfg)))
    weights.check(wanted)
    if cfg.num_nextn_predict_layers and cfg.mtp_shares_embedding:
        copies = [piece for piece in wanted if piece.path in ("embed", "head")]
        shared = all(weights.same(a.name, b.name) for a in copies for b in copies if a.path == b.path and a is not b)
        cfg = dataclasses.replace(cfg, mtp_shares_embedding=shared)
    return config, cfg, weights


class HFWeights:
    """Tensors by name. Nothing is read before it is asked for."""

    def __init__(self, directory: Path, config: Mapping[str, Any]):
        self.reader = SafetensorsReader(directory)
        self.block = fp8.block_shape(config)
        stored = self.reader.stored
        self.quantised = {name for name, tensor in stored.items() if tensor.dtype == fp8.E4M3}
        self.computed = {name for name, t in stored.items() if _COMPUTED.search(name) and len(t.shape) == 1}
        """Rotary frequencies that Moonlight's and Kimi's files repeat for each layer; every reader computes its own."""
        self.names = stored.keys() - self.computed - {fp8.scale_name(name) for name in self.quantised}

    def dtype(self, name: str) -> np.dtype:
        """The type that holds the tensor: as stored, or bfloat16 for FP8 blocks."""
        return BFLOAT16 if name in self.quantised else self.reader.stored[name].dtype

    def bytes(self, name: str) -> int:
        """In the file, without scales."""
        tensor = self.reader.stored[name]
        return int(np.prod(tensor.shape)) * tensor.dtype.itemsize

    def read(self, name: str, dtype: DTypeLike, rows: slice = WHOLE, columns: slice = WHOLE) -> np.ndarray:
        """A rectangle of a matrix, or a stretch of a vector. A view into the file where the type is the stored one."""
        tensor = self.reader[name]
        part = tensor[rows, columns] if tensor.ndim == 2 else tensor[rows]
        if name not in self.quantised:
            return part.astype(dtype, copy=False)
        scale = self.reader[fp8.scale_name(name)]
        if not np.isfinite(scale.astype(np.float32)).all():
            raise CheckpointError("checkpoint", fp8.scale_name(name), "is not finite; fetch the file again")
        return fp8.dequantise(part, scale, dtype, self.block, (rows.start or 0, columns.start or 0))

    def parts(self, name: str) -> Iterator[slice]:
        """Rows to be read at a time so that memory stays small: whole blocks, of about 16 MB."""
        shape = self.reader.stored[name].shape
        rows = max(PART_BYTES // (4 * int(np.prod(shape[1:]))) // self.block[0], 1) * self.block[0]
        return (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))

    def same(self, a: str, b: str) -> bool:
        """Whether two tensors are stored as the same bytes."""
        ours, theirs = self.reader.stored[a], self.reader.stored[b]
        return (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) and all(
            np.array_equal(self.reader[a][rows].view(np.uint8), self.reader[b][rows].view(np.uint8))
            for rows in self.parts(a)
        )

    def check(self, wanted: Sequence[TensorMapping]) -> None:
        """All tensors are there with their shapes and scales, and no others: one error lists what is not so."""
        known = {piece.name for piece in wanted}
        wrong = [f"{name} is missing" for name in sorted(known - self.names)]
        wrong += [f"{name} is unknown" for name in sorted(self.names - known)]
        for piece in wanted:
            if piece.name in self.names:
                wrong += self._misfits(piece.name, piece.shape)
        if wrong:
            more = f" and {len(wrong) - 20} more" if len(wrong) > 20 else ""
            fix = f"does not fit its config.json: {'; '.join(wrong[:20])}{more}"
            raise CheckpointError("checkpoint", str(self.reader.directory), fix)

    def _misfits(self, name: str, shape: tuple[int, ...]) -> Iterator[str]:
        stored = self.reader.stored
        if stored[name].shape != shape:
            yield f"{name} has shape {list(stored[name].shape)}, not {list(shape)}"
        elif name not in self.quantised:
            if stored[name].dtype not in FLOATS:
                yield f"{name} has type {stored[name].dtype}, not {', '.join(map(str, FLOATS))} or FP8 in blocks"
        elif len(shape) != 2:
            yield f"{name} is in FP8, which only matrices can be"
        elif (scale := stored.get(fp8.scale_name(name))) is None:
            yield f"{fp8.scale_name(name)} is missing"
        elif scale.shape != (blocks := fp8.scale_shape(shape, self.block)):
            yield f"{fp8.scale_name(name)} has shape {list(scale.shape)}, not {list(blocks)}"
        elif scale.dtype.kind == "i" or scale.dtype == fp8.E4M3:
            yield f"{fp8.scale_name(name)} has type {scale.dtype}, not float32 or float8_e8m0fnu"
