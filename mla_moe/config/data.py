"""Training and held-out text, its tokenizer, packing and shuffling."""

import dataclasses
import math
import re
from typing import Literal

from mla_moe.config.errors import MAX_SIZE, require_between, require_each, require_field
from mla_moe.config.resume import field
from mla_moe.config.storage import require_path


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text for pretraining and for evaluation, tokenized and packed into sequences."""

    train: tuple[str, ...] = ("cpython:train",)
    """Globs of .txt/.py/.md (one document per file), .jsonl, .json, .parquet or .arrayrecord files, .npy or .bin files
    of token ids, each document of which ends in eos, or cpython:train:
    the sources of the running Python's standard library and its language reference. Each entry is a source. Globs
    may be URLs: hf://datasets/ORG/NAME@REVISION/PATH, s3://… or gs://…."""
    weights: tuple[float, ...] = field((), change="stated")
    """For each source of `train` its fraction of the packed sequences, relative to the others; sources repeat as often
    as that takes. By default all documents are shuffled together: the fractions follow the sources' sizes."""
    heldout: tuple[str, ...] = ("cpython:heldout",)
    """Held-out text for evaluation, given in the same way: one entry per source of `train`, in the same order."""
    text_field: str = "text"
    """Key (JSON lines) or column (Parquet) of a document's text, or of its token ids. Where there is none, input_ids or
    tokens is taken."""
    token_dtype: Literal["uint16", "uint32", "int32"] = "uint16"
    """Type of the token ids in .bin files, little-endian."""
    max_malformed_fraction: float = 0.01
    """Largest fraction of malformed documents, which are skipped and counted. Beyond it the run stops and names one."""
    max_record_bytes: int = field(4 << 20, resume="free")
    """Longest document, line or record in bytes: more is not in memory at a time. A longer text file is read in windows
    of this size, each a document; another longer record counts as malformed. At most 256 GiB: no limit in practice."""
    tokenizer: str = "byte"
    """byte, the path of a tokenizer.json, hf://ORG/NAME for that of a model of the Hub, ids:EOS for token ids whose
    tokenizer is not known, EOS being the id that ends a document, or bpe:SIZE to train a BPE tokenizer with SIZE tokens
    on the training text. With --init-from, bpe:SIZE uses that checkpoint's tokenizer."""
    max_lost_bytes_fraction: float = field(0.01, resume="free")
    """Largest fraction of the bytes of a sample of the text that the tokenizer may lose, as one without some characters
    does. Beyond it the run does not start; bits per byte counts 8 bits for each lost byte."""
    shuffle_buffer_size: int = 256
    """Packed sequences in the shuffle buffer, which spreads a long document over batches. 1 does not shuffle."""
    streams: int | None = None
    """Document streams that are packed independently and share each batch. Must be a multiple of the number of
    processes that read data. None: the largest number up to 4 that divides the batch."""
    prefetch: int = field(8, resume="free")
    """Batches that are prepared ahead of the training step."""

    def __post_init__(self):
        require_path("data.tokenizer", self.tokenizer)
        for name in ("train", "heldout"):
            for pattern in getattr(self, name):
                require_path(f"data.{name}", pattern)
        require_field(self, "data.train", len(self.train) > 0, "name at least one file or glob")
        ok = len(self.weights) in (0, len(self.train)) and all(0 < w < math.inf for w in self.weights)
        require_field(self, "data.weights", ok, "give a positive number for each entry of data.train, or none")
        require_between(self, "data", "max_malformed_fraction", 0, 1)
        require_between(self, "data", "max_record_bytes", 1024, 1 << 38)
        message = "must be at least 0 and less than 1"
        require_each(self, "data", "max_lost_bytes_fraction", lambda x: 0 <= x < 1, message)
        require_between(self, "data", "streams shuffle_buffer_size prefetch", 1, MAX_SIZE)
        if self.tokenizer.startswith("ids:"):
            ok = re.fullmatch("[0-9]{1,9}", self.tokenizer.removeprefix("ids:")) is not None
            require_field(self, "data.tokenizer", ok, "write ids:EOS with the token id EOS that ends a document")
        if self.tokenizer.startswith("bpe:"):
            size = self.tokenizer.removeprefix("bpe:")
            ok = re.fullmatch("[0-9]{3,6}", size) is not None and int(size) >= 300
            require_field(self, "data.tokenizer", ok, "write bpe:SIZE with a SIZE between 300 and 999,999")
