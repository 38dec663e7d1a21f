"""What goes with weights from directory to directory: tokenizer, chat template, licence, fields of config.json."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from mla_moe.config import ConfigError, ModelConfig
from mla_moe.interop.fp8 import QUANTIZATION_CONFIG
from mla_moe.interop.native import run_directory, step_directory
from mla_moe.interop.reader import CheckpointError, leaves, read_json

logger = logging.getLogger(__name__)

_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py", ".md"}
_MADE_ANEW = {"config.json", "model.safetensors.index.json"}
_OF_A_TOKENIZER = ("tokenizer", "special_tokens", "chat_template", "vocab", "merges", "generation_config", "tiktoken")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def carried(directory: Path) -> list[Path]:
    """Files beside the weights; of a run, those of its tokenizer. They are copied and never run.

    Raises `CheckpointError` for a link that leads out of the directory.
    """
    home, names = directory, ("",)
    if run := run_directory(directory):
        home, names = _tokenizer_home(run), _OF_A_TOKENIZER
    files = [
        path
        for path in sorted(home.iterdir())
        if path.is_file()
        and path.name.startswith(names)
        and path.name not in _MADE_ANEW
        and (path.suffix in _SUFFIXES or path.name == "LICENSE")
    ]
    for path in files:
        if path.is_symlink() and leaves(path):
            raise CheckpointError("checkpoint", path.name, "is a link out of the directory; put the file in its place")
    return files


def tokenizer_file(path: Path) -> Path | None:
    """The `tokenizer.json` that belongs to what `load_pretrained` opens; None where text is bytes.

    Of a run it is the one its recipe names, which may be gone.
    """
    directory = step_directory(path) or path
    if run := run_directory(directory):
        return _named_by_recipe(run)
    file = directory / "tokenizer.json"
    return file if file.is_file() else None


def _named_by_recipe(run: Path) -> Path | None:
    data = read_json(run / "recipe.json").get("data")
    spec = str(data.get("tokenizer", "byte")) if isinstance(data, dict) else "byte"
    if spec == "byte":
        return None
    return run / "tokenizer.json" if spec.startswith("bpe:") else Path(spec)


def _tokenizer_home(run: Path) -> Path:
    """Where the files of a run's tokenizer are; the run, where there are none."""
    file = _named_by_recipe(run)
    if file is None or file.is_file():
        return run if file is None else file.parent
    logger.warning("the run's tokenizer %s is not there; the weights go without it", file)
    return run


def hub_config(
    cfg: ModelConfig, dtype: DTypeLike | None, *, fp8: bool = False, beside: Path | None = None
) -> dict[str, Any]:
    """The contents of config.json: those that lie in the directory `beside` where they describe this model, and else
    ours with the token ids found there."""
    config = cfg.to_hf()
    if beside is not None:
        theirs = read_json(beside / "config.json") if (beside / "config.json").is_file() else {}
        config = theirs if _describes(theirs, cfg) else config | _token_ids(theirs, carried(beside))
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


def _token_ids(config: Mapping[str, Any], files: list[Path]) -> dict[str, Any]:
    """From a config.json, or from a tokenizer's own files."""
    ids = {name: config[name] for name in _TOKEN_IDS if config.get(name) is not None}
    by_name = {path.name: path for path in files}
    if ids or not {"tokenizer.json", "tokenizer_config.json"} <= by_name.keys():
        return ids
    added = read_json(by_name["tokenizer.json"]).get("added_tokens")
    numbers = {token["content"]: token["id"] for token in added if isinstance(token, dict)} if added else {}
    names = read_json(by_name["tokenizer_config.json"])
    tokens = {name: names.get(name.removesuffix("_id")) for name in _TOKEN_IDS}
    contents = {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items()}
    return {name: numbers[token] for name, token in contents.items() if token in numbers}
