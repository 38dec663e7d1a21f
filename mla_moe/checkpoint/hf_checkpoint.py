"""Read a Hugging Face directory: check tensors against config.json, dequantize, and map to parameters."""

import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mla_moe.checkpoint import compressed_tensors, fp8
from mla_moe.checkpoint.files import check, read_json
from mla_moe.checkpoint.hf_mapping import (
    ALL,
    BLOCK_ROWS,
    Index,
    TensorMapping,
    by_tensor,
    is_router_bias,
    rows_per_read,
    tensor_mappings,
)
from mla_moe.checkpoint.quantization import (
    E4M3,
    Scheme,
    StoredMatrix,
    quantization_config,
    read_schemes,
    without_quantization,
)
from mla_moe.checkpoint.remote import RemoteCheckpoint
from mla_moe.checkpoint.safetensors_reader import BFLOAT16, WEIGHT_DTYPES, SafetensorsReader
from mla_moe.checkpoint.safetensors_writer import TensorEntry, tensor_entries, with_quantization
from mla_moe.checkpoint.unused_tensors import QUANTIZED, stored_tensors
from mla_moe.config import ModelConfig
from mla_moe.config.errors import visible
from mla_moe.nn.abstract_model import AbstractModel

logger = logging.getLogger(__name__)

_ROTARY = re.compile(r"\.rotary_emb\.inv_freq$")


