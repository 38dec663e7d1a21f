"""Models from and to directories in the layout of Hugging Face: `config.json` and safetensors."""

from collections import defaultdict
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from mla_moe.interop.fp8 import QUANTIZATION_CONFIG
from mla_moe.interop.names import Piece, pieces
from mla_moe.interop.progress import progress
from mla_moe.interop.reader import CheckpointError
from mla_moe.interop.weights import Weights, open_checkpoint
from mla_moe.interop.writer import SHARD_BYTES, Entry, entries_of, write_checkpoint
from mla_moe.nn.param import Precision, RouterBias
from mla_moe.nn.skeleton import Skeleton, arrays_of, variables_of
from mla_moe.nn.transformer import Transformer
from mla_moe.recipe import Mesh as MeshSizes
from mla_moe.sharding import make_mesh

_FILE_TYPE = "file_type"
"""Metadata of a router that was loaded: it is float32 here, and is written back in the type it came in."""


def load_pretrained(path: str | Path, dtype: DTypeLike | None = None, mesh: Mesh | None = None) -> Transformer:
    """The model in a Hugging Face directory, each parameter read straight into its place.

    Parameters keep the files' types unless `dtype` gives another, and FP8 blocks become bfloat16; routers are float32
    in any case. With a mesh, a process reads only the bytes of its own shards; without, everything is on the first
    device. Nothing that a checkpoint brings is executed. Raises `CheckpointError` for files that are not what they
    claim, and for tensors missing or unknown.
    """
    _, cfg, weights = open_checkpoint(Path(path))
    by_path: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces(Skeleton(cfg)):
        by_path[piece.path].append(piece)
    types = {p: np.result_type(*(weights.dtype(piece.name) for piece in group)) for p, group in by_path.items()}
    skeleton = Skeleton(cfg, precision=Precision(param=dtype or types["embed"], compute=Precision.default().compute))
    if mesh is None:
        mesh = make_mesh(MeshSizes(), jax.devices()[:1])
    arrays = {}
    with progress("Loading", sum(map(weights.bytes, weights.names))) as advance:
        for path_, place in skeleton.abstract(mesh).items():
            own = place.dtype if dtype or _is_router(path_) else types[path_]
            read = partial(_read, weights, _without_copies(weights, by_path[path_]), place.shape, own)
            arrays[path_] = jax.make_array_from_callback(place.shape, place.sharding, read)
            advance(sum(weights.bytes(piece.name) for piece in by_path[path_]))
    if dtype is None:
        for path_, variable in skeleton.variables.items():
            if _is_router(path_):
                variable.set_metadata(_FILE_TYPE, types[path_].name)
    return skeleton.merge(arrays)


def save_pretrained(
    model: Transformer,
    path: str | Path,
    dtype: DTypeLike | None = None,
    *,
    fp8: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a directory that transformers, vLLM and SGLang load, all of it or nothing.

    Weights keep the model's types, and a loaded router its file's, unless `dtype` gives another; router biases stay
    float32 then. With `fp8`, matrices go into FP8 blocks as in DeepSeek's releases. Raises `CheckpointError` if `path`
    exists.
    """
    skeleton, arrays = Skeleton(model.cfg, precision=model.precision), arrays_of(model)
    file_types = {p: v.get_metadata(_FILE_TYPE, arrays[p].dtype) for p, v in variables_of(model).items()}
    entries: list[Entry] = []
    for piece in pieces(skeleton):
        kind = file_types[piece.path] if dtype is None else dtype
        if dtype is not None and isinstance(skeleton.variables[piece.path], RouterBias):
            kind = np.float32
        parts = partial(_whole, arrays[piece.path], piece)
        entries += entries_of(piece.name, np.dtype(kind), piece.shape, parts, fp8=fp8)
    config = model.cfg.to_hf() | {"torch_dtype": np.dtype(dtype or model.precision.param).name}
    if fp8:
        config["quantization_config"] = dict(QUANTIZATION_CONFIG)
    write_checkpoint(Path(path), config, entries, max_shard_bytes)


def _is_router(path: str) -> bool:
    return "/router/" in path


def _whole(array: jax.Array, piece: Piece) -> list[np.ndarray]:
    return [piece.to_theirs(np.asarray(jax.device_get(array[piece.index])))]


def _without_copies(weights: Weights, group: list[Piece]) -> list[Piece]:
    """The pieces of one array. A prediction module's own embedding and head must be the model's, which it shares."""
    first: dict[tuple, Piece] = {}
    for piece in group:
        original = first.setdefault(tuple(map(str, piece.index)), piece)
        if original is not piece and not weights.same(piece.name, original.name):
            fix = f"differs from {original.name}; a prediction module shares the model's"
            raise CheckpointError("checkpoint", piece.name, fix)
    return list(first.values())


def _read(weights: Weights, group: list[Piece], shape, dtype, index) -> np.ndarray:
    """The part `index` of an array, out of the files."""
    ranges = [range(*i.indices(n)) for i, n in zip(index, shape, strict=True)]
    out = np.empty([len(r) for r in ranges], dtype)
    for piece in group:
        if any(isinstance(i, int) and i not in r for i, r in zip(piece.index, ranges, strict=True)):
            continue
        target = tuple(i - r.start if isinstance(i, int) else i for i, r in zip(piece.index, ranges, strict=True))
        cut = tuple(s for i, s in zip(piece.index, index, strict=True) if not isinstance(i, int))
        out[target] = piece.to_ours(weights.read(piece.name, dtype, *piece.window(cut)))
    return out
