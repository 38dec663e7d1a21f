"""Models from and to directories in the layout of Hugging Face: `config.json` and safetensors."""

import dataclasses
import json
import logging
from collections import defaultdict
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from mla_moe.config import ModelConfig
from mla_moe.interop.names import Piece, pieces
from mla_moe.interop.reader import CheckpointError, Reader, read_json
from mla_moe.interop.writer import Entry, whole_directory, write_shards
from mla_moe.nn.param import Precision, RouterBias
from mla_moe.nn.skeleton import Skeleton, arrays_of
from mla_moe.nn.transformer import Transformer
from mla_moe.recipe import Mesh as MeshSizes
from mla_moe.sharding import make_mesh

logger = logging.getLogger(__name__)


def load_pretrained(path: str | Path, dtype: DTypeLike | None = None, mesh: Mesh | None = None) -> Transformer:
    """The model in a Hugging Face directory, each parameter read straight into its place.

    Parameters keep the files' type unless `dtype` gives another; routers are float32 in any case. With a mesh, a
    process reads only the bytes of its own shards; without, everything is on the first device. Nothing that a
    checkpoint brings is executed. Raises `CheckpointError` for files that are not what they claim, and for tensors
    missing or unknown.
    """
    directory = Path(path)
    cfg = ModelConfig.from_hf(read_json(directory / "config.json"))
    reader = Reader(directory)
    last = f"model.layers.{cfg.num_hidden_layers}."
    if cfg.num_nextn_predict_layers and not any(name.startswith(last) for name in reader.names):
        logger.warning("%s has no prediction module, though its config.json names one; loaded without", directory)
        cfg = dataclasses.replace(cfg, num_nextn_predict_layers=0)
    skeleton = Skeleton(cfg)
    by_path: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces(skeleton):
        by_path[piece.path].append(piece)
    _check(reader, [piece for group in by_path.values() for piece in group])
    if dtype is None:
        dtype = reader[by_path["embed"][0].name].dtype
    skeleton = Skeleton(cfg, precision=Precision(param=dtype, compute=Precision.default().compute))
    if mesh is None:
        mesh = make_mesh(MeshSizes(), jax.devices()[:1])
    arrays = {}
    for path_, place in skeleton.abstract(mesh).items():
        own = _without_copies(reader, by_path[path_])
        read = partial(_read, reader, own, place.shape, place.dtype)
        arrays[path_] = jax.make_array_from_callback(place.shape, place.sharding, read)
    return skeleton.merge(arrays)


def save_pretrained(
    model: Transformer, path: str | Path, dtype: DTypeLike | None = None, *, max_shard_bytes: int = 5 << 30
) -> None:
    """Write a directory that transformers, vLLM and SGLang load, all of it or nothing.

    Weights take the type `dtype`, or that of the model's parameters; router biases stay float32, as released. Raises
    `CheckpointError` if `path` exists.
    """
    skeleton = Skeleton(model.cfg, precision=model.precision)
    arrays = arrays_of(model)
    dtype = np.dtype(dtype or model.precision.param)
    entries = []
    for piece in pieces(skeleton):
        kept = np.dtype(np.float32) if isinstance(skeleton.variables[piece.path], RouterBias) else dtype
        entries.append(Entry(piece.name, kept, piece.shape, partial(_tensor, arrays, piece)))
    config = model.cfg.to_hf() | {"torch_dtype": dtype.name}
    with whole_directory(Path(path)) as directory:
        write_shards(directory, entries, max_shard_bytes)
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _tensor(arrays, piece: Piece) -> np.ndarray:
    return piece.to_theirs(np.asarray(jax.device_get(arrays[piece.path][piece.index])))


def _check(reader: Reader, wanted: list[Piece]) -> None:
    """All tensors are there with their shapes, and no others: one error lists what is not so."""
    known = {piece.name for piece in wanted}
    wrong = [
        f"{p.name} has shape {list(reader[p.name].shape)}, not {list(p.shape)}"
        for p in wanted
        if p.name in reader.names and reader[p.name].shape != p.shape
    ]
    wrong += [f"{name} is missing" for name in sorted(known - reader.names)]
    wrong += [f"{name} is unknown" for name in sorted(reader.names - known)]
    if wrong:
        more = f" and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        fix = f"does not fit its config.json: {'; '.join(wrong[:20])}{more}"
        raise CheckpointError("checkpoint", str(reader.directory), fix)


def _without_copies(reader: Reader, group: list[Piece]) -> list[Piece]:
    """The pieces of one array. A prediction module's own embedding and head must be the model's, which it shares."""
    first: dict[tuple, Piece] = {}
    for piece in group:
        key = tuple(str(i) for i in piece.index)
        if key not in first:
            first[key] = piece
        elif not np.array_equal(reader[piece.name].view(np.uint8), reader[first[key].name].view(np.uint8)):
            fix = f"differs from {first[key].name}; a prediction module shares the model's"
            raise CheckpointError("checkpoint", piece.name, fix)
    return list(first.values())


def _read(reader: Reader, group: list[Piece], shape, dtype, index) -> np.ndarray:
    """The part `index` of an array, out of the files."""
    ranges = [range(*i.indices(n)) for i, n in zip(index, shape, strict=True)]
    out = np.empty([len(r) for r in ranges], jnp.dtype(dtype))
    for piece in group:
        if any(isinstance(i, int) and i not in r for i, r in zip(piece.index, ranges, strict=True)):
            continue
        target = tuple(i - r.start if isinstance(i, int) else i for i, r in zip(piece.index, ranges, strict=True))
        cut = tuple(s for i, s in zip(piece.index, index, strict=True) if not isinstance(i, int))
        out[target] = piece.to_ours(reader[piece.name])[cut].astype(out.dtype)
    return out
