import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mla_moe.config import ConfigError
from mla_moe.text.round_trip import lost_bytes, lost_fraction
from mla_moe.text.tokenizer import ByteTokenizer, HFTokenizer, train_bpe

CHARACTERS = {c: i for i, c in enumerate(["<s>", "</s>", "<unk>", *"abc", " ", "▁", "\n"])}
TEXT = "Ab\n 三c"
MODELS = {  # and the bytes that are lost of TEXT
    "without unk": (models.BPE(CHARACTERS, []), None, None, 1 + 3),
    "unk": (models.BPE(CHARACTERS, [], unk_token="<unk>"), None, None, 1 + 3),
    "lower case": (models.BPE(CHARACTERS, []), normalizers.Lowercase(), None, 1 + 3),
    "words": (models.WordLevel(CHARACTERS, "<unk>"), None, pre_tokenizers.Whitespace(), 1 + 1 + 1 + 1 + 3 + 1),
    "metaspace": (models.BPE(CHARACTERS, []), None, pre_tokenizers.Metaspace(), 1 + 3),
}


def opened(folder, model, normalizer, pre_tokenizer):
    tokenizer = tokenizers.Tokenizer(model)
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Metaspace() if isinstance(pre_tokenizer, pre_tokenizers.Metaspace) else decoders.Fuse()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return HFTokenizer(folder / "tokenizer.json")


@pytest.mark.parametrize("name", MODELS)
def test_lost_characters_are_counted_in_bytes(name, tmp_path):
    *model, lost = MODELS[name]
    assert lost_bytes(opened(tmp_path, *model), TEXT) == lost


def test_bytes_lose_nothing(tmp_path):
    train_bpe(["some text\n" * 50, "other text, again and again " * 20], 270, tmp_path / "tokenizer.json")
    for tokenizer in (ByteTokenizer(), HFTokenizer(tmp_path / "tokenizer.json")):
        assert lost_bytes(tokenizer, f"{TEXT} \t  \r\n🙂\0</s> e\u0301") == 0


def test_more_than_the_allowed_fraction_is_an_error(tmp_path):
    tokenizer = opened(tmp_path, *MODELS["without unk"][:-1])
    texts = ["a" * 194, "三三"]
    assert lost_fraction(tokenizer, texts, "x.txt", 0.03) == 0.03
    assert lost_fraction(tokenizer, [], "x.txt", 0.0) == 0
    with pytest.raises(ConfigError, match=r"^data\.tokenizer = .*: loses 3\.00% of the bytes of x\.txt; .* = 0\.029$"):
        lost_fraction(tokenizer, texts, "x.txt", 0.029)
