"""Documents that are token ids: lists in records, and flat files of ids, as nanoGPT and Megatron-LM write them."""

import array
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mla_moe.config import ConfigError, require
from mla_moe.data.frozen_files import FrozenFiles
from mla_moe.data.lines import locate
from mla_moe.data.malformed_records import MalformedRecordError, TokenIds

logger = logging.getLogger(__name__)
KEYS = ("input_ids", "tokens")
"""Keys of token ids in a record that has no text."""
_CHUNK = 1 << 24  # ids that are scanned at a time


class TokenFormat(NamedTuple):
    """What token ids are checked by, and how flat files of them are read."""

    vocab_size: int
    """Number of the model's token ids."""
    bos_id: int
    eos_id: int
    """Ends a document in a flat file."""
    dtype: str
    """Dtype of the ids in a .bin file, little-endian."""


def record_ids(values: Sequence[Any], tokens: TokenFormat | None, field: str, where: str) -> TokenIds:
    """The token ids of a record. Raises `MalformedRecordError` for values that are no ids, and `ConfigError` for ids
    that the model does not have."""
    try:
        ids = np.array(values)
    except ValueError:  # lists of several lengths
        ids = np.array([None])
    if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
        raise MalformedRecordError(field, where, "needs a list of token ids, which are integers")
    return _without_empty(ids.astype(np.int32), require_in_vocabulary(ids, tokens, field, where))


def _without_empty(ids: TokenIds, tokens: TokenFormat) -> TokenIds:
    """The ids of a document; none if there is nothing between its bos and its eos."""
    return ids[:0] if ((ids == tokens.bos_id) | (ids == tokens.eos_id)).all() else ids


def require_in_vocabulary(ids: np.ndarray, tokens: TokenFormat | None, field: str, where: str) -> TokenFormat:
    """Raise `ConfigError` for ids that are negative or above the model's vocabulary, and if none is known."""
    if tokens is None:
        fix = "has token ids, and bpe:SIZE is trained on text; name the tokenizer that made them, or ids:EOS"
        raise ConfigError("data.tokenizer", where, fix)
    if len(ids) and not (ids.min() >= 0 and ids.max() < tokens.vocab_size):
        wrong = ids.min() if ids.min() < 0 else ids.max()
        fix = f"has token id {wrong}, outside model.vocab_size = {tokens.vocab_size}; name the model and the tokenizer"
        raise ConfigError(field, where, f"{fix} of these ids, or for a .bin file another data.token_dtype")
    return tokens


class TokenFiles(Sequence[TokenIds]):
    """Flat files of token ids: `.npy`, of one axis, or `.bin`, of `tokens.dtype` without a header. Each eos ends a
    document; it is not part of it. A document of more than `max_record_bytes` is read as several.

    Opening the files reads them once, to find the documents and to check the ids.
    """

    def __init__(
        self, paths: list[str], field: str, text_field: str, max_record_bytes: int, tokens: TokenFormat | None = None
    ):
        self.files, self._tokens = FrozenFiles(paths, field), tokens
        self._start: list[int] = []  # of the ids in each file, in bytes
        self._dtypes: list[np.dtype] = []
        self._begins, self._stops = array.array("q"), array.array("q")  # of each document, in ids
        self._ends: list[int] = []
        long = 0
        for path in paths:
            ids = _memory_map(path, field, tokens)
            begins, stops, pieces = _documents(ids, path, field, max(1, max_record_bytes // ids.itemsize), tokens)
            self._begins.extend(begins)
            self._stops.extend(stops)
            self._start.append(getattr(ids, "offset", 0))
            self._dtypes.append(ids.dtype)
            self._ends.append(len(self._stops))
            long += pieces
        self.windows = self._ends
        """Where the documents of each file end, to detect another division on resume."""
        if long:
            note = "%s: %d documents of token ids are longer than data.max_record_bytes, and read as several"
            logger.warning(note, field, long)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> TokenIds:
        number, _ = locate(self._ends, index)
        dtype, begin = self._dtypes[number], self._begins[index]
        with self.files.open(number) as file:
            file.seek(self._start[number] + begin * dtype.itemsize)
            read = file.read((self._stops[index] - begin) * dtype.itemsize)
        ids = np.frombuffer(read, dtype).astype(np.int32)
        return ids if self._tokens is None else _without_empty(ids, self._tokens)


def _memory_map(path: str, field: str, tokens: TokenFormat | None) -> np.ndarray:
    if Path(path).suffix.lower() == ".npy":
        try:
            ids = np.lib.format.open_memmap(path, mode="r")
        except (ValueError, OSError, EOFError) as error:
            raise ConfigError(field, path, f"cannot be read as .npy: {error}; write it with numpy.save") from None
        fix = f"has {ids.dtype} of shape {ids.shape}; token ids are integers of one axis"
        require(ids.ndim == 1 and ids.dtype.kind in "iu", field, path, fix)
        return ids
    tokens = require_in_vocabulary(np.zeros(0, np.int32), tokens, field, path)
    dtype, size = np.dtype(tokens.dtype).newbyteorder("<"), Path(path).stat().st_size
    fix = f"has {size} bytes, no multiple of {dtype.itemsize}: not a flat file of {tokens.dtype} (data.token_dtype)"
    require(size % dtype.itemsize == 0, field, path, fix)
    ids = np.memmap(path, dtype, mode="r") if size else np.zeros(0, dtype)
    looks_wide = dtype.itemsize == 2 and len(ids) >= 16 and len(ids) % 2 == 0 and not ids[1:_CHUNK:2].any()
    fix = f"every second id of {path} is 0, as if they were uint32; set data.token_dtype"
    require(not looks_wide, "data.token_dtype", tokens.dtype, fix)
    return ids


def _documents(
    ids: np.ndarray, path: str, field: str, most: int, tokens: TokenFormat | None
) -> tuple[list[int], list[int], int]:
    """Where documents begin and stop, before their eos, each of at most `most` ids; and how many are longer."""
    begins: list[int] = []
    stops: list[int] = []
    found, begin, long = [], 0, 0
    for start in range(0, len(ids), _CHUNK):
        chunk = np.asarray(ids[start : start + _CHUNK])
        eos_id = require_in_vocabulary(chunk, tokens, field, path).eos_id
        found.append(np.flatnonzero(chunk == eos_id) + start)
    ends = np.concatenate(found).tolist() if found else []
    if len(ids) and (not ends or ends[-1] + 1 < len(ids)):
        ends.append(len(ids))  # the last document has no eos
    for end in ends:
        long += end - begin > most
        for piece in range(begin, max(end, begin + 1), most):
            begins.append(piece)
            stops.append(min(piece + most, end))
        begin = end + 1
    return begins, stops, long
