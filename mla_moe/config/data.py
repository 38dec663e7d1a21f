"""Training and held-out text, its tokenizer, packing and shuffling."""

import dataclasses

from mla_moe.config.errors import require, require_each
from mla_moe.config.resume import field


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text for pretraining and for evaluation, tokenized and packed into sequences."""

    train: tuple[str, ...] = ("cpython:train",)
    """Globs of .txt/.py/.md (one document per file), .jsonl, .parquet or .arrayrecord files, or cpython:train: the
    sources of the running Python's standard library and its language reference."""
    heldout: tuple[str, ...] = ("cpython:heldout",)
    """Held-out text for evaluation, given in the same way."""
    text_field: str = "text"
    """Key (JSON lines) or column (Parquet) that holds a document's text."""
    max_malformed_fraction: float = 0.01
    """Largest fraction of malformed documents. Each is skipped and counted; beyond this fraction the run stops and
    names one of them."""
    tokenizer: str = "byte"
    """byte, the path of a tokenizer.json, or bpe:SIZE to train a BPE tokenizer with SIZE tokens on the training text.
    With --init-from, bpe:SIZE uses the tokenizer of that checkpoint."""
    shuffle_buffer_size: int = 256
    """Packed sequences in the shuffle buffer, which spreads the sequences of a long document over several batches. 1
    does not shuffle."""
    streams: int | None = None
    """Document streams that are packed independently and share each batch. Must be a multiple of the number of
    processes that read data. None: the largest number up to 4 that divides the batch."""
    prefetch: int = field(8, resume="free")
    """Batches that are prepared ahead of the training step."""

    def __post_init__(self):
        require(len(self.train) > 0, "data.train", self.train, "name at least one file or glob")
        require_each(self, "data", "max_malformed_fraction", lambda x: 0 <= x <= 1, "must be between 0 and 1")
        require_each(self, "data", "streams", lambda x: x >= 1, "at least 1, or None")
        require_each(self, "data", "shuffle_buffer_size", lambda x: x >= 1, "at least 1, which does not shuffle")
        require_each(self, "data", "prefetch", lambda x: x >= 1, "prepare at least 1 batch ahead")
        if self.tokenizer.startswith("bpe:"):
            size = self.tokenizer.removeprefix("bpe:")
            require(size.isdigit() and int(size) >= 300, "data.tokenizer", self.tokenizer, "bpe:SIZE with SIZE >= 300")
