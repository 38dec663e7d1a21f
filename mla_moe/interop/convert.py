"""From one Hugging Face directory to another: types changed, FP8 blocks undone or made, a few rows at a time."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike

from mla_moe.interop import fp8 as blocks
from mla_moe.interop.reader import CheckpointError, leaves
from mla_moe.interop.weights import Weights, open_checkpoint
from mla_moe.interop.writer import SHARD_BYTES, Entry, entries_of, write_checkpoint

_CARRIED = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py", ".md"}
_MADE_ANEW = {"config.json", "model.safetensors.index.json"}
_BIAS = ".e_score_correction_bias"


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: DTypeLike | None = None,
    fp8: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the checkpoint `src` to `dst`, all of it or nothing, in memory that does not grow with it.

    Tensors keep their types unless `dtype` gives another; router biases keep theirs in any case. FP8 blocks become
    bfloat16 or `dtype`; with `fp8` they stay as they are, and other matrices that DeepSeek releases so join them. The
    rest of the directory (tokenizer, chat template, generation settings, code) is copied and never run.
    """
    source = Path(src)
    config, _, weights = open_checkpoint(source)
    if fp8 and weights.quantised and weights.block != blocks.BLOCK:
        fix = f"of {list(weights.block)} cannot be mixed with blocks of {list(blocks.BLOCK)}: write bfloat16 first"
        raise CheckpointError("checkpoint", "FP8 blocks", fix)
    entries = [entry for name in weights.reader.stored for entry in _entries(weights, name, dtype, fp8)]
    blocked = config.pop("quantization_config", None) or dict(blocks.QUANTIZATION_CONFIG)
    if fp8:
        config["quantization_config"] = blocked
    if dtype is not None:
        config = {k: v for k, v in config.items() if k != "dtype"} | {"torch_dtype": np.dtype(dtype).name}
    write_checkpoint(Path(dst), config, entries, max_shard_bytes, _others(source))


def _entries(weights: Weights, name: str, dtype: DTypeLike | None, fp8: bool) -> list[Entry]:
    kept = weights.reader.stored[name]
    as_it_is = Entry(name, kept.dtype, kept.shape, lambda: (weights.reader[name][rows] for rows in weights.parts(name)))
    if name not in weights.names:  # a scale, or a computed buffer
        return [as_it_is] if fp8 or name in weights.computed else []
    if name.endswith(_BIAS) or (fp8 and name in weights.quantised):
        return [as_it_is]
    kind = np.dtype(weights.dtype(name) if dtype is None else dtype)

    def parts() -> Iterator[np.ndarray]:
        # Blocks are made of all that the file knows, not of what is left of it in `dtype`.
        read_as = weights.dtype(name) if fp8 and blocks.is_quantised(name) else kind
        return (weights.read(name, read_as, rows) for rows in weights.parts(name))

    return entries_of(name, kind, kept.shape, parts, fp8=fp8)


def _others(source: Path) -> list[Path]:
    """Files beside the weights. Raises `CheckpointError` for a link that leads out of the directory."""
    others = [
        path
        for path in sorted(source.iterdir())
        if path.is_file() and path.name not in _MADE_ANEW and (path.suffix in _CARRIED or path.name == "LICENSE")
    ]
    for path in others:
        if path.is_symlink() and leaves(path):
            raise CheckpointError("checkpoint", path.name, "is a link out of the directory; put the file in its place")
    return others
