"""Checkpoints of the Hugging Face Hub: the files of a model, downloaded into the cache of `huggingface_hub`."""

import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_moe.checkpoint.files import read_json
from mla_moe.checkpoint.tokenizer_files import SIDE_FILES
from mla_moe.config import require
from mla_moe.config.hub import download, is_hub, parse_url, shown

if TYPE_CHECKING:
    from huggingface_hub import HfUri

INDEX = "model.safetensors.index.json"


def parse_model(url: Any, field: str) -> "HfUri":
    """The parts of a URL of a model. Raises `ConfigError` for another."""
    uri = parse_url(url, field)
    ok = uri.type == "model" and not uri.path_in_repo
    require(ok, field, shown(url), "names no model: write hf://ORG/NAME or hf://ORG/NAME@REVISION")
    return uri


def local_checkpoint(path: str | Path, field: str = "checkpoint") -> Path:
    """The local directory of a checkpoint: `path` itself, or the cached files of a model of the Hub. Of those only the
    safetensors that the reader takes are downloaded, and what is beside them. Raises `ConfigError` as
    `config.hub.download` does, and for a URL of something else than a model."""
    if not is_hub(path):
        return Path(path)
    uri = parse_model(path, field)
    directory = download(path, field, SIDE_FILES)
    commit = f"hf://{uri.id}@{directory.name}"  # what is downloaded next is of the same commit
    weight_map = read_json(directory / INDEX).get("weight_map") if (directory / INDEX).is_file() else None
    patterns = {"*.safetensors"}
    if isinstance(weight_map, dict):
        patterns = {"model.safetensors", *(glob.escape(str(name)) for name in weight_map.values())}
    return download(commit, field, sorted(patterns))