class HFTensors(SafetensorsReader):
    """The tensors of a Hugging Face directory by name, quantized matrices dequantized. Data are read when requested."""

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, Any],
        cfg: ModelConfig,
        remote: RemoteCheckpoint | None = None,
    ):
        schemes = read_schemes(config)  # before a type that only kinds of quantization have that are not read
        super().__init__(directory, remote)
        self.quantized: dict[str, Scheme] = {}
        """Schemes of the quantized matrices: the first one in config.json that its codes and scales fit."""
        self.code_names: dict[str, str] = {}
        """The name of the matrix for that of its codes."""
        self._packed_shapes: dict[str, tuple[int, ...]] = {}
        for name in self.stored:
            self._find_scheme(name, schemes)
        owners = {c: n for n, scheme in self.quantized.items() for c in scheme.companions(n) if c in self.stored}
        self.companions: Mapping[str, str] = owners
        """The name of the matrix for those of its scales and its shape."""
        architecture = cfg.architecture
        names = self.stored.keys() | self.quantized
        self.unused = {name for name in names if architecture.is_unused(cfg, name)}
        """What the architecture does not use."""
        rotary = {name for name, t in self.stored.items() if _ROTARY.search(name) and len(t.shape) == 1}
        self.ignored = self.unused | rotary
        """That, and rotary frequencies, which Moonlight's and Kimi's files repeat for each layer and all readers
        compute."""
        self.names = names - self.ignored - owners.keys() - (self.code_names.keys() - self.quantized.keys())

    def _find_scheme(self, code_name: str, schemes: Sequence[Scheme]) -> None:
        name, stored = code_name.removesuffix("_packed"), self.stored
        fits = [s for s in schemes if s.code_name(name) == code_name and s.code_dtype == stored[code_name].dtype]
        if not fits:
            return
        once = name not in self.quantized and (code_name == name or name not in stored)
        check(once, "checkpoint", name, f"is there twice, also as {code_name}; keep one")
        self.code_names[code_name] = name
        for scheme in (*fits, fits[0]):  # the last one is for the errors, if none fits
            self.quantized[name] = scheme
            if scheme.packed:
                self._packed_shapes[name] = self._packed_shape(name, scheme)
            if not any(self._scale_problems(name, scheme)):
                return

    def check_unused(self) -> None:
        """Raise `CheckpointError` for quantized tensors that the architecture does not use, and a conversion to weights
        that are not quantized would leave as they are."""
        for name in self.unused:
            check(name not in self.code_names, "checkpoint", name, QUANTIZED)

    def _packed_shape(self, name: str, scheme: Scheme) -> tuple[int, ...]:
        """The shape of a packed matrix: of its groups, or what its shape's tensor says. Empty without one."""
        codes, found = self.stored[scheme.code_name(name)], self.stored.get(scheme.shape_name(name))
        if found is None or found.shape != (2,) or found.dtype not in (np.int32, np.int64):
            return ()
        if scheme.block[1] * scheme.bits % 32 == 0 and scheme.is_grouped:
            return (*codes.shape[:-1], codes.shape[-1] * 32 // scheme.bits) if codes.shape else ()
        return tuple(self[scheme.shape_name(name)].tolist())

    def shape(self, name: str) -> tuple[int, ...]:
        return self._packed_shapes[name] if name in self._packed_shapes else self.stored[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor: as stored, or bfloat16 for a quantized matrix."""
        return BFLOAT16 if name in self.quantized else self.stored[name].dtype

    def read(self, name: str, dtype: DTypeLike, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        """A submatrix, or a slice of a vector: a memory-mapped view if `dtype` is the stored one."""
        scheme = self.quantized.get(name)
        if scheme is None:
            tensor = self._rows(name)
            return (tensor[rows, columns] if tensor.ndim == 2 else tensor[rows]).astype(dtype, copy=False)
        codes, scale, shape = self[scheme.code_name(name)], self.scale(name, scheme), self.shape(name)
        start, stop, _ = columns.indices(shape[1])
        if scheme.method == "fp8":
            return fp8.dequantize(codes[rows, columns], scale, dtype, scheme.block, (rows.start or 0, start))
        return compressed_tensors.dequantize(codes[rows], scale, scheme, dtype, rows.start or 0, (start, stop))

    def scale(self, name: str, scheme: Scheme) -> np.ndarray:
        """The scales of a quantized matrix. Raises `CheckpointError` if one is not finite."""
        scale_name = scheme.scale_name(name)
        scale = self[scale_name].reshape(scheme.scale_shape(self.shape(name)))
        finite = bool(np.isfinite(scale.astype(np.float32)).all())
        check(finite, "checkpoint", scale_name, "is not finite; fetch the file again")
        return scale

    def chunks(self, name: str, dtype: DTypeLike) -> Iterator[np.ndarray]:
        """All rows in `dtype`, some at a time: complete FP8 blocks, see `rows_per_read`."""
        shape = self.shape(name) or (1,)
        size = int(np.prod(shape[1:]))
        if len(shape) > 2:
            shape, size = (int(np.prod(shape[:-1])), shape[-1]), shape[-1]
        scheme = self.quantized.get(name)
        count = rows_per_read(size, scheme.block[0] if scheme and scheme.method == "fp8" else BLOCK_ROWS)
        for start in range(0, shape[0], count):
            yield self.read(name, dtype, slice(start, min(start + count, shape[0])))

    def _rows(self, name: str) -> np.ndarray:
        """A tensor as a matrix or vector; the first axes of one with more are rows, and a number is a vector."""
        tensor = self[name]
        return tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 2 else np.atleast_1d(tensor)

    def same_bytes(self, a: str, b: str) -> bool:
        """Whether two tensors of one shape are stored as the same bytes."""
        if self.stored[a].dtype != self.stored[b].dtype or {a, b} & self.quantized.keys():
            return False
        parts = zip(self.parts(a), self.parts(b), strict=True)
        return all(np.array_equal(x.view(np.uint8), y.view(np.uint8)) for x, y in parts)

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
        stored, scheme = self.stored, self.quantized.get(name)
        if scheme is None or not scheme.packed:
            if stored[name].shape != shape:
                yield f"{name} has shape {list(stored[name].shape)}, not {list(shape)}"
            elif scheme is None and stored[name].dtype not in WEIGHT_DTYPES:
                known = ", ".join(map(str, WEIGHT_DTYPES))
                yield f"{name} has type {stored[name].dtype}, not {known} or that of its quantization_config"
            elif scheme is not None and len(shape) != 2:
                yield f"{name} is quantized, which only matrices can be"
            elif scheme is not None:
                yield from self._scale_problems(name, scheme)
        elif self.shape(name) != shape:
            yield f"{scheme.shape_name(name)} is not a tensor with {list(shape)}"
        else:
            yield from self._scale_problems(name, scheme)

    def _scale_problems(self, name: str, scheme: Scheme) -> Iterator[str]:
        """What is wrong with a quantized matrix of the right shape."""
        shape, codes, scale_name = self.shape(name), self.stored[scheme.code_name(name)], scheme.scale_name(name)
        if len(shape) != 2:
            yield f"{name} is no matrix"
        elif codes.shape != (expected := scheme.code_shape(shape)):
            yield f"{scheme.code_name(name)} has shape {list(codes.shape)}, not {list(expected)}"
        elif (scale := self.stored.get(scale_name)) is None:
            yield f"{scale_name} is missing"
        elif _without_ones(scale.shape) != _without_ones(blocks := scheme.scale_shape(shape)):
            yield f"{scale_name} has shape {list(scale.shape)}, not {list(blocks)}"
        elif scale.dtype.kind == "i" or scale.dtype == E4M3:
            yield f"{scale_name} has type {scale.dtype}, not float32, bfloat16 or float8_e8m0fnu"


def _without_ones(shape: tuple[int, ...]) -> list[int]:
    """Writers differ in axes of length 1: a matrix's only scale may be a number."""
    return [n for n in shape if n != 1]


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

    def stored_matrix(self, path: str, matrix_index: tuple[int, ...]) -> StoredMatrix | None:
        """A matrix of a parameter as it is stored, if it is quantized; `matrix_index` is its index there."""
        mapping = self._by_matrix_index[path, matrix_index]
        scheme = self.tensors.quantized.get(mapping.name)
        if scheme is None:
            return None
        scale = self.tensors.scale(mapping.name, scheme)
        return StoredMatrix(mapping, scheme, self.tensors[scheme.code_name(mapping.name)], scale)

    @cached_property
    def _by_matrix_index(self) -> Mapping[tuple[str, tuple[int, ...]], TensorMapping]:
        mappings = (mapping for of_path in self._mappings.values() for mapping in of_path)
        return {(m.path, tuple(i for i in m.index if isinstance(i, int))): m for m in mappings}

    def read_rows(self, mapping: TensorMapping, dtype: DTypeLike, rows: slice, _: Index) -> np.ndarray:
        """Some rows of a tensor in the Hugging Face layout; see `TensorMapping.row_slices`."""
        return self.tensors.read(mapping.name, dtype, rows)

    def unused_tensors(self) -> list[TensorEntry]:
        """The tensors that are no part of the model, as stored."""
        self.tensors.check_unused()
        return stored_tensors(self.tensors, self.tensors.unused)

    def hf_checkpoint(
        self, dtype: np.dtype | None, quantize: Scheme | None = None
    ) -> tuple[list[TensorEntry], dict[str, Any]]:
        """All tensors, cast to `dtype` except for router biases, in the names and the order of this directory, and the
        `config.json` that goes with them. If all quantized matrices are so as `quantize` says, no other is quantized,
        and so those that this `config.json` excludes are not. Raises `CheckpointError` for FP8 blocks and groups of
        another size."""
        tensors = self.tensors
        kept = {name for name, scheme in tensors.quantized.items() if scheme == quantize}
        for scheme in set(tensors.quantized.values()):
            if quantize is None or scheme == quantize:
                continue
            fix = f"cannot be mixed with {list(quantize.block)}; write bfloat16 first"
            same = scheme._replace(block=quantize.block) == quantize
            check(not same, "checkpoint", f"blocks of {list(scheme.block)}", fix)
        complete = bool(kept) and kept == tensors.quantized.keys()
        new_scheme = None if complete else quantize
        entries: list[TensorEntry] = []
        if not complete:
            tensors.check_unused()
        for stored_name in tensors.stored:
            name = tensors.code_names.get(stored_name, stored_name)
            as_stored = stored_name in tensors.ignored or is_router_bias(name)
            if as_stored or tensors.companions.get(name, name) in kept:
                entries += stored_tensors(tensors, [stored_name])
            elif name in tensors.names:  # not scales that are no longer needed
                stored, read = tensors.dtype(name), partial(tensors.chunks, name)
                entries += tensor_entries(name, stored, dtype or stored, tensors.shape(name), read, new_scheme)
        config, given = without_quantization(self._config), quantization_config(self._config)
        if complete and given:
            config["quantization_config"] = given
        else:
            config = with_quantization(config, quantize, entries, self.cfg)
        if dtype is not None:
            config = {k: v for k, v in config.items() if k != "dtype"} | {"torch_dtype": dtype.name}
        return entries, config


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
