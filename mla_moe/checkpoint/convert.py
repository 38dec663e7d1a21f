"""Convert a checkpoint between the Hugging Face and the Orbax layout, or to another dtype, in bounded memory."""

import contextlib
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
from jax.typing import DTypeLike

from mla_moe.checkpoint.adapter import AdapterCheckpoint
from mla_moe.checkpoint.bucket_run import read_run
from mla_moe.checkpoint.files import atomic_directory, check, progress_bar, write_side_files
from mla_moe.checkpoint.hf_checkpoint import HFCheckpoint
from mla_moe.checkpoint.hf_mapping import TensorMapping, tensor_mappings
from mla_moe.checkpoint.orbax_layout import create_step
from mla_moe.checkpoint.peft import is_peft, write_peft
from mla_moe.checkpoint.quantization import Quantize, target_scheme
from mla_moe.checkpoint.reader import Checkpoint, open_checkpoint
from mla_moe.checkpoint.remote import RemoteCheckpoint
from mla_moe.checkpoint.safetensors_reader import weight_dtype
from mla_moe.checkpoint.safetensors_writer import SHARD_BYTES, write_checkpoint, write_file
from mla_moe.checkpoint.save_errors import as_save_error
from mla_moe.checkpoint.tokenizer_files import files_to_copy, hf_config
from mla_moe.checkpoint.unused_tensors import UNUSED
from mla_moe.config import require
from mla_moe.config.storage import is_bucket, is_url, require_path, shown
from mla_moe.nn.abstract_model import AbstractModel


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: Literal["hf", "orbax"] = "hf",
    dtype: DTypeLike | None = None,
    quantize: Quantize | None = None,
    merge_adapter: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Convert the checkpoint `src` to the new directory `dst`, which appears only when it is complete, or to a commit
    in the repository `hf://ORG/NAME` of the Hub, or its branch `hf://ORG/NAME@BRANCH`; a new one is private. `s3://…`
    and `gs://…` are directories of buckets. From a URL, only a few files are on this host at a time.

    `src` is a Hugging Face directory, a model of the Hub, a run or one of its checkpoints, of which only parameters
    and router biases are taken. Peak memory does not depend on the size of the checkpoint. Tensors keep their dtypes
    unless `dtype` is set; router biases always do. Quantized matrices are dequantized to bfloat16 or `dtype`. With
    `quantize` those are that DeepSeek releases in FP8 blocks ("fp8"), or the routed experts as Kimi-K2.5 has them in
    INT4 ("int4"); a source that is quantized so stays as it is. Tokenizer, chat template, generation settings and code
    are copied and never executed.

    LoRA adapters become a directory for PEFT, which names their base; with `merge_adapter` they are added to the
    weights of the base, and the complete model is written. Raises `CheckpointError` if `dst` exists or is inside `src`,
    and if `src` is not valid, `ConfigError` if the Hub rejects it, and `CheckpointSaveError` or another `OSError` if
    the disk is full."""
    require(to in ("hf", "orbax"), "to", to, "must be one of hf, orbax")
    require_path("path", dst)
    fix = "takes Hugging Face's layout; convert with --to hf"
    require(to == "hf" or not is_url(dst), "path", shown(dst), fix)
    dtype = None if dtype is None else weight_dtype(dtype)
    with contextlib.ExitStack() as stack:
        source = _open_remote(src, dst, stack) if is_url(src) else open_checkpoint(src)
        if not is_url(dst):
            _require_outside(Path(dst), Path(src), source.directory)
        has_adapters = isinstance(source, AdapterCheckpoint)
        require(has_adapters or not merge_adapter, "merge_adapter", merge_adapter, f"{src} has no adapters; drop it")
        if isinstance(source, AdapterCheckpoint) and not merge_adapter:
            fix = "is not for adapters alone; give --merge-adapter too, or drop it"
            ok = to == "hf" and quantize is None and not is_url(dst)
            require(ok, "to", f"{to}, quantize = {quantize}, {shown(dst)}", fix)
            write_peft(source, Path(dst), dtype)
        elif to == "orbax":
            check(quantize is None, "quantize", quantize, "Orbax checkpoints are not quantized; convert with --to hf")
            with as_save_error(Path(dst), "nothing is left of it"):
                _write_orbax(source, Path(dst), dtype)
        else:
            tensors, config = source.hf_checkpoint(dtype, target_scheme(quantize, source.cfg))
            write_checkpoint(dst, config, tensors, max_shard_bytes, files_to_copy(source.directory))


def _open_remote(src: str | Path, dst: str | Path, stack: contextlib.ExitStack) -> Checkpoint:
    """A checkpoint of the Hub or of a bucket. Its files are for a time beside `dst`, where room is needed anyway.
    Adapters are small, and are copied as a whole."""
    beside = None if is_url(dst) else Path(dst).absolute().parent
    if beside:
        beside.mkdir(parents=True, exist_ok=True)
    temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix=".mla_moe-", dir=beside))
    if is_bucket(src) and (run := read_run(src, "checkpoint")):
        return open_checkpoint(run)
    remote = RemoteCheckpoint(src, Path(temporary))
    return open_checkpoint(src) if is_peft(remote.directory) else HFCheckpoint(remote.directory, remote)


def _require_outside(dst: Path, *sources: Path) -> None:
    inside = any(path.resolve() in (p := dst.resolve(), *p.parents) for path in sources)
    check(not inside, "path", str(dst), f"is inside {sources[0]}, which would change; name a directory elsewhere")


def _write_orbax(source: Checkpoint, target: Path, dtype: np.dtype | None) -> None:
    """Write a step's directory. An array is stored in chunks of the size in which it is read: none is written twice."""
    abstract_model = AbstractModel(source.cfg)
    arrays = {path: variable.get_value() for path, variable in abstract_model.variables.items()}
    keeps_dtype = arrays if dtype is None else abstract_model.bias_paths
    dtypes = {path: source.dtype(path) if path in keeps_dtype else np.dtype(dtype) for path in arrays}
    mappings = list(tensor_mappings(source.cfg, copies=False))
    if isinstance(source, HFCheckpoint):  # in the order of the files, of which few are on this host at a time
        tensors = source.tensors
        order = {tensors.code_names.get(name, name): number for number, name in enumerate(tensors.stored)}
        mappings.sort(key=lambda mapping: order[mapping.name])
    chunk_shapes = {m.path: _chunk_shape(m, arrays[m.path].shape) for m in mappings}
    others, config = files_to_copy(source.directory), hf_config(source.cfg, dtypes["embed"], beside=source.directory)
    total_bytes = sum(array.size * dtypes[path].itemsize for path, array in arrays.items())
    with atomic_directory(target) as directory, progress_bar("Writing", total_bytes) as done:
        with create_step(directory, abstract_model, dtypes, chunk_shapes) as write:
            for mapping in mappings:
                for rows, index in mapping.row_slices():
                    chunk = mapping.from_hf_tensor(source.read_rows(mapping, dtypes[mapping.path], rows, index))
                    write(mapping.path, index, chunk)
                    done(chunk.nbytes)
        if unused := source.unused_tensors():
            (directory / UNUSED).mkdir()
            write_file(directory / UNUSED / "model.safetensors", unused, done)
        write_side_files(directory, config, others)


def _chunk_shape(mapping: TensorMapping, shape: tuple[int, ...]) -> tuple[int, ...]:
    _, first = next(mapping.row_slices())
    return tuple(1 if isinstance(i, int) else len(range(*i.indices(n))) for i, n in zip(first, shape, strict=True))
