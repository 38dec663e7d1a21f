"""Safetensors files of the Hub or of a bucket, of which only a few at a time are on this host.

A conversion reads tensors in the order of the files, so that each file is downloaded once, and once more where the MTP
module's embedding and head are compared with the model's. Headers are read at first: all checks of `SafetensorsReader`
come before any data.
"""

import shutil
from pathlib import Path

from mla_moe.checkpoint.hub import is_side_file, parse_model, weight_files
from mla_moe.checkpoint.tokenizer_files import SIDE_FILES
from mla_moe.config.files import MAX_JSON_BYTES
from mla_moe.config.hub import download, is_hub
from mla_moe.config.storage import copy_object, list_objects, open_url, storage_errors

_HELD_FILES = 3
"""Files on this host at a time: released checkpoints name the tensors of a layer, which spans up to three, in an order
that is not that of the layers' parameters."""


class RemoteCheckpoint:
    """A Hugging Face checkpoint at a URL: `directory` has the files beside the weights, `headers` files of the weights'
    sizes with nothing but their headers, and `fetch` downloads one."""

    def __init__(self, url: str | Path, temporary: Path, field: str = "checkpoint"):
        """`temporary` is an empty directory for all that is downloaded. Raises `ConfigError` on `field` if the storage
        rejects the request or lacks a file."""
        self._url, self._field = url, field
        self.directory, self._held = temporary / "checkpoint", temporary / "held"
        for folder in (self.directory, self._held, temporary / "headers"):
            folder.mkdir()
        root = url
        if is_hub(url):
            uri, snapshot = parse_model(url, field), download(url, field, SIDE_FILES)
            root = f"hf://{uri.id}@{snapshot.name}"  # all of one commit
            for file in filter(Path.is_file, snapshot.iterdir()):
                if is_side_file(file.name):
                    shutil.copyfile(file, self.directory / file.name)
        self._fs, self._root = open_url(root, field)
        self._objects = list_objects(root, field)
        if not is_hub(url):
            for name in filter(is_side_file, self._objects):
                copy_object(self._fs, self._objects[name], self.directory / name, field, url)
        names = weight_files(self._objects, self.directory, field, url)
        self.headers = [self._header(name, temporary / "headers" / name) for name in names]

    def _header(self, name: str, path: Path) -> Path:
        """A sparse file of the size of a file of weights, which begins with its header."""
        size = self._objects[name]["size"]
        with storage_errors(self._field, self._url), self._fs.open(f"{self._root}/{name}", block_size=1 << 20) as file:
            begin = file.read(min(size, 8))
            length = min(int.from_bytes(begin, "little"), MAX_JSON_BYTES, size - len(begin))
            begin += file.read(length)
        with path.open("wb") as local:
            local.write(begin)
            local.truncate(size)
        return path

    def fetch(self, header: Path) -> Path:
        """The file of weights whose header this is. The one that was used longest ago is removed for it: what is
        memory-mapped of that stays."""
        path = self._held / header.name
        if path.exists():
            path.touch()
            return path
        held = sorted(self._held.iterdir(), key=lambda file: file.stat().st_mtime_ns)
        for file in held[: len(held) - _HELD_FILES + 1]:
            file.unlink()
        copy_object(self._fs, self._objects[header.name], path, self._field, self._url)
        return path
