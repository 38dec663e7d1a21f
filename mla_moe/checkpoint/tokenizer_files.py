"""Files beside the weights: tokenizer, chat template, license, and the contents of `config.json`."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from mla_moe.checkpoint.files import CheckpointError, check, read_json
from mla_moe.checkpoint.orbax_layout import find_step, run_directory
from mla_moe.checkpoint.quantization import without_quantization
from mla_moe.config import ConfigError, ModelConfig
from mla_moe.text.isolated import text_worker
from mla_moe.text.special_tokens import BYTE_SPECIAL_IDS, MAX_TOKENIZER_BYTES
from mla_moe.text.tokenizer import TOKENIZER_FILES, tokenizer_path

logger = logging.getLogger(__name__)

_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py", ".md"}
SIDE_FILES = [*(f"*{suffix}" for suffix in sorted(_SUFFIXES)), "LICENSE"]
"""Patterns of the files beside the weights that are copied or read."""
_REGENERATED = {"config.json", "model.safetensors.index.json"}
_UNSUPPORTED_FILES = ("tokenizer", "tiktoken", "vocab", "merges")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def files_to_copy(directory: Path) -> dict[str, Path]:
    """The files beside the weights, by the names of their copies. Of a run they are its tokenizer's file, which becomes
    `tokenizer.json`, and the files of a tokenizer beside it: a recipe may name one in any directory, whose other files
    are not the run's. Raises `CheckpointError` for a link to a file outside the directory."""
    if run := run_directory(directory):
        return _tokenizer_files(_recipe_tokenizer(run))
    files = {
        path.name: path
        for path in sorted(directory.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in _REGENERATED
        and (path.suffix in _SUFFIXES or path.name == "LICENSE")
    }
    _check_links(files)
    return files


def _tokenizer_files(file: Path | None) -> dict[str, Path]:
    if file is None:
        return {}
    if not file.is_file():
        logger.warning("the run's tokenizer %s does not exist; weights are written without it", file)
        return {}
    content, fix = read_json(file, MAX_TOKENIZER_BYTES), "is not a tokenizer.json; correct the run's recipe"
    check("model" in content, "data.tokenizer", str(file), fix)
    files = {name: file.with_name(name) for name in TOKENIZER_FILES if file.with_name(name).is_file()}
    _check_links(files)
    return files | {"tokenizer.json": file}


def _check_links(files: Mapping[str, Path]) -> None:
    for name, path in files.items():
        parent = path.parent.resolve()
        allowed = parent, parent.parent.parent / "blobs"  # of a Hugging Face download cache
        fix = "is a link out of the directory; replace it by the file"
        check(not path.is_symlink() or path.resolve().parent in allowed, "checkpoint", name, fix)


def tokenizer_file(path: Path) -> Path | None:
    """The `tokenizer.json` of a checkpoint, or the file that a run's recipe names, which may no longer exist; None if
    its tokens are bytes. Raises `CheckpointError` for a directory with a tokenizer of another format, and for a run on
    token ids without a tokenizer."""
    directory = find_step(path) or path
    if run := run_directory(directory):
        if (spec := _spec(run)).startswith("ids:"):
            fix = "the run had token ids and no tokenizer; convert it, and put the tokenizer's files beside the weights"
            raise CheckpointError("data.tokenizer", spec, fix)
        return _recipe_tokenizer(run)
    if (file := directory / "tokenizer.json").is_file():
        return file
    for other in sorted(directory.iterdir()):
        if other.name.startswith(_UNSUPPORTED_FILES):
            fix = "only tokenizer.json is read; write one with AutoTokenizer.from_pretrained(…).save_pretrained(…)"
            raise CheckpointError("tokenizer", str(other), fix)
    return None


def _spec(run: Path) -> str:
    data = read_json(run / "recipe.json").get("data")
    return str(data.get("tokenizer", "byte")) if isinstance(data, dict) else "byte"


def _recipe_tokenizer(run: Path) -> Path | None:
    spec = _spec(run)
    if spec == "byte" or spec.startswith("ids:"):
        return None
    return run / "tokenizer.json" if spec.startswith("bpe:") else tokenizer_path(spec)


def hf_config(cfg: ModelConfig, dtype: DTypeLike, *, beside: Path | None = None) -> dict[str, Any]:
    """The contents of a `config.json` of weights in `dtype`: those in the directory `beside` if they describe this
    model, otherwise `cfg.to_hf()` with the token ids found there."""
    config = cfg.to_hf()
    if beside is not None:
        found = read_json(beside / "config.json") if (beside / "config.json").is_file() else {}
        config = found if _describes(found, cfg) else config | _token_ids(found, beside)
    config = {k: v for k, v in without_quantization(config).items() if k != "dtype"}
    config["torch_dtype"] = np.dtype(dtype).name
    return config


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
        return text_worker().open(file)
    run = run_directory(directory)
    return dict(BYTE_SPECIAL_IDS) if run and _spec(run) == "byte" else {}
