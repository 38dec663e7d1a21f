"""Text to batches: sources of documents, tokenizers, and Grain pipelines that pack and shuffle."""

from mla_moe.data.malformed import LeavingOut
from mla_moe.data.pairs import PAIR_FIELDS, Coding, Pairs, pair_batches
from mla_moe.data.pipeline import Batch, gzip_bits_per_byte, heldout_batches, train_batches
from mla_moe.data.sources import open_sources
from mla_moe.data.streams import Batches, rows_of, stream_count
from mla_moe.data.tokenizer import ByteTokenizer, HFTokenizer, Tokenizer, load_tokenizer, train_bpe

__all__ = [
    "PAIR_FIELDS",
    "Batch",
    "Batches",
    "ByteTokenizer",
    "Coding",
    "HFTokenizer",
    "LeavingOut",
    "Pairs",
    "Tokenizer",
    "gzip_bits_per_byte",
    "heldout_batches",
    "load_tokenizer",
    "open_sources",
    "pair_batches",
    "rows_of",
    "stream_count",
    "train_batches",
    "train_bpe",
]
