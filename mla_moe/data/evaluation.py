"""Text for evaluation: complete held-out text, and samples of training text, in batches; and gzip as a baseline."""

import gzip
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import grain
import numpy as np

from mla_moe.config import require
from mla_moe.data.malformed_records import Document
from mla_moe.data.packing import Batch, pack_documents, pieces
from mla_moe.text.round_trip import lost_bytes
from mla_moe.text.tokenizer import Tokenizer, UnknownTokenizer

_SAMPLE_DOCUMENTS = 512
_SAMPLE_CHARACTERS = 100_000
_DOCUMENT_CHARACTERS = 4096  # of one document, so that a sample has at least 25


class EvalText(NamedTuple):
    """A text in batches, to compute its loss and bits per byte."""

    batches: list[Batch]
    size: int | None
    """Bytes of UTF-8 that are predicted; None if they are not known, of token ids without a tokenizer, or if there are
    none, of ids that stand for no text."""
    lost: int
    """Bytes of the characters that the tokenizer loses."""


def eval_text(
    documents: Sequence[Document], tokenizer: Tokenizer, *, batch_size: int, sequence_length: int
) -> EvalText:
    """All documents once. Every process gets the same batches in the same order; the last is filled up with padding.

    Bits per byte, which is comparable between tokenizers, is the sum of −log2 p over all targets that are not padding,
    plus 8 bits for each lost byte, which no token predicts, divided by the size. Raises `ConfigError` for no tokens.
    """
    sequences = list(pack_documents(grain.MapDataset.source(documents), tokenizer, sequence_length))
    require(len(sequences) > 0, "data.tokenizer", tokenizer.name, "loses all of a text for evaluation; choose another")
    batches = filled_batches(sequences, batch_size)
    texts = [document for document in documents if isinstance(document, str)]
    lost = sum(lost_bytes(tokenizer, piece) for text in texts for piece in pieces(text))
    sizes = [predicted_bytes(document, tokenizer) for document in documents]
    return EvalText(batches, None if None in sizes else sum(filter(None, sizes)) or None, lost)


def predicted_bytes(document: Document, tokenizer: Tokenizer) -> int | None:
    """Bytes of UTF-8 of a document: those of a text, or of token ids after the first, which nothing predicts. None for
    ids of an unknown tokenizer."""
    if isinstance(document, str):
        return len(document.encode())
    if isinstance(tokenizer, UnknownTokenizer):
        return None
    counted = Counter(document[1:].tolist())
    return sum(len(tokenizer.token_bytes(token)) * count for token, count in counted.items())


def bits_per_byte(nats: float, texts: Iterable[EvalText]) -> float:
    """Bits per byte of some texts whose targets have the cross-entropy `nats` in all; NaN if a size is not known."""
    sizes = [(math.nan if text.size is None else text.size, text.lost) for text in texts]
    return (nats / math.log(2) + 8 * sum(lost for _, lost in sizes)) / sum(size for size, _ in sizes)


def filled_batches(sequences: Sequence[Batch], batch_size: int) -> list[Batch]:
    """Batches of packed sequences, at least one; the last batch is filled up with padding."""
    blank = {key: np.zeros_like(value) for key, value in sequences[0].items()}
    sequences = [*sequences, *[blank] * (-len(sequences) % batch_size)]
    groups = [sequences[start : start + batch_size] for start in range(0, len(sequences), batch_size)]
    return [{key: np.stack([sequence[key] for sequence in group]) for key in blank} for group in groups]


def sample_documents(documents: Sequence[Document], indices: range) -> list[Document]:
    """Beginnings of a random sample of the documents with these indices, always the same; without empty ones."""
    texts, left = [], _SAMPLE_CHARACTERS
    for index in random.Random(0).sample(indices, min(len(indices), _SAMPLE_DOCUMENTS)):
        if len(text := documents[index][: min(left, _DOCUMENT_CHARACTERS)]):
            texts.append(text)
            left -= len(text)
        if left == 0:
            break
    return texts


def gzip_bits_per_byte(documents: Iterable[Document], tokenizer: Tokenizer) -> float:
    """Bits per byte of `gzip -9` on the concatenated documents: a baseline for `eval/bits_per_byte`. Token ids are
    decoded; of an unknown tokenizer, or if there is no text then, it is NaN."""
    documents = list(documents)
    if isinstance(tokenizer, UnknownTokenizer) and not all(isinstance(document, str) for document in documents):
        return math.nan
    texts = (document if isinstance(document, str) else tokenizer.decode(document) for document in documents)
    text = "".join(texts).encode()
    return 8 * len(gzip.compress(text, 9)) / len(text) if text else math.nan
