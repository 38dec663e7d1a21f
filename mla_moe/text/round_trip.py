"""Round trip of a tokenizer: the bytes of a text that encoding and decoding lose."""

from collections import Counter
from collections.abc import Sequence

from mla_moe.config import require
from mla_moe.text.tokenizer import Tokenizer


def lost_bytes(tokenizer: Tokenizer, text: str) -> int:
    """UTF-8 bytes of the characters of `text` that are not in its decoded tokens: of those without a token, for
    example, or of capitals that become small."""
    decoded = tokenizer.decode(tokenizer.encode(text))
    lost = Counter() if decoded == text else Counter(text) - Counter(decoded)
    return sum(len(character.encode()) * count for character, count in lost.items())


def lost_fraction(tokenizer: Tokenizer, texts: Sequence[str], source: str, max_fraction: float) -> float:
    """The fraction of the bytes that the tokenizer loses of some texts of a source. Raises `ConfigError` if it is above
    `max_fraction`, which is below 1."""
    lost = sum(lost_bytes(tokenizer, text) for text in texts) / max(sum(len(text.encode()) for text in texts), 1)
    fix = f"choose one with byte fallback, or raise data.max_lost_bytes_fraction = {max_fraction}"
    problem = f"loses {lost:.2%} of the bytes of {source}"
    require(lost <= max_fraction, "data.tokenizer", tokenizer.name, f"{problem}; {fix}")
    return lost
