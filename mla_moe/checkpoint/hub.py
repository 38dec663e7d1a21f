"""Checkpoints of the Hugging Face Hub and of buckets: which files they have, and local copies of those."""

import glob
from collections.abc import Collection
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from mla_moe.checkpoint.bucket_run import read_run
from mla_moe.checkpoint.files import read_json
from mla_moe.checkpoint.tokenizer_files import SIDE_FILES
from mla_moe.config import require
from mla_moe.config.hub import download, is_hub, parse_url, shown
from mla_moe.config.storage import cache_folder, copy_objects, is_bucket, list_objects

if TYPE_CHECKING:
    from huggingface_hub import HfUri

INDEX = "model.safetensors.index.json"


def parse_model(url: Any, field: str) -> "HfUri":
    """The parts of a URL of a model. Raises `ConfigError` for another."""
    uri = parse_url(url, field)
    ok = uri.type == "model" and not uri.path_in_repo
    require(ok, field, shown(url), "names no model: write hf://ORG/NAME or hf://ORG/NAME@REVISION")
    return uri


def weight_files(found: Collection[str], directory: Path, field: str, url: Any) -> list[str]:
    """Names of the weights that the reader takes, of the files that were `found` at a URL. The index, if there is one,
    is in `directory`. Raises `ConfigError` if one is missing, or if there are none."""
    names = sorted(name for name in found if name.endswith(".safetensors") and not name.startswith("."))
    if "model.safetensors" in names:
        return ["model.safetensors"]
    if (directory / INDEX).is_file():
        weight_map = read_json(directory / INDEX).get("weight_map")
        named = {*map(str, weight_map.values())} if isinstance(weight_map, dict) else {""}
        fix = "names files that are not there; upload them again"
        require(named <= {*names}, field, f"{shown(url)}/{INDEX}", fix)
        return sorted(named)
    fix = "holds no .safetensors file; at a URL, checkpoints are read in Hugging Face's layout"
    require(len(names) > 0, field, shown(url), fix)
    return names


def is_side_file(name: str) -> bool:
    """Whether a file is read, or copied, beside the weights."""
    return any(PurePath(name).match(pattern) for pattern in SIDE_FILES) and not name.startswith(".")


def local_checkpoint(path: str | Path, field: str = "checkpoint") -> Path:
    """The local directory of a checkpoint: `path` itself, or the cached copies of a model of the Hub or of a directory
    in a bucket, or the mirror of a run there. Of the former only the safetensors that the reader takes are downloaded,
    and what is beside them. Raises `ConfigError` on `field` if the Hub or the bucket rejects the request or
    lacks a file."""
    if is_bucket(path):
        if run := read_run(path, field):
            return run
        objects = list_objects(path, field)
        folder = cache_folder(objects)
        copy_objects(path, field, {name: objects[name] for name in objects if is_side_file(name)}, folder)
        weights = weight_files(objects, folder, field, path)
        return copy_objects(path, field, {name: objects[name] for name in weights}, folder)
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
