"""Files beside the weights: tokenizer, chat template, license, and the contents of `config.json`."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from mla_moe.checkpoint.files import CheckpointError, read_json
from mla_moe.checkpoint.fp8 import QUANTIZATION_CONFIG
from mla_moe.checkpoint.orbax_layout import find_step, run_directory
from mla_moe.config import ConfigError, ModelConfig
from mla_moe.text.special_tokens import BYTE_SPECIAL_IDS, open_tokenizer, special_ids

logger = logging.getLogger(__name__)

_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py", ".md"}
_REGENERATED = {"config.json", "model.safetensors.index.json"}
_TOKENIZER_FILES = ("tokenizer", "special_tokens", "chat_template", "vocab", "merges", "generation_config", "tiktoken")
_UNSUPPORTED_FILES = ("tokenizer", "tiktoken", "vocab", "merges")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def files_to_copy(directory: Path) -> dict[str, Path]:
    """The files beside the weights, by the names of their copies. Of a run they are those of its tokenizer, whose own
    file becomes `tokenizer.json`. Raises `CheckpointError` for a link to a file outside the directory."""
    source, prefixes, run = directory, ("",), run_directory(directory)
    file = _recipe_tokenizer(run) if run else None
    if file and not file.is_file():
        logger.warning("the run's tokenizer %s does not exist; weights are written without it", file)
        file = None
    if run:
        source, prefixes = file.parent if file else run, _TOKENIZER_FILES
    files = {
        path.name: path
        for path in sorted(source.iterdir())
        if path.is_file()
        and path.name.startswith(prefixes)
        and path.name not in _REGENERATED
        and (path.suffix in _SUFFIXES or path.name == "LICENSE")
        and not (run and path in (file, source / "tokenizer.json"))  # the recipe names the tokenizer
    }
    for name, path in files.items():
        if path.is_symlink() and _is_external_link(path):
            raise CheckpointError("checkpoint", name, "is a link out of the directory; replace it by the file")
    return files | ({"tokenizer.json": file} if file else {})


def _is_external_link(path: Path) -> bool:
    """Whether a link leads out of its directory, except into the `blobs` of a Hugging Face download cache."""
    target, directory = path.resolve(), path.parent.resolve()
    return target.parent != directory and target.parent != directory.parent.parent / "blobs"


def tokenizer_file(path: Path) -> Path | None:
    """The `tokenizer.json` of a checkpoint, or the file that a run's recipe names, which may no longer exist; None if
    its tokens are bytes. Raises `CheckpointError` for a directory with a tokenizer of another format."""
    directory = find_step(path) or path
    if run := run_directory(directory):
        return _recipe_tokenizer(run)
    if (file := directory / "tokenizer.json").is_file():
        return file
    for other in sorted(directory.iterdir()):
        if other.name.startswith(_UNSUPPORTED_FILES):
            fix = "only tokenizer.json is read; write one with AutoTokenizer.from_pretrained(…).save_pretrained(…)"
            raise CheckpointError("tokenizer", str(other), fix)
    return None


def _recipe_tokenizer(run: Path) -> Path | None:
    data = read_json(run / "recipe.json").get("data")
    spec = str(data.get("tokenizer", "byte")) if isinstance(data, dict) else "byte"
    if spec == "byte":
        return None
    return run / "tokenizer.json" if spec.startswith("bpe:") else Path(spec)


def hf_config(
    cfg: ModelConfig, dtype: DTypeLike | None, *, fp8: bool = False, beside: Path | None = None
) -> dict[str, Any]:
    """The contents of `config.json`: those in the directory `beside` if they describe this model, otherwise
    `cfg.to_hf()` with the token ids found there."""
    config = cfg.to_hf()
    if beside is not None:
        found = read_json(beside / "config.json") if (beside / "config.json").is_file() else {}
        config = found if _describes(found, cfg) else config | _token_ids(found, beside)
    config.pop("quantization_config", None)
    if dtype is not None:
        config.pop("dtype", None)
        config["torch_dtype"] = np.dtype(dtype).name
    return config | ({"quantization_config": dict(QUANTIZATION_CONFIG)} if fp8 else {})


def _describes(config: Mapping[str, Any], cfg: ModelConfig) -> bool:
    try:
        return ModelConfig.from_hf({"mtp_shares_embedding": cfg.mtp_shares_embedding} | dict(config)) == cfg
    except ConfigError:
        return False


def _token_ids(config: Mapping[str, Any], directory: Path) -> dict[str, int]:
    """Special token ids from a `config.json`, otherwise from the tokenizer that is copied."""
    ids = {name: config[name] for name in _TOKEN_IDS if config.get(name) is not None}
    if ids:
        return ids
    if file := files_to_copy(directory).get("tokenizer.json"):
        return special_ids(open_tokenizer(file), file)
    run = run_directory(directory)
    return dict(BYTE_SPECIAL_IDS) if run and _recipe_tokenizer(run) is None else {}
