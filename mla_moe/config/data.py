"""Training data: where text comes from and how it becomes tokens."""

import dataclasses

from mla_moe.config.errors import require


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes tokens."""

    train: tuple[str, ...] = ("cpython:train",)
    """Globs of .txt/.py/.md (a file is a document), .jsonl, .parquet, .arrayrecord; or cpython:train, which is the
    standard library's sources and the language reference of the running Python."""
    heldout: tuple[str, ...] = ("cpython:heldout",)
    """The same for evaluation."""
    text_field: str = "text"
    """Key (JSON lines) or column (Parquet) that holds a document."""
    max_malformed_fraction: float = 0.01
    """Largest share of the documents that may turn out to be malformed: they are empty then, and counted. With more
    the run ends, and names one."""
    tokenizer: str = "byte"
    """byte, the path of a tokenizer.json, or bpe:SIZE to train one of SIZE tokens on the training text. With
    `init_from`, bpe:SIZE is the one that the checkpoint brings."""
    shuffle_buffer_size: int = 256
    """Sequences among which a packed sequence may move, so that one long document does not fill a batch."""
    streams: int | None = None
    """Streams of documents that are packed side by side and share each batch: a multiple of the number of processes
    that read. None takes as many as divide the batch, at most 4."""
    prefetch: int = 8
    """Batches prepared ahead of the step."""

    def __post_init__(self):
        require(len(self.train) > 0, "data.train", self.train, "name at least one file or glob")
        require(
            0 <= self.max_malformed_fraction <= 1,
            "data.max_malformed_fraction",
            self.max_malformed_fraction,
            "a share between 0 and 1",
        )
        require(self.streams is None or self.streams >= 1, "data.streams", self.streams, "at least 1, or None")
        require(
            self.shuffle_buffer_size >= 1, "data.shuffle_buffer_size", self.shuffle_buffer_size, "1 keeps the order"
        )
        require(self.prefetch >= 1, "data.prefetch", self.prefetch, "prepare at least 1 batch ahead")
        if self.tokenizer.startswith("bpe:"):
            size = self.tokenizer.removeprefix("bpe:")
            require(size.isdigit() and int(size) >= 300, "data.tokenizer", self.tokenizer, "bpe:SIZE with SIZE >= 300")
