"""What goes with weights from directory to directory: tokenizer, chat template, licence, fields of config.json."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from mla_moe.checkpoint.fp8 import QUANTIZATION_CONFIG
from mla_moe.checkpoint.orbax_arrays import run_directory, step_directory
from mla_moe.checkpoint.safetensors_reader import CheckpointError, leaves, read_json
from mla_moe.config import ConfigError, ModelConfig
from mla_moe.text.special_tokens import BYTE_SPECIAL_IDS, open_tokenizer, special_ids

logger = logging.getLogger(__name__)

_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py", ".md"}
_MADE_ANEW = {"config.json", "model.safetensors.index.json"}
_OF_A_TOKENIZER = ("tokenizer", "special_tokens", "chat_template", "vocab", "merges", "generation_config", "tiktoken")
_OF_OTHERS = ("tokenizer", "tiktoken", "vocab", "merges")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def carried_files(directory: Path) -> dict[str, Path]:
    """Files beside the weights, by the names they are to have; of a run, those of its tokenizer, whose own file becomes
    `tokenizer.json`. They are copied and never run.

    Raises `CheckpointError` for a link that leads out of the directory.
    """
    home, names, run = directory, ("",), run_directory(directory)
    file = _named_by_recipe(run) if run else None
    if file and not file.is_file():
        logger.warning("the run's tokenizer %s is not there; the weights go without it", file)
        file = None
    if run:
        home, names = file.parent if file else run, _OF_A_TOKENIZER
    files = {
        path.name: path
        for path in sorted(home.iterdir())
        if path.is_file()
        and path.name.startswith(names)
        and path.name not in _MADE_ANEW
        and (path.suffix in _SUFFIXES or path.name == "LICENSE")
        and not (run and path in (file, home / "tokenizer.json"))  # the recipe says which
    }
    for name, path in files.items():
        if path.is_symlink() and leaves(path):
            raise CheckpointError("checkpoint", name, "is a link out of the directory; put the file in its place")
    return files | ({"tokenizer.json": file} if file else {})


def tokenizer_file(path: Path) -> Path | None:
    """The `tokenizer.json` that belongs to what `load_pretrained` opens; None where text is bytes.

    Of a run it is the one its recipe names, which may be gone. Raises `CheckpointError` for a directory whose tokenizer
    is of another kind.
    """
    directory = step_directory(path) or path
    if run := run_directory(directory):
        return _named_by_recipe(run)
    if (file := directory / "tokenizer.json").is_file():
        return file
    for other in sorted(directory.iterdir()):
        if other.name.startswith(_OF_OTHERS):
            fix = "only tokenizer.json is read; write one with AutoTokenizer.from_pretrained(…).save_pretrained(…)"
            raise CheckpointError("tokenizer", str(other), fix)
    return None


def _named_by_recipe(run: Path) -> Path | None:
    data = read_json(run / "recipe.json").get("data")
    spec = str(data.get("tokenizer", "byte")) if isinstance(data, dict) else "byte"
    if spec == "byte":
        return None
    return run / "tokenizer.json" if spec.startswith("bpe:") else Path(spec)


def hf_config(
    cfg: ModelConfig, dtype: DTypeLike | None, *, fp8: bool = False, beside: Path | None = None
) -> dict[str, Any]:
    """The contents of config.json: those that lie in the directory `beside` where they describe this model, and else
    ours with the token ids found there."""
    config = cfg.to_hf()
    if beside is not None:
        theirs = read_json(beside / "config.json") if (beside / "config.json").is_file() else {}
        config = theirs if _describes(theirs, cfg) else config | _token_ids(theirs, beside)
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
    """From a config.json, or from the tokenizer that is carried."""
    ids = {name: config[name] for name in _TOKEN_IDS if config.get(name) is not None}
    if ids:
        return ids
    if file := carried_files(directory).get("tokenizer.json"):
        return special_ids(open_tokenizer(file), file)
    run = run_directory(directory)
    return dict(BYTE_SPECIAL_IDS) if run and _named_by_recipe(run) is None else {}
