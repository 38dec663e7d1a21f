"""Text to batches: sources of documents, and Grain pipelines that pack and shuffle."""

from mla_moe.data.malformed_records import SkipMalformed
from mla_moe.data.packing import Batch, gzip_bits_per_byte, heldout_batches, train_batches
from mla_moe.data.sft import SFT_FEATURES, PromptCompletionDataset, PromptCompletionEncoding, sft_batches
from mla_moe.data.sources import open_documents
from mla_moe.data.streams import Batches, process_rows, stream_count

__all__ = [
    "SFT_FEATURES",
    "Batch",
    "Batches",
    "PromptCompletionDataset",
    "PromptCompletionEncoding",
    "SkipMalformed",
    "gzip_bits_per_byte",
    "heldout_batches",
    "open_documents",
    "process_rows",
    "sft_batches",
    "stream_count",
    "train_batches",
]
