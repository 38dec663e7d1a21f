"""Text to batches: sources of documents, and Grain pipelines that pack and shuffle."""

from mla_moe.data.chat_encoding import ChatEncoding, ChatRecords
from mla_moe.data.evaluation import EvalText, bits_per_byte, eval_text, gzip_bits_per_byte, sample_documents
from mla_moe.data.malformed_records import Document, SkipMalformed
from mla_moe.data.packing import Batch, train_batches
from mla_moe.data.preferences import PreferenceDataset, preference_batches, preference_eval_batches
from mla_moe.data.sft import SFT_FEATURES, SFTDataset, sft_batches, sft_eval_batches
from mla_moe.data.sources import open_documents
from mla_moe.data.streams import Batches, process_rows, stream_count
from mla_moe.data.token_ids import TokenFormat

__all__ = [
    "SFT_FEATURES",
    "Batch",
    "Batches",
    "ChatEncoding",
    "ChatRecords",
    "Document",
    "EvalText",
    "PreferenceDataset",
    "SFTDataset",
    "SkipMalformed",
    "TokenFormat",
    "bits_per_byte",
    "eval_text",
    "gzip_bits_per_byte",
    "open_documents",
    "preference_batches",
    "preference_eval_batches",
    "process_rows",
    "sample_documents",
    "sft_batches",
    "sft_eval_batches",
    "stream_count",
    "train_batches",
]
